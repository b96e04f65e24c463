"""An estimate of a training step on each chip of a mesh: memory, communication, and time at published rates.

It counts what XLA's compiler for TPUs does with each mesh axis. C, T, V and L are as in `cost`, A is `accumulate`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from jaxgpt.config import Config
from jaxgpt.loss import LOGITS
from jaxgpt.monitor import cost
from jaxgpt.monitor.chips import Chip, flops_per_token
from jaxgpt.profile.hlo import Collectives
from jaxgpt.sharding import Sizes

TOKENS = 2**28
"""Tokens of the corpus on each chip, as in training (`feed.DEVICE_TOKENS`)."""
ROOM = 0.8
"""The share of a chip's memory that an estimate may fill: compiled steps take up to a quarter more
(tests/plan/test_plan.py), and 31% more with eight sequences per chip (docs/howto/plan.md)."""
TILE = 16
"""Rows of a bfloat16 tile on a TPU: shards of kernels are padded to a multiple."""


@dataclass(frozen=True)
class Step:
    """A training step on each chip of a mesh; bytes and FLOPs are per chip."""

    sizes: Sizes
    chip: Chip | None
    """None for virtual devices, which have no rates."""
    arguments: int
    """Bytes of parameters, AdamW moments and tokens."""
    temporaries: int
    flops: float
    """Of the matmuls of one forward and one backward pass."""
    computed: float
    """FLOPs of the matmuls with those that are recomputed."""
    updated: int
    """Bytes that the optimizer reads and writes."""
    collectives: Collectives
    network: float = 0
    """Bytes sent between pods."""
    room: float = 1.0
    """The share of the chip's memory that the step may fill."""
    precision: str = "bfloat16"
    """The compute dtype."""

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return self.chip is None or self.memory <= self.room * self.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of matmuls, optimizer update and communication at the published rates."""
        assert self.chip is not None
        n = self.sizes.devices
        communication = sum(
            sent(kind, k, size) / self.chip.sending_rate(k, n) for (kind, k), (_, size) in self.collectives.items()
        )
        if self.network:
            communication += self.network / self.chip.network_rate
        return {
            "matmuls": self.computed / self.chip.rate(self.precision),
            "update": self.updated / self.chip.memory_rate,
            "communication": communication,
        }

    @property
    def bounds(self) -> tuple[float, float]:
        """Seconds of a step: with communication fully overlapped, and with none overlapped."""
        seconds = self.seconds
        rest = seconds["matmuls"] + seconds["update"]
        return max(rest, seconds["communication"]), rest + seconds["communication"]

    @property
    def utilisation(self) -> tuple[float, float]:
        """`flops` over what the chip could compute in that time, the lower and the upper bound."""
        assert self.chip is not None
        least, most = self.bounds
        seconds = self.flops / self.chip.rate(self.precision)
        return seconds / most, seconds / least


def sent(kind: str, n: int, size: float) -> float:
    """Bytes over each chip's links, both ways round a ring of n chips, for an array of `size` bytes, as counted by
    `hlo.collectives`: https://jax-ml.github.io/scaling-book/sharding."""
    match kind:
        case "all-reduce":
            return 2 * size * (n - 1) / n
        case "all-to-all":
            return size * max(1, n / 4) * (n - 1) / n
        case "collective-permute":
            return size
    return size * (n - 1) / n


def flops(config: Config, sizes: Sizes) -> tuple[float, float]:
    """`Step.flops` and `Step.computed` of a GPT on one chip."""
    model, train = config.model, config.train
    tokens = train.batch_size * model.block_size / sizes.devices
    forward = flops_per_token(model)
    head = 2 * model.vocab_size * model.n_embd
    again = (forward - head if model.remat == "blocks" else 0) + (head if _loss_chunks(config, sizes) > 1 else 0)
    # If tensor does not divide the heads, every chip of the axis computes all of them.
    shared = 0 if model.n_head % sizes.tensor == 0 else model.n_layer * 4 * model.block_size * model.n_embd
    more = shared * (sizes.tensor - 1) * (4 if model.remat == "blocks" else 3)
    return 3 * forward * tokens, (3 * forward + again + more) * tokens


def updated(config: Config, sizes: Sizes) -> int:
    """Bytes that AdamW reads (gradient, parameter, two moments) and writes (the last three)."""
    return 7 * cost.FLOAT * cost.n_params(config.model) // (sizes.fsdp * sizes.tensor)


def estimate(config: Config, chip: Chip, sizes: Sizes) -> Step:
    """The step of a GPT on a mesh without `cli.mesh.problems`. With more chips than a pod, `data` spans the pods."""
    model, train, f, t = config.model, config.train, sizes.fsdp, sizes.tensor
    slices = chip.slices(sizes.devices)
    copies = max(1, sizes.data // slices) * sizes.context
    width = cost.FLOAT if model.precision == "float32" else cost.FLOAT // 2
    counts: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0])

    def send(kind: str, n: int, times: float, size: float) -> None:
        if n > 1 and times:
            counts[kind, n][0] += times
            counts[kind, n][1] += times * size

    C, V, L, A = model.n_embd, model.vocab_size, model.n_layer, train.accumulate
    kernels = sum(k * n for k, n in cost.kernels(model).values())
    table = V * C
    rows = C / f  # of a shard
    padded = math.ceil(rows / TILE) * TILE / rows if chip.torus and f > 1 else 1
    activations = _sequences(config, sizes) * model.block_size / sizes.context * C
    each = len(cost.kernels(model))
    # Block kernels are gathered for both passes, those of attention again for remat; the head's once.
    attention = sum(k * n for name, (k, n) in cost.kernels(model).items() if "c_" not in name or "attn" in name)
    gathers = 2 + (attention / kernels if model.remat == "blocks" else 0)
    send("all-gather", f, gathers * A * L * each, width * kernels / each / t)
    send("all-gather", f, A, width * table / t)
    send("reduce-scatter", f, A * L * each, cost.FLOAT * kernels / each / t * padded)
    send("reduce-scatter", f, A, cost.FLOAT * table / t)
    # Padded shards then move to their own chips, over as many hops as the padding adds.
    hops = math.ceil(f * (1 - 1 / padded))
    send("collective-permute", 2, hops * A * L * each, cost.FLOAT * kernels / each / (f * t) * padded)
    send("all-reduce", copies, A * L * each, cost.FLOAT * kernels / each / (f * t))
    send("all-reduce", copies, 2 * A, cost.FLOAT * table / (f * t))
    send("all-to-all", f, 2 * A, cost.FLOAT * activations)
    # Sums after attention and MLP: forward, backward, and again for remat.
    passes = 3 if model.remat == "blocks" else 2
    send("all-reduce", t, A * L * 2 * passes, width * activations)
    send("all-reduce", t, 2 * A, cost.FLOAT * activations)
    if model.n_head % t:
        send("all-gather", t, A * L * 3 * passes, width * activations)
    # Keys and values of all tokens, and the sums of their gradients.
    kv = width * activations * sizes.context * (model.n_kv_head or model.n_head) / model.n_head / t
    send("all-gather", sizes.context, A * L * 2 * (passes - 1), kv)
    send("reduce-scatter", sizes.context, A * L * 2, kv)
    useful, computed = flops(config, sizes)
    state = cost.FLOAT * cost.n_params(model) // (f * t)
    shard = A * (cost.FLOAT * (kernels * L + 2 * table) / (f * t))
    return Step(
        sizes,
        chip,
        arguments=3 * state + TOKENS * (2 if V <= 2**16 else 4),
        temporaries=state + (width < cost.FLOAT) * width * state // cost.FLOAT + _working(config, sizes, width),
        flops=useful,
        computed=computed,
        updated=updated(config, sizes),
        collectives={key: (int(n), int(size)) for key, (n, size) in sorted(counts.items())},
        network=2 * shard / copies * (slices - 1) / slices,
        room=ROOM,
        precision=model.precision,
    )


def _working(config: Config, sizes: Sizes, width: int) -> int:
    """Bytes of activations saved for the backward pass, and the peak of the head or of one block."""
    model, t = config.model, sizes.tensor
    C, V, L = model.n_embd, model.vocab_size, model.n_layer
    tokens = _sequences(config, sizes) * model.block_size / sizes.context
    kernels = sum(k * n for k, n in cost.kernels(model).values())
    hidden = sum(n for _, n in cost.kernels(model).values()) / t
    inside = cost.FLOAT * 3 * C + 2 * width * hidden  # of a block and a token: inputs of norms, results of kernels
    saved = L * tokens * (cost.FLOAT * C if model.remat == "blocks" else inside)
    logits = tokens / _loss_chunks(config, sizes) * V / t
    head = (cost.FLOAT + width) * logits + (2 * cost.FLOAT + width) * V * C / t
    block = 2 * inside * tokens + (2 * width + cost.FLOAT) * kernels / t
    return int(saved + max(head, block))


def _sequences(config: Config, sizes: Sizes) -> float:
    """Sequences per chip in a micro-batch."""
    return config.train.batch_size / config.train.accumulate / (sizes.data * sizes.fsdp)


def _loss_chunks(config: Config, sizes: Sizes) -> int:
    """About how many chunks `loss.losses_of` computes."""
    tokens = _sequences(config, sizes) * config.model.block_size / sizes.context
    return math.ceil(tokens * config.model.vocab_size / sizes.tensor / LOGITS)
