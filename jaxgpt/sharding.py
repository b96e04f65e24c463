"""The device mesh of a run, and how arrays are sharded over it.

A mesh has four axes: `data` and `fsdp` shard the batch, `fsdp` also the parameters and their moments, `tensor` heads,
hidden channels and the vocabulary, `context` the tokens of a window. The compiler inserts the collectives. A run always
has a mesh; XLA compiles the same program for a mesh of one device as without one.

The functions of activations use the mesh in scope (`jax.set_mesh`); on one device they do nothing.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial, wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import UsageError

F = TypeVar("F", bound=Callable[..., Any])
AXES = ("data", "fsdp", "tensor", "context")
DIMENSIONS = {
    "batch": ("data", "fsdp"),  # sequences
    "time": ("context",),  # tokens of a sequence
    "width": ("tensor",),  # heads, hidden channels, V
    "channels": ("fsdp",),  # C, of parameters
}
"""Sharded dimension -> the axes that shard it."""
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Kernels are (in, out): split by columns if their outputs are sharded, by rows if their outputs are summed.
    (r"h(_\d+)?/(attn/(query|key|value)|mlp/(c_fc|c_gate))/kernel", ("fsdp", "tensor")),
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
"""(pattern of a parameter's path, axis that shards each dimension). Stacked blocks have one more dimension in front,
which is not sharded."""


class MeshError(UsageError):
    """A mesh needs more devices than there are, or does not divide a dimension of a config."""


@dataclass(frozen=True)
class Sizes:
    """Number of devices along each axis of a mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        """Parse "data=8,fsdp=4"; other axes have size 1.

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
        """The form that `parse` reads."""
        return ",".join(f"{name}={size}" for name, size in vars(self).items() if size > 1) or "data=1"


def make_mesh(sizes: Sizes, devices: Any = None) -> Mesh:
    """A mesh of the given devices, by default the first `sizes.devices`."""
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
    """The sharding of windows (K, B, T + 1) over the batch."""
    return NamedSharding(mesh, PartitionSpec(None, DIMENSIONS["batch"], None))


def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The sharding of a parameter, by its path, such as h_0/attn/query/kernel.

    Raises:
      MeshError: not exactly one rule matches, or the rule has another number of dimensions than `shape`.
    """
    found = [dims for pattern, dims in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise MeshError(f"parameter {path!r} {list(shape)}: expected exactly one rule for it, found {len(found)}")
    dims = (None,) * path.startswith("h/") + found[0]
    if len(dims) != len(shape):
        raise MeshError(f"parameter {path!r} {list(shape)}: its rule has {len(dims)} dimensions, {dims}")
    return PartitionSpec(*dims)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of each leaf of a train state, or of parameters. Moments are sharded like their parameters.

    Raises:
      MeshError: as in `spec`, or the mesh lacks an axis, or an axis does not divide a dimension.
    """
    if not set(AXES) <= set(mesh.axis_names):
        raise MeshError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}, expected {', '.join(AXES)}: use sharding.make_mesh"
        )
    params = state if isinstance(state, dict) else state.params
    shapes = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    specs = {name: spec(name, shape) for name, shape in shapes.items()}
    for name, dims in specs.items():
        for size, axis in zip(shapes[name], dims, strict=True):
            if axis and size % (n := mesh.shape[axis]):
                raise MeshError(f"{axis} = {n} does not divide dimension {size} of {name!r} {list(shapes[name])}")

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        suffixes = (_name(path[i:]) for i in range(len(path)))  # a moment's path ends with its parameter's
        found = (specs[name] for name in suffixes if shapes.get(name) == leaf.shape)
        return NamedSharding(mesh, next(found, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def platform() -> str:
    """The platform traced for, "cpu", "gpu" or "tpu": that of the mesh in scope, whose devices need not be attached, or
    the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def in_auto_mode(out: Callable[..., Any]) -> Callable[[F], F]:
    """Decorate a function of (config, *arrays) so that it also runs on a mesh of Explicit axes, the default of
    `jax.make_mesh`, where JAX asks for the sharding of most results: the compiler shards everything inside.

    Args:
      out: maps the arrays to the PartitionSpecs of the results.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def call(config: Any, *arrays: Any, **named: Any) -> Any:
            plain, axes = partial(function, config), jax.sharding.get_abstract_mesh().explicit_axes
            if not axes:
                return plain(*arrays, **named)
            spec = out(*arrays, **named)
            inside = jax.sharding.auto_axes(lambda arrays, named: plain(*arrays, **named), axes=axes, out_sharding=spec)
            return inside(arrays, named)  # it casts positional arguments only

        return cast(F, call)

    return decorate


def spec_of(x: jax.Array) -> PartitionSpec:
    """The sharding of an array, traced or not, over Explicit axes."""
    return jax.typeof(x).sharding.spec


def varying_alike(*arrays: jax.Array) -> Sequence[jax.Array]:
    """Arrays that meet in a `custom_vjp` or a loop in a user's `shard_map`, each marked as varying over every mesh axis
    over which any of them varies. So the gradient of a parameter that is equal on all devices is summed over them."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*varying) - own) for own in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True)]


def num_shards(dim: str) -> int:
    """Number of shards of a dimension in the current scope: 1 without a mesh, and inside `by_rows` for its axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _axes(dim))


def _axes(dim: str) -> tuple[str, ...]:
    """The axes over which the compiler shards a dimension: not those that `by_rows` maps over, nor a sweep's axis."""
    return tuple(axis for axis in DIMENSIONS[dim] if axis in jax.sharding.get_abstract_mesh().auto_axes)


def _is_sharded() -> bool:
    return any(num_shards(dim) > 1 for dim in DIMENSIONS)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Shard the dimensions of `x` by name. Those named None, or not divisible, are whole on every device: of 25 heads
    on two devices, each computes all."""
    return lax.with_sharding_constraint(x, _spec(x, dims)) if _is_sharded() else x


def _spec(x: jax.Array, dims: Sequence[str | None]) -> PartitionSpec:
    sizes = zip(dims, x.shape, strict=False)
    return PartitionSpec(*(_axes(dim) if dim and size % num_shards(dim) == 0 else None for dim, size in sizes))


def by_device(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Call `function`, of arrays (B, heads, ...), on each device with its shards: for kernels that the compiler cannot
    shard."""

    def call(*arrays: jax.Array) -> jax.Array:
        spec = _spec(arrays[0], ("batch", "width"))
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return call if _is_sharded() else function


ROWS = PartitionSpec(DIMENSIONS["batch"], DIMENSIONS["time"])


def splits_rows(kernel: jax.Array, targets: jax.Array) -> bool:
    """Whether `by_rows` gives each device its own tokens: the mesh has several devices and divides all dimensions."""
    return _is_sharded() and _is_even(targets) and _is_even(kernel, "channels", "width")


def by_rows(
    function: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, targets: jax.Array, dtype: Any
) -> jax.Array:
    """Call `function(x, kernel, targets)`, of features (B, T, C), a kernel (C, V) and targets (B, T) -> (B, T), on each
    device with its own tokens and all C rows of the kernel; the compiler shards V.

    The kernel is gathered once, in `dtype`. Its gradient is summed on each device, in the kernel's own dtype, before it
    is scattered. Otherwise a loop over chunks of tokens would gather and sum in every iteration.
    """
    if not splits_rows(kernel, targets):
        return function(x, kernel, targets)
    devices, width = DIMENSIONS["batch"] + DIMENSIONS["time"], DIMENSIONS["width"]

    def on_device(x: jax.Array, kernels: jax.Array, targets: jax.Array) -> jax.Array:
        return function(x, kernels[0], targets)

    own, whole = PartitionSpec(DIMENSIONS["channels"], width), PartitionSpec(devices, None, width)
    # Each device has its own kernel, and so its own gradient.
    kernels = jax.shard_map(partial(_gathered, dtype), in_specs=own, out_specs=whole, check_vma=False)(kernel)
    specs = (ROWS, PartitionSpec(devices), ROWS)
    call = jax.shard_map(on_device, in_specs=specs, out_specs=ROWS, axis_names=set(devices), check_vma=False)
    return jax.jit(call)(x, kernels, targets)


def _gather(dtype: Any, kernel: jax.Array) -> jax.Array:
    """A kernel (C, V) that is sharded along C, rounded to `dtype` and gathered: (1, C, V) on each device."""
    return lax.all_gather(kernel.astype(dtype), DIMENSIONS["channels"], tiled=True).astype(kernel.dtype)[None]


def _scattered(dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    if lax.axis_size(DIMENSIONS["channels"]) == 1:  # XLA for TPUs fails at a scatter to one device
        return (g[0],)
    own = lax.psum_scatter(g[0], DIMENSIONS["channels"], tiled=True)
    # Row-major: with the optimizer's column-major layout, XLA for TPUs would sum the whole kernel on every device.
    return (with_layout_constraint(own, Layout((0, 1))),)


_gathered = jax.custom_vjp(_gather, nondiff_argnums=(0,))
_gathered.defvjp(lambda dtype, kernel: (_gather(dtype, kernel), None), _scattered)


def lookup(table: jax.Array, idx: jax.Array) -> jax.Array:
    """Rows of a table (V, C) for ids (B, T) -> (B, T, C), NaN for ids >= V.

    If C is sharded, each device looks up its channels for the sequences of all devices along `fsdp`, which then
    exchange the results. That sends less than gathering the table and its gradient.
    """
    if num_shards("channels") == 1 or not _is_even(idx) or not _is_even(table, "width", "channels"):
        return rows(table, idx)
    V, over, width = len(table), DIMENSIONS["channels"], DIMENSIONS["width"]

    def on_device(table: jax.Array, idx: jax.Array) -> jax.Array:
        ids = lax.all_gather(idx.astype(jnp.int32), over, tiled=True)
        own = ids - lax.axis_index(width) * len(table)
        found = lax.psum(rows(table, jnp.where(own < 0, len(table), own), beyond=0), width)
        found = jnp.where((ids < V)[..., None], found, jnp.nan)
        return lax.all_to_all(found, over, split_axis=0, concat_axis=2, tiled=True)

    specs = (PartitionSpec(width, over), ROWS)
    return jax.shard_map(on_device, in_specs=specs, out_specs=ROWS, check_vma=False)(table, idx)


def rows(table: jax.Array, idx: jax.Array, beyond: float = jnp.nan) -> jax.Array:
    """Rows of a table (V, C) for ids (...) >= 0 -> (..., C), filled with `beyond` for ids >= V.

    The gradient sums over equal ids. The gradient of a plain gather does so on GPUs by atomic adds, in an order that
    differs from run to run. On one GPU, the backward pass therefore sorts the ids and sums in that order; plain `jvp`
    does not work there.
    """
    table, idx = varying_alike(table, idx.astype(jnp.int32))  # V may not fit into the ids' own dtype, such as uint8
    return (_take if platform() != "gpu" or _is_sharded() else _take_in_order)(table, idx, beyond)


def _take(table: jax.Array, idx: jax.Array, beyond: float) -> jax.Array:
    return jnp.take(table, idx, axis=0, mode="fill", fill_value=beyond)


def _take_backward(beyond: float, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, idx = saved
    order = jnp.argsort(idx.reshape(-1))
    ids, sums = idx.reshape(-1)[order], g.reshape(-1, table.shape[1])[order]
    differs, end = ids[1:] != ids[:-1], jnp.ones(1, bool)
    first, last = jnp.concatenate([end, differs]), jnp.concatenate([differs, end])

    def add(a: Any, b: Any) -> Any:  # a segmented sum: the last row of each id becomes the sum of its rows
        return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

    _, sums = lax.associative_scan(add, (first[:, None], sums))
    # All other rows go beyond the table, where they are dropped.
    once = jnp.where(last & (ids < len(table)), ids, len(table) + jnp.arange(ids.size))
    return jnp.zeros_like(table).at[once].set(sums, mode="drop", unique_indices=True), None


_take_in_order = jax.custom_vjp(_take, nondiff_argnums=(2,))
_take_in_order.defvjp(lambda table, idx, beyond: (_take(table, idx, beyond), (table, idx)), _take_backward)


def _is_even(x: jax.Array, *dims: str) -> bool:
    """Whether the dimensions of `x`, by default (B, T), divide evenly over the devices, unlike the one sequence that
    parameters are initialized with, and the mesh has all of AXES, unlike a user's."""
    if not set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return False
    return all(size % num_shards(dim) == 0 for size, dim in zip(x.shape, dims or ("batch", "time"), strict=True))
