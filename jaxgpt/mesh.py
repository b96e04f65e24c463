"""The device mesh of a run, of one device or many, and which of its axes shards which dimension of each parameter.

Four axes: `data` and `fsdp` shard the batch, `fsdp` also the parameters and their moments, `tensor` heads, hidden
channels and the vocabulary, `context` the tokens of a window. The compiler inserts the collectives.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt import cost
from jaxgpt.config import Config, UsageError

AXES = ("data", "fsdp", "tensor", "context")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # (in, out): by columns where the result is sharded, by rows where it is summed
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
"""Pattern of a parameter's whole path, and the axis that shards each dimension. Stacked blocks have one more dimension
in front, which is not sharded."""

MAX_TENSOR = 8
"""Most devices along `tensor` that "auto" picks: they all-reduce activations four times per block."""
MIN_CONTEXT = 256
"""Fewest tokens per device along `context` that "auto" picks: below, sending keys and values outweighs the matmuls."""


class MeshError(UsageError):
    """A mesh needs more devices than there are, or does not divide the dimensions of a config."""


class Shards(NamedTuple):
    """Into how many shards a mesh splits the train state and the batch."""

    state: int = 1
    batch: int = 1
    per_host: int = 1
    """Devices of this process. On CPUs they share its memory."""


@dataclass(frozen=True)
class Sizes:
    """Number of devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        """Read "data=8,fsdp=4"; axes that are not named have size 1.

        Raises:
          MeshError: `text` does not have that form.
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
        """In the form that `parse` reads."""
        return ",".join(f"{name}={size}" for name in AXES if (size := getattr(self, name)) > 1) or "data=1"


def check(config: Config, sizes: Sizes) -> None:
    """Raise a MeshError with all `problems`, if there are any."""
    if wrong := problems(config, sizes):
        raise MeshError(f"the mesh {sizes} does not fit:\n" + "\n".join(wrong))


def problems(config: Config, sizes: Sizes) -> list[str]:
    """Each dimension of a config that is not divisible by its axis of the mesh, and which option to change.

    The vocab_size of `config` must be known.
    """
    model, train = config.model, config.train
    found = []

    def divides(axis: str, n: int, size: int, what: str, option: str, each: int = 1) -> None:
        if size % n:
            found.append(f"  {axis} = {n} does not divide {size} {what}: try {option} {-(-size // n) * n * each}")

    micro, A = train.batch_size // train.accumulate, train.accumulate
    what = "sequences per micro-batch (batch_size / accumulate)"
    divides("data x fsdp", sizes.data * sizes.fsdp, micro, what, "--batch-size", A)
    divides("context", sizes.context, model.block_size, "tokens of a context (block_size)", "--block-size")
    if model.kind == "gpt":
        divides("fsdp", sizes.fsdp, model.n_embd, "channels (n_embd)", "--n-embd")
        divides("tensor", sizes.tensor, model.n_embd, "channels (n_embd)", "--n-embd")
        if model.n_kv_head:
            divides("tensor", sizes.tensor, model.n_kv_head, "KV heads (n_kv_head)", "--n-kv-head")
        divides("tensor", sizes.tensor, model.vocab_size, "tokens of the vocabulary (vocab_size)", "--vocab-size")
        if not found and cost.kernels(model)["c_fc"][1] % sizes.tensor:  # of SwiGLU; else four times the channels
            hidden = cost.kernels(model)["c_fc"][1]
            found.append(f"  tensor = {sizes.tensor} does not divide {hidden} hidden channels: try a divisor of it")
    return found


def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter is sharded; `path` joins its keys with slashes.

    Raises:
      MeshError: not exactly one rule matches, or the rule has another number of dimensions.
    """
    found = [dims for pattern, dims in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise MeshError(f"parameter {path!r} {list(shape)}: expected exactly one rule for it, found {len(found)}")
    dims = (None,) * path.startswith("h/") + found[0]
    if len(dims) != len(shape):
        raise MeshError(f"parameter {path!r} {list(shape)}: its rule has {len(dims)} dimensions, {dims}")
    return PartitionSpec(*dims)


def make_mesh(sizes: Sizes, devices: Any = None) -> Mesh:
    """A mesh of the given devices, by default of the first ones there are."""
    shape = tuple(getattr(sizes, name) for name in AXES)
    devices = tuple(devices or jax.devices()[: sizes.devices])
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@cache
def one_device() -> Mesh:
    """The mesh of this process's first device. XLA compiles the same program for it as without a mesh."""
    return make_mesh(Sizes(), jax.local_devices()[:1])


def num_shards(mesh: Mesh) -> Shards:
    """How many shards a mesh makes of the train state and the batch."""
    n = mesh.shape
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    return Shards(n["fsdp"] * n["tensor"], n["data"] * n["fsdp"] * n["context"], local)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def window_sharding(mesh: Mesh) -> NamedSharding:
    """Of windows (K, B, T + 1): each device has the sequences of its share of the batch."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), None))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of each leaf of a train state, or of parameters: a moment is sharded as its parameter is.

    Raises:
      MeshError: as `spec`, or a dimension is not divisible by its axis.
    """
    params = state if isinstance(state, dict) else state.params
    shapes = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    specs = {name: spec(name, shape) for name, shape in shapes.items()}
    for name, dims in specs.items():
        for size, axis in zip(shapes[name], dims, strict=True):
            if axis and size % (n := mesh.shape[axis]):
                raise MeshError(f"{axis} = {n} does not divide dimension {size} of {name!r} {list(shapes[name])}")

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = (_name(path[i:]) for i in range(len(path)))  # the end of a moment's path is that of its parameter
        of = next((name for name in names if shapes.get(name) == leaf.shape), None)
        return NamedSharding(mesh, specs[of] if of else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def choose(config: Config, devices: int, memory: int | None) -> tuple[Sizes, str]:
    """The mesh of "auto" and the reason for it, for `devices` equal devices with `memory` bytes each (None: unknown).

    The state is replicated (data) where it takes at most half of a device's memory, else sharded over as few devices as
    that takes (fsdp). Devices beyond the sequences of a micro-batch go to `tensor` or `context`, within MAX_TENSOR and
    MIN_CONTEXT; else they stay idle, and the reason names a better number of micro-batches.
    """
    state = cost.FLOAT * 4 * cost.n_params(config.model)  # parameters, gradients, two moments
    micro_batch = config.train.batch_size // config.train.accumulate
    over_batch = max(n for n in divisors(devices) if micro_batch % n == 0)
    rest = devices // over_batch
    valid = [n for n in divisors(over_batch) if not problems(config, Sizes(over_batch // n, n))]
    fsdp = next((n for n in valid if memory is None or state / n <= memory / 2), max(valid, default=1))
    why = f"parameters, gradients and moments take {state / 1e9:.2g} GB"
    why += f" of {memory / 1e9:.3g} GB a device" if memory else ""
    why += f", split over {fsdp} devices" if fsdp > 1 else ", whole on each device"
    if rest == 1:
        return Sizes(over_batch // fsdp, fsdp), why
    better = _better_accumulate(config, devices)
    hint = f"; better, all {devices} share the batch: --accumulate {better}" if better else ""
    sensible = {"tensor": rest <= MAX_TENSOR, "context": config.model.block_size >= MIN_CONTEXT * rest}
    for axis in (axis for axis, yes in sensible.items() if yes):
        sizes = Sizes(over_batch // fsdp, fsdp, **{axis: rest})
        if config.model.n_head % sizes.tensor == 0 and not problems(config, sizes):
            return sizes, f"{why}; {over_batch} shards of the batch, so {axis} takes the other {rest}{hint}"
    why += f"; {devices - over_batch} of {devices} devices stay idle, as only {over_batch} divide a micro-batch{hint}"
    return Sizes(over_batch // fsdp, fsdp), why


def _better_accumulate(config: Config, devices: int) -> int | None:
    """The fewest micro-batches divisible by `devices`, with no more sequences per device than a micro-batch has now;
    None if there are none, or if that is the current setting."""
    B, A = config.train.batch_size, config.train.accumulate
    found = (a for a in divisors(B) if (B // a) % devices == 0 and B // a // devices <= B // A)
    return next((a for a in found if a != A), None)


def divisors(n: int) -> list[int]:
    """All divisors of n, smallest first."""
    return [i for i in range(1, n + 1) if n % i == 0]


def mesh_for(config: Config, sizes: Sizes | None) -> tuple[Mesh, str]:
    """The mesh to train a config on, its vocab_size known, and a line that describes it.

    Args:
      sizes: None for the mesh that `choose` picks. One device on a CPU, whose virtual devices share its cores.

    Raises:
      MeshError: there are fewer devices, or a dimension is not divisible.
    """
    devices, why = jax.devices(), ""
    if sizes is None:
        one_cpu = devices[0].platform == "cpu" and jax.process_count() == 1
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        sizes, why = choose(config, 1 if one_cpu else len(devices), memory)
        if one_cpu and len(devices) > 1:
            why = f"the {len(devices)} devices of one CPU share its cores; --mesh data={len(devices)} takes them all"
    check(config, sizes)
    if sizes.devices > len(devices):
        raise MeshError(
            f"the mesh {sizes} needs {sizes.devices} devices, and there are {len(devices)}: --mesh auto takes those"
        )
    if jax.process_count() > 1 and sizes.devices != len(devices):
        raise MeshError(
            f"the mesh {sizes} leaves {len(devices) - sizes.devices} of the {len(devices)} devices of "
            f"{jax.process_count()} processes out, but every process must take part: start fewer, or name a mesh of "
            f"{len(devices)} devices{f'; {why}' if why else ''}"
        )
    if sizes.devices == 1:
        line, why = f"on {devices[0].device_kind}", why if len(devices) > 1 else ""
    else:
        line = f"on {sizes.devices} of {len(devices)} x {devices[0].device_kind} as {sizes}"
    return make_mesh(sizes), f"{line}: {why}" if why else line
