"""What a training step costs each chip of a mesh: how long it takes at published rates, and, on paper, what it holds
and sends.

The paper counts what the compiler for TPUs was seen to do with each axis. C, T, V and L are as in `nn.cost`, A is
`accumulate`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from jaxgpt import cost
from jaxgpt.config import Config
from jaxgpt.mesh import Sizes
from jaxgpt.monitor.chips import Chip
from jaxgpt.profile.hlo import Collectives

TOKENS = 2**28
"""Of the corpus on each chip, as in training (`feed.DEVICE_TOKENS`)."""
ROOM = 0.8
"""Of a chip's memory, on paper: the compiler was seen to take up to a quarter more (tests/plan/test_plan.py), and
31% with eight sequences a chip (docs/scaling.md)."""
TILE = 16
"""Rows of bfloat16 that a TPU keeps together: shards of kernels are padded to a multiple."""
LANES = 128
"""Columns that it keeps together: so are those of logits."""


@dataclass(frozen=True)
class Step:
    """A training step on one of the chips of a mesh; bytes and operations are a chip's own."""

    sizes: Sizes
    chip: Chip | None
    """None for virtual devices, which have no rates."""
    arguments: int
    """Parameters, moments, tokens."""
    temporaries: int
    flops: float
    """Of the products of a forward and a backward pass."""
    computed: float
    """Of the products that are done, some of them again."""
    updated: int
    """Bytes that the optimizer reads and writes."""
    collectives: Collectives
    network: float = 0
    """Bytes that are sent from one pod to others."""
    room: float = 1.0
    """The share of the chip's memory that may be taken."""
    precision: str = "bfloat16"
    """Of the operands of products, resolved."""

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return self.chip is None or self.memory <= self.room * self.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """What takes how long at the published rates."""
        assert self.chip is not None
        n = self.sizes.devices
        sending = sum(
            sent(kind, k, size) / self.chip.sending_rate(k, n) for (kind, k), (_, size) in self.collectives.items()
        )
        if self.network:
            sending += self.network / self.chip.network_rate
        return {
            "products": self.computed / self.chip.rate(self.precision),
            "update": self.updated / self.chip.memory_rate,
            "sending": sending,
        }

    @property
    def bounds(self) -> tuple[float, float]:
        """Seconds of a step, least and most: all that is sent goes beside the rest, or nothing does."""
        seconds = self.seconds
        rest = seconds["products"] + seconds["update"]
        return max(rest, seconds["sending"]), rest + seconds["sending"]

    @property
    def utilisation(self) -> tuple[float, float]:
        """`flops` by what the chip could do in that time and precision, least and most."""
        assert self.chip is not None
        least, most = self.bounds
        seconds = self.flops / self.chip.rate(self.precision)
        return seconds / most, seconds / least


def sent(kind: str, n: int, size: float) -> float:
    """Bytes over each chip's links, both ways round a ring of n chips, for an array of `size` bytes as
    `hlo.collectives` counts them: https://jax-ml.github.io/scaling-book/sharding."""
    match kind:
        case "all-reduce":
            return 2 * size * (n - 1) / n
        case "all-to-all":
            return size * max(1, n / 4) * (n - 1) / n
        case "collective-permute":
            return size
    return size * (n - 1) / n


def operations(config: Config, sizes: Sizes) -> tuple[float, float]:
    """(flops, computed) of a step on one chip, as `Step` has them. Of a bigram there are none."""
    model, train = config.model, config.train
    if model.kind == "bigram":
        return 0, 0
    tokens = train.batch_size * model.block_size / sizes.devices
    forward = cost.flops_per_token(model)
    head = 2 * model.vocab_size * model.n_embd
    again = (forward - head if model.remat == "blocks" else 0) + (head if _parts(config, sizes) > 1 else 0)
    # Heads that tensor does not divide are attended on every chip of the axis.
    shared = 0 if model.n_head % sizes.tensor == 0 else model.n_layer * 4 * model.block_size * model.n_embd
    more = shared * (sizes.tensor - 1) * (4 if model.remat == "blocks" else 3)
    return 3 * forward * tokens, (3 * forward + again + more) * tokens


def updated(config: Config, sizes: Sizes) -> int:
    """Bytes that AdamW reads (gradient, parameter, two moments) and writes (the last three)."""
    shards = 1 if config.model.kind == "bigram" else sizes.fsdp * sizes.tensor
    return 7 * cost.FLOAT * cost.n_params(config.model) // shards


def on_paper(config: Config, chip: Chip, sizes: Sizes) -> Step:
    """A step of a config, its vocabulary known, whose mesh has no `mesh.problems`. Of more chips than a pod, `data`
    goes over the pods."""
    if config.model.kind == "bigram":
        return _bigram(config, chip, sizes)
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
    # Kernels of blocks for both passes, those of attention again where a block is computed again, and the head's once.
    attention = sum(k * n for name, (k, n) in cost.kernels(model).items() if "c_" not in name or "attn" in name)
    gathers = 2 + (attention / kernels if model.remat == "blocks" else 0)
    send("all-gather", f, gathers * A * L * each, width * kernels / each / t)
    send("all-gather", f, A, width * table / t)
    send("reduce-scatter", f, A * L * each, cost.FLOAT * kernels / each / t * padded)
    send("reduce-scatter", f, A, cost.FLOAT * table / t)
    # Padded shards are moved to where they belong, by as many chips as the padding comes to.
    hops = math.ceil(f * (1 - 1 / padded))
    send("collective-permute", 2, hops * A * L * each, cost.FLOAT * kernels / each / (f * t) * padded)
    send("all-reduce", copies, A * L * each, cost.FLOAT * kernels / each / (f * t))
    send("all-reduce", copies, 2 * A, cost.FLOAT * table / (f * t))
    send("all-to-all", f, 2 * A, cost.FLOAT * activations)
    # Sums after attention and MLP, forward and backward, and again where a block is computed again.
    passes = 3 if model.remat == "blocks" else 2
    send("all-reduce", t, A * L * 2 * passes, width * activations)
    send("all-reduce", t, 2 * A, cost.FLOAT * activations)
    if model.n_head % t:
        send("all-gather", t, A * L * 3 * passes, width * activations)
    # Keys and values of all tokens, and the sum of their gradients.
    kv = width * activations * sizes.context * (model.n_kv_head or model.n_head) / model.n_head / t
    send("all-gather", sizes.context, A * L * 2 * (passes - 1), kv)
    send("reduce-scatter", sizes.context, A * L * 2, kv)
    flops, computed = operations(config, sizes)
    state = cost.FLOAT * cost.n_params(model) // (f * t)
    shard = A * (cost.FLOAT * (kernels * L + 2 * table) / (f * t))
    return Step(
        sizes,
        chip,
        arguments=3 * state + TOKENS * (2 if V <= 2**16 else 4),
        temporaries=state + (width < cost.FLOAT) * width * state // cost.FLOAT + _working(config, sizes, width),
        flops=flops,
        computed=computed,
        updated=updated(config, sizes),
        collectives={key: (int(n), int(size)) for key, (n, size) in sorted(counts.items())},
        network=2 * shard / copies * (slices - 1) / slices,
        room=ROOM,
        precision=model.precision,
    )


def _bigram(config: Config, chip: Chip, sizes: Sizes) -> Step:
    """A step of a bigram: every chip has the whole table and four times the logits of its tokens at once, and the
    gradients of all are summed; tensor splits nothing."""
    model, train = config.model, config.train
    table = cost.FLOAT * cost.n_params(model)
    columns = math.ceil(model.vocab_size / LANES) * LANES if chip.torus else model.vocab_size
    copies = sizes.data * sizes.fsdp * sizes.context
    logits = cost.FLOAT * train.batch_size // train.accumulate * model.block_size * columns // copies
    sums = {("all-reduce", copies): (train.accumulate, train.accumulate * table)} if copies > 1 else {}
    return Step(
        sizes,
        chip,
        arguments=3 * table + TOKENS * (2 if model.vocab_size <= 2**16 else 4),
        temporaries=(2 if train.accumulate > 1 else 1) * table + 4 * logits,
        flops=0,
        computed=0,
        updated=updated(config, sizes),
        collectives=sums,
        room=ROOM,
        precision=model.precision,
    )


def _working(config: Config, sizes: Sizes, width: int) -> int:
    """Bytes beside the state, its gradient and its operands: what the backward pass needs of the forward
    pass, and the most that the head or a block takes while it runs."""
    model, t = config.model, sizes.tensor
    C, V, L = model.n_embd, model.vocab_size, model.n_layer
    tokens = _sequences(config, sizes) * model.block_size / sizes.context
    kernels = sum(k * n for k, n in cost.kernels(model).values())
    hidden = sum(n for _, n in cost.kernels(model).values()) / t
    inside = cost.FLOAT * 3 * C + 2 * width * hidden  # of a block and a token: inputs of norms, results of kernels
    saved = L * tokens * (cost.FLOAT * C if model.remat == "blocks" else inside)
    logits = tokens / _parts(config, sizes) * V / t
    head = (cost.FLOAT + width) * logits + (2 * cost.FLOAT + width) * V * C / t
    block = 2 * inside * tokens + (2 * width + cost.FLOAT) * kernels / t
    return int(saved + max(head, block))


def _sequences(config: Config, sizes: Sizes) -> float:
    """Of a chip in a micro-batch."""
    return config.train.batch_size / config.train.accumulate / (sizes.data * sizes.fsdp)


def _parts(config: Config, sizes: Sizes) -> int:
    """Into how many parts the loss goes, about (`loss.losses_of`)."""
    tokens = _sequences(config, sizes) * config.model.block_size / sizes.context
    return math.ceil(tokens * config.model.vocab_size / sizes.tensor / cost.LOGITS)
