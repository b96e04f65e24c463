"""How activations lie over the devices of a mesh: which of its axes splits which of their dimensions.

The mesh is the one in scope (`jax.set_mesh`); without one nothing here does anything.
"""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import PartitionSpec

AXES = {"batch": ("data", "fsdp"), "time": ("context",), "width": ("tensor",)}
"""The dimensions that are split, and the axes that split them: sequences, tokens, and heads or hidden channels or V."""


def platform() -> str:
    """What is traced for: "cpu", "gpu" or "tpu"; of a mesh, which need not be attached, what it is made of."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def parts(dim: str) -> int:
    """Into how many parts the mesh in scope splits a dimension, 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in AXES[dim])


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """`x` with its dimensions split as their names say; None is whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(*(AXES[dim] if dim else None for dim in dims)))


def by_device(function: Callable[..., jax.Array], *dims: str) -> Callable[..., jax.Array]:
    """`function` of arrays split along their first dimensions `dims`, called on each device with its part: for kernels
    that the compiler cannot split itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    spec = PartitionSpec(*(AXES[dim] for dim in dims))
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
