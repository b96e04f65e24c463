"""One device to many: the mesh of a run, and which of its axes splits which dimension of each parameter.

Four axes: `data` and `fsdp` split the batch, `fsdp` also the parameters and their moments, `tensor` heads, hidden
channels and the vocabulary, `context` the tokens of a window. The compiler puts the collectives where these call for
them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt import cost, memory
from jaxgpt.config import Config, UsageError
from jaxgpt.memory import Parts
from jaxgpt.placement import ONE_DEVICE, OneDevice
from jaxgpt.step import init_state, train_steps

AXES = ("data", "fsdp", "tensor", "context")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # (in, out): by columns where the result is split, by rows where it is summed
    (r"h(_\d+)?/attn/(query|key|value)/kernel", ("fsdp", "tensor")),
    (r"h(_\d+)?/mlp/(c_fc|c_gate)/kernel", ("fsdp", "tensor")),
    (r"h(_\d+)?/(attn|mlp)/c_proj/kernel", ("tensor", "fsdp")),
    (r"h(_\d+)?/attn/(query|key|value)/bias", ("tensor",)),
    (r"h(_\d+)?/mlp/(c_fc|c_gate)/bias", ("tensor",)),
    (r"h(_\d+)?/(attn|mlp)/c_proj/bias", (None,)),
    (r"h(_\d+)?/attn/value_embed/embedding", (None, "tensor")),
    (r"(h(_\d+)?/ln_[12]|ln_f)/(scale|bias)", (None,)),
    (r"wte/embedding", ("tensor", "fsdp")),
    (r"(wpe|bigram)/embedding", (None, "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"smear", (None,)),
    (r"token_embedding_table/embedding", (None, None)),  # of the bigram
)
"""Path of a parameter, as a whole, to the axis that splits each of its dimensions. Stacked blocks have one dimension
more in front, which is not split."""


MOST_TENSOR = 8
"""Devices along `tensor`, for "auto": they sum activations four times a block."""
LEAST_CONTEXT = 256
"""Tokens of a context on a device, for "auto": with fewer, keys and values on their way outweigh the products."""


class MeshError(UsageError):
    """A mesh cannot be had, or does not divide what it is to split."""


@dataclass(frozen=True)
class Sizes:
    """How many devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        """ "data=8,fsdp=4" to sizes, 1 for axes that are not named.

        Raises:
          MeshError: it is none of that form.
        """
        sizes: dict[str, int] = {}
        for item in text.split(","):
            name, _, size = item.partition("=")
            if name not in AXES or name in sizes or not re.fullmatch("[1-9][0-9]*", size):
                raise MeshError(
                    f"--mesh {text}: expected auto, or sizes of {', '.join(AXES)} as in data=8,fsdp=4, found {item!r}"
                )
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor * self.context

    def __str__(self) -> str:
        """As `parse` takes it."""
        return ",".join(f"{name}={size}" for name in AXES if (size := getattr(self, name)) > 1) or "data=1"


def check(config: Config, sizes: Sizes) -> None:
    """Check that the mesh divides what it splits.

    Raises:
      MeshError: it does not, with `problems`.
    """
    if wrong := problems(config, sizes):
        raise MeshError(f"the mesh {sizes} does not fit:\n" + "\n".join(wrong))


def problems(config: Config, sizes: Sizes) -> list[str]:
    """Each dimension of a config, its vocabulary known, that the mesh does not divide, and what to change."""
    model, train = config.model, config.train
    found = []

    def divides(axis: str, n: int, size: int, what: str, option: str, each: int = 1) -> None:
        if size % n:
            found.append(f"  {axis} = {n} does not divide {size} {what}: try {option} {-(-size // n) * n * each}")

    micro, A = train.batch_size // train.accumulate, train.accumulate
    what = "sequences of a micro-batch (batch_size / accumulate)"
    divides("data x fsdp", sizes.data * sizes.fsdp, micro, what, "--batch-size", A)
    divides("context", sizes.context, model.block_size, "tokens of a context (block_size)", "--block-size")
    if model.kind == "gpt":
        divides("fsdp", sizes.fsdp, model.n_embd, "channels (n_embd)", "--n-embd")
        divides("tensor", sizes.tensor, model.n_embd, "channels (n_embd)", "--n-embd")
        if model.n_kv_head:
            divides("tensor", sizes.tensor, model.n_kv_head, "heads of keys and values (n_kv_head)", "--n-kv-head")
        divides("tensor", sizes.tensor, model.vocab_size, "tokens of the vocabulary (vocab_size)", "--vocab-size")
        if not found and cost.kernels(model)["c_fc"][1] % sizes.tensor:  # of SwiGLU; else four times the channels
            hidden = cost.kernels(model)["c_fc"][1]
            found.append(f"  tensor = {sizes.tensor} does not divide {hidden} hidden channels: try a divisor of it")
    return found


def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter, by its path with slashes, is split.

    Raises:
      MeshError: not exactly one rule names it, or with another number of dimensions.
    """
    found = [dims for pattern, dims in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise MeshError(f"parameter {path!r} {list(shape)}: expected exactly one rule for it, found {len(found)}")
    dims = (None,) * path.startswith("h/") + found[0]
    if len(dims) != len(shape):
        raise MeshError(f"parameter {path!r} {list(shape)}: its rule has {len(dims)} dimensions, {dims}")
    return PartitionSpec(*dims)


@dataclass(frozen=True)
class Placement:
    """Where everything of a run lies: parameters and moments split by the rules, the rest on every device."""

    sizes: Sizes
    devices: tuple[Any, ...]

    @property
    def parts(self) -> Parts:
        local = sum(device.process_index == jax.process_index() for device in self.devices)
        return Parts(self.sizes.fsdp * self.sizes.tensor, self.sizes.data * self.sizes.fsdp * self.sizes.context, local)

    @cached_property
    def mesh(self) -> Mesh:
        shape = tuple(getattr(self.sizes, name) for name in AXES)
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=self.devices)

    def steps(self, config: Config) -> Any:
        shardings = self.shardings(jax.eval_shape(init_state, config))
        jit = partial(jax.jit, static_argnums=0, donate_argnums=1, out_shardings=(shardings, self.everywhere))
        return jit(getattr(train_steps, "__wrapped__"))  # noqa: B009 (which its type does not know)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """The mesh is in scope for what is traced and called in the block, on this thread."""
        with jax.set_mesh(self.mesh):
            yield

    @property
    def everywhere(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def windows(self) -> NamedSharding:
        """Windows (K, B, T + 1) by their sequences."""
        return NamedSharding(self.mesh, PartitionSpec(None, ("data", "fsdp"), None))

    def shardings(self, state: Any) -> Any:
        """The sharding of each leaf of a train state, or of parameters: a moment lies as its parameter does.

        Raises:
          MeshError: as `spec`, or an axis does not divide a dimension.
        """
        params = state if isinstance(state, dict) else state.params
        shapes = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        specs = {name: spec(name, shape) for name, shape in shapes.items()}
        for name, one in specs.items():
            for size, axis in zip(shapes[name], one, strict=True):
                if axis and size % (n := getattr(self.sizes, axis)):
                    raise MeshError(f"{axis} = {n} does not divide dimension {size} of {name!r} {list(shapes[name])}")

        def lay(path: Any, leaf: Any) -> NamedSharding:
            own = next((n for i in range(len(path)) if shapes.get(n := _name(path[i:])) == leaf.shape), None)
            return NamedSharding(self.mesh, specs[own] if own else PartitionSpec())

        return jax.tree_util.tree_map_with_path(lay, state)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def choose(config: Config, devices: int, memory: int | None) -> tuple[Sizes, str]:
    """The mesh that "auto" is, and why, for so many devices alike with `memory` bytes each (None: unknown).

    Copies of the whole state (data) where it takes no more than half of a device, else split over as few as it takes
    (fsdp). Devices beyond the sequences of a micro-batch split heads and channels (tensor), or the context, up to
    MOST_TENSOR and LEAST_CONTEXT; else they stay idle. Fewer micro-batches would be better: the line says how many.
    """
    state = cost.FLOAT * 4 * cost.n_params(config.model)  # parameters, gradients, two moments
    over_batch = max(n for n in divisors(devices) if (config.train.batch_size // config.train.accumulate) % n == 0)
    rest = devices // over_batch
    fine = [n for n in divisors(over_batch) if not problems(config, Sizes(over_batch // n, n))]
    fsdp = next((n for n in fine if memory is None or state / n <= memory / 2), max(fine, default=1))
    why = f"parameters, gradients and moments take {state / 1e9:.2g} GB"
    why += f" of {memory / 1e9:.3g} GB a device" if memory else ""
    why += f", split over {fsdp} devices" if fsdp > 1 else ", whole on each device"
    if rest == 1:
        return Sizes(over_batch // fsdp, fsdp), why
    fewer = _accumulate(config, devices)
    better = f"; better, all {devices} take a part of the batch: --accumulate {fewer}" if fewer else ""
    sensible = {"tensor": rest <= MOST_TENSOR, "context": config.model.block_size >= LEAST_CONTEXT * rest}
    for axis in (axis for axis, yes in sensible.items() if yes):
        sizes = Sizes(over_batch // fsdp, fsdp, **{axis: rest})
        if config.model.n_head % sizes.tensor == 0 and not problems(config, sizes):
            return sizes, f"{why}; {over_batch} parts of the batch, so {axis} takes the other {rest}{better}"
    why += f"; {devices - over_batch} of {devices} devices stay idle, as only {over_batch} divide a micro-batch{better}"
    return Sizes(over_batch // fsdp, fsdp), why


def _accumulate(config: Config, devices: int) -> int | None:
    """The fewest micro-batches that divide among so many devices and give none more sequences than one micro-batch
    has now; None if there are none, or if that is what there is."""
    B, A = config.train.batch_size, config.train.accumulate
    found = (a for a in divisors(B) if (B // a) % devices == 0 and B // a // devices <= B // A)
    return next((a for a in found if a != A), None)


def divisors(n: int) -> list[int]:
    """All divisors of n, smallest first."""
    return [i for i in range(1, n + 1) if n % i == 0]


def place(config: Config, sizes: Sizes | None) -> tuple[OneDevice | Placement, str]:
    """Where to train a config, its vocabulary known, and a line that says so.

    Args:
      sizes: None to `choose`. Virtual devices of one CPU share its cores: then one of them is chosen.

    Raises:
      MeshError: there are fewer devices, or the mesh divides something not.
    """
    devices, why = jax.devices(), ""
    if sizes is None:
        shared = devices[0].platform == "cpu" and jax.process_count() == 1
        sizes, why = choose(config, 1 if shared else len(devices), capacity(jax.local_devices()[0]))
        if shared and len(devices) > 1:
            why = f"the {len(devices)} devices of one CPU share its cores; --mesh data={len(devices)} takes them all"
    check(config, sizes)
    if sizes.devices > len(devices):
        raise MeshError(
            f"the mesh {sizes} wants {sizes.devices} devices, and there are {len(devices)}: --mesh auto takes those"
        )
    if jax.process_count() > 1 and sizes.devices != len(devices):
        raise MeshError(
            f"the mesh {sizes} leaves {len(devices) - sizes.devices} of the {len(devices)} devices of "
            f"{jax.process_count()} processes out: every one has to take part; start fewer, or name a mesh of "
            f"{len(devices)} devices{f'; {why}' if why else ''}"
        )
    if sizes.devices == 1:
        told, why = f"on {devices[0].device_kind}", why if len(devices) > 1 else ""
        return ONE_DEVICE, f"{told}: {why}" if why else told
    told = f"on {sizes.devices} of {len(devices)} x {devices[0].device_kind} as {sizes}"
    return Placement(sizes, tuple(devices[: sizes.devices])), f"{told}: {why}" if why else told


def require_room(config: Config, sizes: Sizes | None) -> None:
    """Check that `place` succeeds and that a step fits there, for a config whose vocabulary may still be unknown.

    Raises:
      MeshError, OutOfMemoryError: it does not.
    """
    placement, _ = place(config, sizes)
    memory.require(config, parts=placement.parts)


def capacity(device: Any) -> int | None:
    """Bytes of memory of a device, None where it does not say."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")
