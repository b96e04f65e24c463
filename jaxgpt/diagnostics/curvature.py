"""The Hessian of the loss without ever making it: its products with vectors tell its spectrum and its trace."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

from jaxgpt.diagnostics.losses import Loss


def hvp(loss: Loss, params: Any, batch: Any, v: Any) -> Any:
    """The Hessian of the loss times `v`, a tree like `params`: the forward derivative along v of the gradient.

    Costs about two gradients (Pearlmutter 1994, "Fast exact multiplication by the Hessian").
    """
    return jax.jvp(lambda params: jax.grad(loss)(params, batch), (params,), (v,))[1]


class Lanczos(NamedTuple):
    """What K steps know of a symmetric (P, P) matrix. Its eigenvalues below are Ritz values, from least to greatest;
    those at the ends of the spectrum are the first to be right."""

    values: jax.Array  # (K,)
    weights: jax.Array  # (K,) the share of the start vector along each; they sum to 1
    errors: jax.Array  # (K,) an eigenvalue lies within this of each (at least what rounding moves it) that has a weight
    top: jax.Array  # (P,) the unit vector of the greatest


def lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> Lanczos:
    """The Lanczos iteration with full reorthogonalisation (Golub and Van Loan, "Matrix computations", 10.1 to 10.3).

    Args:
      product: (P,) -> (P,), with the symmetric matrix.
      start: (P,), not zero.
      steps: K, up to P. K vectors of P floats are held.
    """
    P, K = start.size, min(steps, start.size)
    dot = partial(jnp.dot, precision="highest")

    def step(carry: Any, k: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        basis, q, first, size = carry
        basis = basis.at[k].set(q)
        w = product(q)
        along = dot(q, w)
        for _ in range(2):  # once leaves what rounding brought back
            w = w - dot(basis.T, dot(basis, w))
        length = jnp.linalg.norm(w)
        alive = (q @ q) > 0
        first = jnp.where(k == 0, along, first)
        size = jnp.maximum(size, jnp.where(alive, jnp.abs(along) + length, 0))
        more = length > 1e-5 * size  # else all that the start vector reaches is spanned
        # Steps after that repeat the first quotient: it lies within the spectrum, so the ends stay what they are.
        diagonal = jnp.where(alive, along, first)
        length = jnp.where(more, length, 0)
        q = jnp.where(more, w / jnp.where(more, length, 1), 0)
        return (basis, q, first, size), (diagonal, length)

    zero = jnp.zeros((), start.dtype)
    begin = (jnp.zeros((K, P), start.dtype), start / jnp.linalg.norm(start), zero, zero)
    (basis, *_), (diagonal, beside) = jax.lax.scan(step, begin, jnp.arange(K))
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1))
    eps, weights = jnp.finfo(start.dtype).eps, vectors[0] ** 2
    errors = jnp.maximum(jnp.abs(beside[-1] * vectors[-1]), eps * jnp.abs(values).max())
    top = dot(vectors[:, jnp.argmax(jnp.where(weights > eps, values, -jnp.inf))], basis)  # no step that was a repeat
    return Lanczos(values, weights, errors, top / jnp.linalg.norm(top))


def spectrum(loss: Loss, params: Any, batch: Any, key: jax.Array, steps: int = 32, probes: int = 1) -> Lanczos:
    """The spectrum of the Hessian by `lanczos` from `probes` random starts, each leaf of the result (probes, ...).

    The weights at the Ritz values approximate the density of the eigenvalues (stochastic Lanczos quadrature: Ghorbani
    et al. 2019, arXiv:1901.10159). Eigenvalues are in nats per token per squared unit of a parameter. `top` is flat, as
    `ravel_pytree` orders the parameters. Memory: steps times the parameters, for one start after another.
    """
    flat, unravel = ravel_pytree(params)

    def product(v: jax.Array) -> jax.Array:
        return ravel_pytree(hvp(loss, params, batch, unravel(v)))[0]

    def one(key: jax.Array) -> Lanczos:
        return lanczos(product, jax.random.normal(key, flat.shape, flat.dtype), steps)

    return jax.lax.map(one, jax.random.split(key, probes))


def trace(loss: Loss, params: Any, batch: Any, key: jax.Array, probes: int = 16) -> jax.Array:
    """Estimates of the trace of the Hessian, (probes,): their mean is one too, its error their scatter.

    Each is v . H v for a v of random signs (Hutchinson 1989), whose variance is twice the sum of the squares off the
    diagonal of H: a diagonal one is met exactly.
    """
    flat, unravel = ravel_pytree(params)

    def one(key: jax.Array) -> jax.Array:
        v = jax.random.rademacher(key, flat.shape, flat.dtype)
        return jnp.dot(v, ravel_pytree(hvp(loss, params, batch, unravel(v)))[0], precision="highest")

    return jax.lax.map(one, jax.random.split(key, probes))


def density(values: Any, weights: Any, at: Any, width: float) -> NDArray[np.float64]:
    """The density of eigenvalues at the places `at` (N,) -> (N,), per unit of eigenvalue, with an integral of 1: each
    Ritz value of `spectrum` (probes, K) as a Gaussian of standard deviation `width`, the mean over the probes."""
    values, weights, at = (np.asarray(x, np.float64) for x in (values, weights, at))
    bells = np.exp(-0.5 * ((at[:, None, None] - values[None]) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return (bells * weights[None]).sum(axis=(1, 2)) / len(values)
