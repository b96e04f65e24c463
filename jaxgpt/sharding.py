"""How activations lie over the devices of a mesh: which of its axes splits which of their dimensions.

The mesh is the one in scope (`jax.set_mesh`); without one of these axes nothing here does anything.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

AXES = {
    "batch": ("data", "fsdp"),  # sequences
    "time": ("context",),  # tokens of a sequence
    "width": ("tensor",),  # heads, hidden channels, V
    "channels": ("fsdp",),  # C, of parameters
}
"""The dimensions that are split, and the axes that split them."""


def platform() -> str:
    """What is traced for: "cpu", "gpu" or "tpu"; of a mesh, which need not be attached, what it is made of."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def _splits() -> bool:
    """Whether the compiler splits anything here: the mesh in scope has one of these axes, and that of a sweep none."""
    axes, sizes = jax.sharding.get_abstract_mesh().auto_axes, jax.sharding.get_abstract_mesh().shape
    return any(axis in axes and sizes[axis] > 1 for names in AXES.values() for axis in names)


def parts(dim: str) -> int:
    """Into how many parts the mesh in scope splits a dimension: 1 without a mesh, and in `by_rows` for its axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _axes(dim))


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """`x` with its dimensions split as their names say. None is whole on every device, and so is what does not divide,
    such as 25 heads over two devices, each of which then attends with all of them."""
    if not _splits():
        return x
    return lax.with_sharding_constraint(x, _spec(x, dims))


def _spec(x: jax.Array, dims: Sequence[str | None]) -> PartitionSpec:
    sizes = zip(dims, x.shape, strict=False)
    return PartitionSpec(*(_axes(dim) if dim and size % parts(dim) == 0 else None for dim, size in sizes))


def _axes(dim: str) -> tuple[str, ...]:
    """The axes that the compiler splits a dimension over, here."""
    return tuple(axis for axis in AXES[dim] if axis in jax.sharding.get_abstract_mesh().auto_axes)


def by_device(function: Callable[..., jax.Array], *dims: str) -> Callable[..., jax.Array]:
    """`function` of arrays split along their first dimensions `dims`, called on each device with its part: for kernels
    that the compiler cannot split itself."""
    if not _splits():
        return function

    def call(*arrays: jax.Array) -> jax.Array:
        spec = _spec(arrays[0], dims)
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return call


ROWS = PartitionSpec(AXES["batch"], AXES["time"])
KERNEL = PartitionSpec(AXES["channels"], AXES["width"])


def by_rows(
    function: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, targets: jax.Array, dtype: Any
) -> jax.Array:
    """`function(x, kernel, targets)` of features (B, T, C), a kernel (C, V) and targets (B, T) -> (B, T), called on
    each device with its rows and all rows of the kernel; the compiler splits V.

    The kernel is gathered once, in `dtype`, and its gradient added up on each device before it is scattered, in the
    kernel's own type. Of a loop over rows the compiler would make a gather and a sum at each turn.
    """
    if not _splits() or not _even(targets):
        return function(x, kernel, targets)
    devices = AXES["batch"] + AXES["time"]

    def mine(x: jax.Array, kernels: jax.Array, targets: jax.Array) -> jax.Array:
        return function(x, kernels[0], targets)

    whole = PartitionSpec(devices, None, AXES["width"])  # a kernel for each device, and so a gradient
    kernels = jax.shard_map(partial(gathered, dtype), in_specs=KERNEL, out_specs=whole, check_vma=False)(kernel)
    specs = (ROWS, PartitionSpec(devices), ROWS)
    call = jax.shard_map(mine, in_specs=specs, out_specs=ROWS, axis_names=set(devices), check_vma=False)
    return call(x, kernels, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered(dtype: Any, kernel: jax.Array) -> jax.Array:
    """The whole of a kernel (C, V), of whose rows each device along "channels" has a part, rounded to `dtype`: (1,
    C, V) on each device."""
    return lax.all_gather(kernel.astype(dtype), AXES["channels"], tiled=True).astype(kernel.dtype)[None]


def _scattered(dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    if lax.axis_size(AXES["channels"]) == 1:  # the compiler for TPUs fails at a scatter to one
        return (g[0],)
    own = lax.psum_scatter(g[0], AXES["channels"], tiled=True)
    # Row after row: where the optimizer likes columns, the compiler for TPUs would sum the whole on every device.
    return (with_layout_constraint(own, Layout((0, 1))),)


gathered.defvjp(lambda dtype, kernel: (gathered(dtype, kernel), None), _scattered)


def lookup(table: jax.Array, idx: jax.Array) -> jax.Array:
    """Rows of a table (V, C) for ids (B, T) -> (B, T, C).

    Where C is split, each device looks its channels up for the sequences of all that share them, and they exchange:
    less is sent than tables and their gradients are large.
    """
    if parts("channels") == 1 or not _even(idx):
        return rows(table, idx)
    over = AXES["channels"]

    def mine(table: jax.Array, idx: jax.Array) -> jax.Array:
        places = lax.all_gather(idx, over, tiled=True) - lax.axis_index(AXES["width"]) * table.shape[0]
        found = lax.psum(rows(table, jnp.where(places < 0, len(table), places), beyond=0), AXES["width"])
        return lax.all_to_all(found, over, split_axis=0, concat_axis=2, tiled=True)

    spec = PartitionSpec(AXES["width"], over)
    return jax.shard_map(mine, in_specs=(spec, ROWS), out_specs=ROWS, check_vma=False)(table, idx)


def rows(table: jax.Array, idx: jax.Array, beyond: float = jnp.nan) -> jax.Array:
    """Rows of a table (V, C) for ids (...) from 0 on -> (..., C), filled with `beyond` for ids from V on.

    Its gradient adds up the rows of equal ids. On a GPU that of a plain gather does so by atomic operations, in the
    order in which they come, and two runs of one program differ. On one GPU the ids are therefore sorted, each row is
    fetched once and handed on to its equals, and going back all is added in that order.
    """
    if platform() != "gpu" or _splits():
        return jnp.take(table, idx, axis=0, mode="fill", fill_value=beyond)
    order = jnp.argsort(idx.reshape(-1))
    ids, places = idx.reshape(-1)[order], jnp.arange(idx.size)
    first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    once = jnp.where(first, ids, len(table) + places)  # the others are beyond the table
    found = table.at[once].get(mode="fill", fill_value=beyond, unique_indices=True)
    _, found = lax.associative_scan(_handed_on, (first[:, None], found))
    back = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
    return found.at[back].get(unique_indices=True).reshape(*idx.shape, -1)


def _handed_on(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(whether a row of its own is among those so far, the last such row), of two stretches one after the other."""
    return a[0] | b[0], jnp.where(b[0], b[1], a[1])


def _even(x: jax.Array) -> bool:
    """Whether every device has as many rows of (B, T): not of the one sequence that parameters are initialised with."""
    return all(size % parts(dim) == 0 for size, dim in zip(x.shape, ("batch", "time"), strict=True))
