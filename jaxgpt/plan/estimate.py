"""An estimate of a training step on each chip of a mesh: memory, communication, and time at published rates.

It counts what XLA's TPU compiler does with each mesh axis. A is the number of micro-batches.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from jaxgpt.cli.memory import n_moments
from jaxgpt.config import Config
from jaxgpt.data import DEVICE_TOKENS
from jaxgpt.kernels import BLOCKED, queries_per_shard_block
from jaxgpt.loss import logits_in
from jaxgpt.monitor import cost
from jaxgpt.monitor.chips import Chip, attended, flops_per_token
from jaxgpt.monitor.cost import FLOAT
from jaxgpt.profile.hlo import Collectives
from jaxgpt.sharding import Sizes

ROOM = 0.8
"""The share of a chip's memory that an estimate may fill: compiled steps take up to a quarter more
(tests/plan/test_plan.py), and 30% more with eight sequences per chip (docs/howto/plan.md)."""
TILE = 16
"""Rows of a bfloat16 tile on a TPU: shards of kernels are padded to a multiple."""


@dataclass(frozen=True)
class Step:
    """A training step on a mesh. Bytes, FLOPs and seconds are per chip."""

    config: Config  # whose precision is not "auto"
    sizes: Sizes
    chip: Chip | None  # None for virtual devices, which have no rates
    arguments: int  # bytes of parameters, moments, and as many tokens as training keeps on a chip
    temporaries: int
    collectives: Collectives
    network: float = 0  # bytes sent between pods
    room: float = 1.0  # the share of the chip's memory that the step may fill

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return self.chip is None or self.memory <= self.room * self.chip.memory

    @property
    def tokens(self) -> int:
        """Of a step, on all chips."""
        return self.config.train.batch_size * self.config.model.block_size

    @property
    def flops(self) -> float:
        """Matmul FLOPs of one forward and one backward pass."""
        return 3 * flops_per_token(self.config.model) * (self.tokens / self.sizes.devices)

    @property
    def computed(self) -> float:
        """`flops` with those that are recomputed, or computed by several chips, and those of Muon."""
        model, tensor = self.config.model, self.sizes.tensor
        if self.sizes.context > 1:  # blocks of a shard take the keys of the whole context
            model = replace(model, window=0)
        forward, head = flops_per_token(model), 2 * model.vocab_size * model.n_embd
        attention = model.n_layer * 4 * attended(model) * model.n_embd
        unused = model.n_layer * 2 * math.prod(cost.kernels(model)["mlp/c_proj"])  # no gradient needs its result
        again = {"none": 0, "matmuls": attention, "blocks": forward - head - unused}[model.remat]
        again += head if _loss_chunks(self.config, self.chip, self.sizes) > 1 else 0
        if model.n_head % tensor:  # every chip of the axis computes all heads
            again += attention * (tensor - 1) * (3 if model.remat == "none" else 4)
        return (3 * forward + again) * (self.tokens / self.sizes.devices) + _muon_flops(self.config, self.sizes)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of matmuls, optimizer update and communication at the published rates."""
        assert self.chip is not None
        # The optimizer reads gradients, parameters and moments, and writes the last two.
        numbers = 3 * cost.n_params(self.config.model) + 2 * n_moments(self.config)
        updated = FLOAT * numbers // (self.sizes.fsdp * self.sizes.tensor)
        communication = sum(
            sent(kind, n, size) / self.chip.sending_rate(n, self.sizes.devices)
            for (kind, n), (_, size) in self.collectives.items()
        )
        if self.network:
            communication += self.network / self.chip.network_rate
        return {
            "matmuls": self.computed / self.chip.rate(self.config.model.precision),
            "update": updated / self.chip.memory_rate,
            "communication": communication,
        }

    @property
    def bounds(self) -> tuple[float, float]:
        """Seconds of a step: with communication fully overlapped, and with none overlapped."""
        matmuls, update, communication = self.seconds.values()
        return max(matmuls + update, communication), matmuls + update + communication

    @property
    def utilization(self) -> tuple[float, float]:
        """`flops` over what the chip could compute in that time, the lower and the upper bound."""
        assert self.chip is not None
        least, most = self.bounds
        seconds = self.flops / self.chip.rate(self.config.model.precision)
        return seconds / most, seconds / least


def sent(kind: str, n: int, size: float) -> float:
    """Bytes that each of n chips sends, both ways round a ring, for an array of `size` bytes, as counted by
    `hlo.collectives`: https://jax-ml.github.io/scaling-book/sharding."""
    ring = (n - 1) / n
    factors = {"all-reduce": 2 * ring, "all-to-all": max(1, n / 4) * ring, "collective-permute": 1}
    return size * factors.get(kind, ring)


def estimate(config: Config, chip: Chip, sizes: Sizes) -> Step:
    """The step of a GPT on a mesh that has no `cli.mesh.problems`. On more chips than a pod, `data` spans the pods."""
    model, f, t = config.model, sizes.fsdp, sizes.tensor
    slices = chip.slices(sizes.devices)
    copies = max(1, sizes.data // slices) * sizes.context
    width = FLOAT if model.precision == "float32" else FLOAT // 2  # bytes of a number in the compute dtype
    counts: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0])  # as Collectives

    def send(kind: str, n: int, times: float, size: float) -> None:
        if n > 1 and times:
            counts[kind, n][0] += times
            counts[kind, n][1] += times * size

    C, V, L, A = model.n_embd, model.vocab_size, model.n_layer, config.train.accumulate
    shapes = cost.kernels(model)
    kernels = sum(k * n for k, n in shapes.values())  # elements of those of a block
    # The number of kernels in all micro-batches, and elements on a `tensor` shard of the average one and of the head.
    n_kernels, kernel, head = A * L * len(shapes), kernels / len(shapes) / t, V * C / t
    rows = C / f  # of a shard
    padded = math.ceil(rows / TILE) * TILE / rows if chip.torus and f > 1 else 1
    # Elements on a chip of the embeddings of positions and pairs, which tensor does not split.
    whole = (model.block_size * (model.position == "learned") + V * V * model.bigram_embed) * C // f
    activations = _micro_batch_tokens(config, sizes) * C
    # Block kernels are gathered for both passes, those of attention again for remat; the head's once.
    attention = sum(k * n for name, (k, n) in shapes.items() if "c_" not in name or "attn" in name)
    gathers = 2 + (attention / kernels if model.remat == "blocks" else 0)
    send("all-gather", f, gathers * n_kernels, width * kernel)
    send("all-gather", f, A, width * head)
    send("reduce-scatter", f, n_kernels, FLOAT * kernel * padded)
    send("reduce-scatter", f, A, FLOAT * head)
    # Padded shards then move to their own chips, over as many hops as the padding adds.
    send("collective-permute", 2, math.ceil(f * (1 - 1 / padded)) * n_kernels, FLOAT * kernel / f * padded)
    send("all-reduce", copies, n_kernels, FLOAT * kernel / f)
    send("all-reduce", copies, 2 * A, FLOAT * head / f)
    send("all-reduce", copies, A * bool(whole), FLOAT * whole)
    send("all-to-all", f, 2 * A, FLOAT * activations)
    # Sums after attention and MLP: forward, backward, and again for remat.
    passes = 3 if model.remat == "blocks" else 2
    send("all-reduce", t, A * L * 2 * passes, width * activations)
    send("all-reduce", t, 2 * A, FLOAT * activations)
    if model.n_head % t:
        send("all-gather", t, A * L * 3 * passes, width * activations)
    # Keys and values of all tokens.
    kv = width * activations * sizes.context * (model.n_kv_head or model.n_head) / model.n_head / t
    send("all-gather", sizes.context, A * L * 2 * (passes - 1), kv)
    # The float32 sums of their gradients, for every head; blocked attention has them after each block of queries.
    queries, sums = model.block_size // sizes.context, FLOAT * activations * sizes.context / t
    if model.block_size >= BLOCKED:
        send("all-reduce", sizes.context, A * L * 2 * (queries // queries_per_shard_block(queries)), sums)
    else:
        send("reduce-scatter", sizes.context, A * L * 2, sums)
    repeated = whole - whole // t  # beyond a share of it
    state = FLOAT * (cost.n_params(model) // (f * t) + repeated)  # of the parameters, or their gradients
    moments = FLOAT * (n_moments(config) // (f * t) + 2 * repeated)
    low_precision = width * state // FLOAT if width < FLOAT else 0  # the parameters in bfloat16
    shard = A * FLOAT * ((kernels * L / t + 2 * head) / f + whole)
    return Step(
        config,
        sizes,
        chip,
        arguments=state + moments + DEVICE_TOKENS * (2 if V <= 2**16 else 4),
        temporaries=state + low_precision + _activation_bytes(config, chip, sizes, width),
        collectives={key: (int(n), int(size)) for key, (n, size) in sorted(counts.items())},
        network=2 * shard / copies * (slices - 1) / slices,
        room=ROOM,
    )


def _muon_flops(config: Config, sizes: Sizes) -> float:
    """FLOPs of Newton-Schulz on a chip, with a kernel's rows as its shorter side: A = X Xᵀ, A A and A X (`orthogonal`).
    Shards of a kernel divide them; every copy of a shard computes the same."""
    if config.optimizer.algorithm != "muon":
        return 0.0
    sides = map(sorted, cost.kernels(config.model).values())
    iteration = config.model.n_layer * sum(2 * rows * rows * (2 * columns + rows) for rows, columns in sides)
    return config.optimizer.muon_steps * iteration / (sizes.fsdp * sizes.tensor)


def _activation_bytes(config: Config, chip: Chip, sizes: Sizes, width: int) -> int:
    """Bytes of activations saved for the backward pass, and the peak of the head or of one block."""
    model, tokens, t = config.model, _micro_batch_tokens(config, sizes), sizes.tensor
    C, V, shapes = model.n_embd, model.vocab_size, cost.kernels(model).values()
    kernels, hidden = sum(k * n for k, n in shapes), sum(n for _, n in shapes) / t
    inside = width * (3 * C + 2 * hidden)  # of a block and a token: inputs of norms, results of kernels
    saved = model.n_layer * tokens * (width * C if model.remat == "blocks" else inside)
    logits = tokens / _loss_chunks(config, chip, sizes) * V / t
    head = (FLOAT + width) * logits + (2 * FLOAT + width) * V * C / t
    block = 2 * inside * tokens + (2 * width + FLOAT) * kernels / t
    return int(saved + max(head, block))


def _micro_batch_tokens(config: Config, sizes: Sizes) -> float:
    """Tokens per chip in a micro-batch."""
    sequences = config.train.batch_size / config.train.accumulate / (sizes.data * sizes.fsdp)
    return sequences * config.model.block_size / sizes.context


def _loss_chunks(config: Config, chip: Chip | None, sizes: Sizes) -> int:
    """About how many chunks `loss.losses_of` computes."""
    logits = _micro_batch_tokens(config, sizes) * config.model.vocab_size / sizes.tensor
    return math.ceil(logits / logits_in(chip.allocated if chip else 0))
