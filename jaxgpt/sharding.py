"""The device mesh of a run and how arrays are sharded over it.

A mesh has four axes: `data` and `fsdp` shard the batch, `fsdp` also the parameters and their moments, `tensor` heads,
hidden channels and the vocabulary, `context` the tokens of a window. The compiler inserts the collectives. A run always
has a mesh; XLA compiles the same program for a mesh of one device as without one.

Functions of activations use the mesh in scope (`jax.set_mesh`) and do nothing where it has one device.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import UsageError

AXES = ("data", "fsdp", "tensor", "context")
DIMENSIONS = {
    "batch": ("data", "fsdp"),  # sequences
    "time": ("context",),  # tokens of a sequence
    "width": ("tensor",),  # heads, hidden channels, V
    "channels": ("fsdp",),  # C, of parameters
}
"""The dimensions that are sharded, and the axes that shard them."""
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # (in, out): by columns where the result is sharded, by rows where it is summed
    (r"h(_\d+)?/attn/(query|key|value)/kernel", ("fsdp", "tensor")),
    (r"h(_\d+)?/mlp/(c_fc|c_gate)/kernel", ("fsdp", "tensor")),
    (r"h(_\d+)?/(attn|mlp)/c_proj/kernel", ("tensor", "fsdp")),
    (r"h(_\d+)?/(attn/(query|key|value)|mlp/(c_fc|c_gate))/bias", ("tensor",)),
    (r"h(_\d+)?/(attn|mlp)/c_proj/bias", (None,)),
    (r"(h(_\d+)?/ln_[12]|ln_f)/(scale|bias)", (None,)),
    (r"wte/embedding", ("tensor", "fsdp")),
    (r"(wpe|bigram)/embedding", (None, "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"smear", (None,)),
    (r"token_embedding_table/embedding", (None, None)),  # of the bigram
)
"""Pattern of a parameter's whole path, and the axis that shards each dimension. Stacked blocks have one more dimension
in front, which is not sharded."""


class MeshError(UsageError):
    """A mesh needs more devices than there are, or does not divide the dimensions of a config."""


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
        return math.prod(astuple(self))

    def __str__(self) -> str:
        """In the form that `parse` reads."""
        return ",".join(f"{name}={size}" for name in AXES if (size := getattr(self, name)) > 1) or "data=1"


def make_mesh(sizes: Sizes, devices: Any = None) -> Mesh:
    """A mesh of the given devices, by default of the first ones there are."""
    devices = tuple(devices or jax.devices()[: sizes.devices])
    return jax.make_mesh(astuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@cache
def one_device() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh(Sizes(), jax.local_devices()[:1])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def window_sharding(mesh: Mesh) -> NamedSharding:
    """Of windows (K, B, T + 1): each device has the sequences of its share of the batch."""
    return NamedSharding(mesh, PartitionSpec(None, DIMENSIONS["batch"], None))


def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter is sharded, by its path, such as h_0/attn/query/kernel.

    Raises:
      MeshError: not exactly one rule is for it, or its shape is another than the rule expects.
    """
    found = [dims for pattern, dims in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise MeshError(f"parameter {path!r} {list(shape)}: expected exactly one rule for it, found {len(found)}")
    dims = (None,) * path.startswith("h/") + found[0]
    if len(dims) != len(shape):
        raise MeshError(f"parameter {path!r} {list(shape)}: its rule has {len(dims)} dimensions, {dims}")
    return PartitionSpec(*dims)


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


def platform() -> str:
    """What is traced for: "cpu", "gpu" or "tpu"; of a mesh, which need not be attached, what it is made of."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def num_shards(dim: str) -> int:
    """How many shards the compiler makes of a dimension here: 1 without a mesh, and in `by_rows` for its axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _axes(dim))


def _axes(dim: str) -> tuple[str, ...]:
    """The axes over which the compiler shards a dimension here: none of them in `by_rows`, or in a sweep's mesh."""
    return tuple(axis for axis in DIMENSIONS[dim] if axis in jax.sharding.get_abstract_mesh().auto_axes)


def _is_sharded() -> bool:
    return any(num_shards(dim) > 1 for dim in DIMENSIONS)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """`x` with its dimensions sharded by name. None is whole on every device, and so is what is not divisible, such as
    25 heads over two devices, each of which then attends with all of them."""
    return lax.with_sharding_constraint(x, _spec(x, dims)) if _is_sharded() else x


def _spec(x: jax.Array, dims: Sequence[str | None]) -> PartitionSpec:
    sizes = zip(dims, x.shape, strict=False)
    return PartitionSpec(*(_axes(dim) if dim and size % num_shards(dim) == 0 else None for dim, size in sizes))


def by_device(function: Callable[..., jax.Array], *dims: str) -> Callable[..., jax.Array]:
    """`function` of arrays whose first dimensions are `dims`, called on each device with its shard: for kernels that
    the compiler cannot shard itself."""

    def call(*arrays: jax.Array) -> jax.Array:
        spec = _spec(arrays[0], dims)
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return call if _is_sharded() else function


ROWS = PartitionSpec(DIMENSIONS["batch"], DIMENSIONS["time"])
KERNEL = PartitionSpec(DIMENSIONS["channels"], DIMENSIONS["width"])


def by_rows(
    function: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, targets: jax.Array, dtype: Any
) -> jax.Array:
    """`function(x, kernel, targets)` of features (B, T, C), a kernel (C, V) and targets (B, T) -> (B, T), called on
    each device with its rows and all rows of the kernel; the compiler shards V.

    The kernel is gathered once, in `dtype`, and its gradient is summed on each device before it is scattered, in the
    kernel's own type. In a loop over rows the compiler would gather and sum at each turn.
    """
    if not _is_sharded() or not _is_even(targets):
        return function(x, kernel, targets)
    devices = DIMENSIONS["batch"] + DIMENSIONS["time"]

    def on_device(x: jax.Array, kernels: jax.Array, targets: jax.Array) -> jax.Array:
        return function(x, kernels[0], targets)

    whole = PartitionSpec(devices, None, DIMENSIONS["width"])  # a kernel for each device, and so a gradient
    kernels = jax.shard_map(partial(_gathered, dtype), in_specs=KERNEL, out_specs=whole, check_vma=False)(kernel)
    specs = (ROWS, PartitionSpec(devices), ROWS)
    call = jax.shard_map(on_device, in_specs=specs, out_specs=ROWS, axis_names=set(devices), check_vma=False)
    return call(x, kernels, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(dtype: Any, kernel: jax.Array) -> jax.Array:
    """The whole of a kernel (C, V), sharded along C, rounded to `dtype`: (1, C, V) on each device."""
    return lax.all_gather(kernel.astype(dtype), DIMENSIONS["channels"], tiled=True).astype(kernel.dtype)[None]


def _scattered(dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    if lax.axis_size(DIMENSIONS["channels"]) == 1:  # the compiler for TPUs fails at a scatter to one
        return (g[0],)
    own = lax.psum_scatter(g[0], DIMENSIONS["channels"], tiled=True)
    # Row-major: in the column-major layout of the optimizer, the compiler for TPUs would sum the whole on every device.
    return (with_layout_constraint(own, Layout((0, 1))),)


_gathered.defvjp(lambda dtype, kernel: (_gathered(dtype, kernel), None), _scattered)


def lookup(table: jax.Array, idx: jax.Array) -> jax.Array:
    """Rows of a table (V, C) for ids (B, T) -> (B, T, C).

    Where C is sharded, each device looks its channels up for the sequences of all devices that share them, and they
    exchange the results: that sends less than gathering the table and its gradient.
    """
    if num_shards("channels") == 1 or not _is_even(idx):
        return rows(table, idx)
    over, width = DIMENSIONS["channels"], DIMENSIONS["width"]

    def on_device(table: jax.Array, idx: jax.Array) -> jax.Array:
        own = lax.all_gather(idx, over, tiled=True) - lax.axis_index(width) * table.shape[0]
        found = lax.psum(rows(table, jnp.where(own < 0, len(table), own), beyond=0), width)
        return lax.all_to_all(found, over, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(on_device, in_specs=(PartitionSpec(width, over), ROWS), out_specs=ROWS, check_vma=False)(
        table, idx
    )


def rows(table: jax.Array, idx: jax.Array, beyond: float = jnp.nan) -> jax.Array:
    """Rows of a table (V, C) for ids (...) from 0 on -> (..., C), filled with `beyond` for ids from V on.

    Its gradient sums the rows of equal ids. On a GPU a plain gather's gradient does so by atomic adds, in an order that
    differs between two runs of one program. On one GPU the backward pass therefore sorts the ids and sums in that order
    (and a plain `jvp` does not work there).
    """
    if platform() != "gpu" or _is_sharded():
        return jnp.take(table, idx, axis=0, mode="fill", fill_value=beyond)
    return _rows_summed_in_order(table, idx, beyond)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_summed_in_order(table: jax.Array, idx: jax.Array, beyond: float) -> jax.Array:
    return _rows_forward(table, idx, beyond)[0]


def _rows_forward(table: jax.Array, idx: jax.Array, beyond: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.take(table, idx, axis=0, mode="fill", fill_value=beyond), (table, idx)


def _rows_backward(beyond: float, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, idx = saved
    order = jnp.argsort(idx.reshape(-1))
    ids, sums = idx.reshape(-1)[order], g.reshape(-1, table.shape[1])[order]
    differs, end = ids[1:] != ids[:-1], jnp.ones(1, bool)
    first, last = jnp.concatenate([end, differs]), jnp.concatenate([differs, end])
    # Of the rows of each id, the last one becomes the sum of all.
    _, sums = lax.associative_scan(
        lambda a, b: (a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])), (first[:, None], sums)
    )
    once = jnp.where(
        last & (ids < len(table)), ids, len(table) + jnp.arange(ids.size)
    )  # the others are beyond the table
    return jnp.zeros_like(table).at[once].set(sums, mode="drop", unique_indices=True), None


_rows_summed_in_order.defvjp(_rows_forward, _rows_backward)


def _is_even(x: jax.Array) -> bool:
    """Whether (B, T) divides evenly over the devices: not the one sequence that parameters are initialised with."""
    return all(size % num_shards(dim) == 0 for size, dim in zip(x.shape, ("batch", "time"), strict=True))
