"""Muon: momentum whose update of a matrix is made orthogonal.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
"""

import itertools
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.matmul import Precision, matmul, transposed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that pushes singular values from (0, 1] to about one, from the same page."""


AT_ONCE = 3
"""Steps between two looks at X itself where it is long: rounding errors of bfloat16 grow over more (five diverge)."""


class MuonState(NamedTuple):
    """The momentum of each matrix."""

    momentum: optax.Updates  # as the parameters


def scale_by_muon(momentum: float, n_steps: int, precision: Precision) -> optax.GradientTransformation:
    """Gradients (..., K, N) to orthogonal matrices (K, N), by Nesterov momentum and `n_steps` Newton-Schulz steps.

    A matrix with more columns than rows is scaled up by the root of their ratio, so that each update changes outputs
    by about as much. Kernels are (in, out) here, and (out, in) on the page.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: optax.Updates, state: MuonState, params: Any = None) -> tuple[optax.Updates, MuonState]:
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mean, updates)
        leaves, tree = jax.tree.flatten(ahead)
        done = [x * max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5 for x in orthogonal_by_shape(leaves, n_steps, precision)]
        return jax.tree.unflatten(tree, done), MuonState(mean)

    return optax.GradientTransformation(init, update)


def orthogonal_by_shape(matrices: list[jax.Array], n_steps: int, precision: Precision) -> list[jax.Array]:
    """`orthogonal` of each matrix (K, N), or of each in a stack (n, K, N); those of one shape, turned to have no more
    rows than columns, are done together."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, x in enumerate(matrices):
        groups[tuple(sorted(x.shape[-2:]))].append(i)
    done: dict[int, jax.Array] = {}
    for (rows, columns), members in groups.items():
        tall = [matrices[i].shape[-2] > matrices[i].shape[-1] for i in members]
        wide = [matrices[i].mT if turn else matrices[i] for i, turn in zip(members, tall, strict=True)]
        stack = jnp.concatenate([x.reshape(-1, rows, columns) for x in wide])
        ends = list(itertools.accumulate(x.size // (rows * columns) for x in wide))[:-1]
        for i, turn, x in zip(members, tall, jnp.split(orthogonal(stack, n_steps, precision), ends), strict=True):
            done[i] = (x.mT if turn else x).reshape(matrices[i].shape)
    return [done[i] for i in range(len(matrices))]


def orthogonal(x: jax.Array, n_steps: int, precision: Precision) -> jax.Array:
    """(n, rows, columns) with rows <= columns to the nearest matrices with orthonormal rows, roughly: singular values
    come to lie between about 0.7 and 1.2.

    `n_steps` of X <- P X with P = a + b A + c A² and A = X Xᵀ, from X of norm one. Where X is long, some of the small
    P are multiplied with each other first (`_together`).
    """
    a, b, c = COEFFICIENTS

    product = partial(matmul, precision=precision)
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True)) + 1e-7)
    if x.shape[2] < 2 * x.shape[1]:
        for _ in range(n_steps):
            A = product(x, transposed(x))
            x = a * x + product(b * A + c * product(A, A), x)
        return x
    while n_steps > 0:
        x = _together(x, min(n_steps, AT_ONCE), product)
        n_steps -= AT_ONCE
    return x


def _together(x: jax.Array, n_steps: int, product: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """`n_steps` of X <- P X whose P are multiplied with each other first, and with X once."""
    a, b, c = COEFFICIENTS
    A, one = product(x, transposed(x)), jnp.eye(x.shape[1])[None]
    total = P = a * one + b * A + c * product(A, A)
    for _ in range(n_steps - 1):
        A = product(P, product(P, A))  # of P X, as P and A commute
        P = a * one + b * A + c * product(A, A)
        total = product(P, total)
    return product(total, x)
