"""The loss around a point in the space of parameters: along a line, and in a plane."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.diagnostics.losses import Loss


def moved(params: Any, direction: Any, distance: jax.Array | float) -> Any:
    """`params + distance * direction`, leaf by leaf."""
    return jax.tree.map(lambda p, d: p + distance * d, params, direction)


def filter_normalised(params: Any, key: jax.Array) -> Any:
    """A random direction that moves each filter in proportion to its own size (Li et al. 2018, "Visualizing the loss
    landscape of neural nets", arXiv:1712.09913): a step of 1 is as long as the filter.

    A filter is a column of a kernel (..., K, N), all that makes one output, or a row of an embedding, one token's
    vector. Biases and the scales of norms stay, as there. So landscapes of models whose weights differ in size can be
    compared.
    """
    leaves, shape = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))

    def one(key: jax.Array, path: tuple[Any, ...], p: jax.Array) -> jax.Array:
        axis = {"kernel": -2, "embedding": -1}.get(path[-1].key)
        if axis is None:
            return jnp.zeros_like(p)
        d = jax.random.normal(key, p.shape, p.dtype)
        sizes = (jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (p, d))
        return d * (next(sizes) / next(sizes))

    return jax.tree.unflatten(shape, [one(key, path, p) for key, (path, p) in zip(keys, leaves, strict=True)])


def along(loss: Loss, params: Any, batch: Any, direction: Any, distances: jax.Array) -> jax.Array:
    """The loss at `params + distance * direction` for each of the distances (N,) -> (N,).

    With the difference of two sets of parameters as the direction, 0 is the one and 1 the other (Goodfellow et al.
    2015, arXiv:1412.6544).
    """
    return jax.lax.map(lambda distance: loss(moved(params, direction, distance), batch), distances)


def plane(loss: Loss, params: Any, batch: Any, first: Any, second: Any, xs: jax.Array, ys: jax.Array) -> jax.Array:
    """The loss at `params + x * first + y * second`: (X,) and (Y,) distances -> (Y, X)."""
    return jax.lax.map(lambda y: along(loss, moved(params, second, y), batch, first, xs), ys)
