"""Derivatives of a loss: per-example gradients, influence, the Hessian, and the loss along lines and planes.

All functions take a loss of (parameters, batch), any pytrees.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxgpt import model
from jaxgpt.config import ModelConfig

Loss = Callable[[Any, Any], jax.Array]
"""(params, batch) -> (), the mean over the examples of the batch: each leaf of a batch is (B, ...)."""


def exact(config: ModelConfig) -> ModelConfig:
    """`config` with float32 matmuls, without dropout and rematerialization: in bfloat16, Hessian-vector products
    would be too inaccurate, and fused attention kernels have no second derivative."""
    return replace(config, precision="float32", dropout=0.0, remat="none")


def mean_loss(config: ModelConfig, chunk: int = 16) -> Loss:
    """The loss of a model in nats per token, of params and a batch of (B, T) inputs and targets.

    Batches of more than `chunk` windows are computed in chunks, which the backward pass recomputes, so that memory does
    not grow with B.
    """
    config = exact(config)

    def loss(params: model.Params, batch: Any) -> jax.Array:
        def one(window: Any) -> jax.Array:
            with jax.default_matmul_precision("highest"):  # else accelerators round the inputs of float32 matmuls
                return model.losses(config, params, window.inputs[None], window.targets[None]).mean()

        each = jax.checkpoint(one) if len(batch.inputs) > chunk else one
        return jax.lax.map(each, batch, batch_size=chunk).mean()

    return loss


def per_example(
    loss: Loss, params: Any, batch: Any, take: Callable[[Any], Any] = lambda gradient: gradient, chunk: int = 8
) -> Any:
    """`take(gradient)`, by default the gradient itself, for each of the B examples, (B, ...): `vmap(grad)` in the
    memory of `chunk` gradients and of the results."""

    def one(example: Any) -> Any:
        return take(jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example)))

    return jax.lax.map(one, batch, batch_size=chunk)


class NoiseScale(NamedTuple):
    """How much per-example gradients differ: float32 scalars, except `norms`."""

    scale: jax.Array  # B_simple = noise / signal, in examples
    standard_error: jax.Array  # of scale, by the jackknife
    signal: jax.Array  # |G|**2 of the true gradient G; the unbiased estimate may be negative if noise dominates
    noise: jax.Array  # tr(Sigma), the summed variance of an example's gradient
    norms: jax.Array  # (B,) of each example's gradient


def noise_scale(loss: Loss, params: Any, batch: Any, chunk: int = 8) -> NoiseScale:
    """The simple gradient noise scale (McCandlish et al. 2018, "An empirical model of large-batch training",
    arXiv:1812.06162, eq. 2.9 and appendix A.1): about the largest batch size at which each example still helps as much.

    Signal and noise are estimated without bias from gradients of two batch sizes, here 1 and B. Their ratio has a small
    bias, and is precise only if B, the number of independent examples, is near the scale: see its standard error.

    Raises:
      ValueError: fewer than 3 examples.
    """
    B = jax.tree.leaves(batch)[0].shape[0]
    if B < 3:
        raise ValueError(f"{B} examples are too few for a variance, expected at least 3")
    mean = jax.grad(loss)(params, batch)

    def dots(gradient: Any) -> tuple[jax.Array, jax.Array]:
        return optax.tree.vdot(gradient, gradient), optax.tree.vdot(gradient, mean)

    def estimates(square_of_mean: jax.Array, mean_of_squares: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        """(signal, noise) of n gradients."""
        noise = (mean_of_squares - square_of_mean) * n / (n - 1)
        return square_of_mean - noise / n, noise

    squares, with_mean = per_example(loss, params, batch, dots, chunk)
    square_of_mean, _ = dots(mean)
    signal, noise = estimates(square_of_mean, squares.mean(), B)
    # The jackknife: the same estimates without each example in turn.
    without = (B * B * square_of_mean - 2 * B * with_mean + squares) / (B - 1) ** 2
    signals, noises = estimates(without, (squares.sum() - squares) / (B - 1), B - 1)
    error = jnp.sqrt((B - 1) * jnp.var(noises / signals))
    return NoiseScale(noise / signal, error, signal, noise, jnp.sqrt(squares))


def influence(loss: Loss, params: Any, train: Any, val: Any, chunk: int = 8) -> jax.Array:
    """The dot product of the gradients of each validation and each training example, (N_val, N_train).

    To first order, it is how much a step of gradient descent on the training example lowers the loss of the validation
    example, per unit of learning rate. TracIn (Pruthi et al. 2020, arXiv:2002.08484) sums it over checkpoints, weighted
    by learning rate. Memory: the gradients of all validation examples, and of `chunk` training examples.
    """
    wanted = per_example(loss, params, val, lambda gradient: ravel_pytree(gradient)[0], chunk)  # (N_val, P)

    def dots(gradient: Any) -> jax.Array:
        return jnp.matmul(wanted, ravel_pytree(gradient)[0], precision="highest")

    return per_example(loss, params, train, dots, chunk).T


def hvp(loss: Loss, params: Any, batch: Any, v: Any) -> Any:
    """The Hessian of the loss times `v`, a tree like `params`, at the cost of about two gradients: the forward-mode
    derivative of the gradient along v (Pearlmutter 1994, "Fast exact multiplication by the Hessian")."""
    return jax.jvp(lambda params: jax.grad(loss)(params, batch), (params,), (v,))[1]


class Lanczos(NamedTuple):
    """The result of K Lanczos steps with a symmetric (P, P) matrix."""

    values: jax.Array  # (K,) Ritz values, ascending: estimates of eigenvalues, best at the ends of the spectrum
    weights: jax.Array  # (K,) share of the start vector along the eigenvector of each; they sum to 1
    errors: jax.Array  # (K,) bound of the distance to the nearest eigenvalue, or 1e-5 of the largest for rounding
    top: jax.Array  # (P,) the unit eigenvector of the largest


def lanczos(matvec: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> Lanczos:
    """The Lanczos iteration with full reorthogonalization (Golub and Van Loan, "Matrix computations", 10.1 to 10.3).

    Args:
      matvec: (P,) -> (P,), multiplies by the symmetric matrix.
      start: (P,), not zero.
      steps: K, at most P, and the number of (P,) vectors in memory.
    """
    P, K = start.size, min(steps, start.size)
    dot = partial(jnp.dot, precision="highest")

    def step(carry: Any, k: jax.Array) -> tuple[Any, Any]:
        basis, q, size = carry
        basis = basis.at[k].set(q)
        w = matvec(q)
        diagonal, size = dot(q, w), jnp.maximum(size, jnp.linalg.norm(w))
        for _ in range(2):  # twice, because of rounding
            w = w - dot(basis.T, dot(basis, w))
        length = jnp.linalg.norm(w)
        length = jnp.where(length > 1e-5 * size, length, 0)  # 0: the basis spans the whole Krylov space
        following = jnp.where(length > 0, w / jnp.where(length > 0, length, 1), 0)
        return (basis, following, size), (diagonal, length, (q @ q) > 0)

    begin = jnp.zeros((K, P), start.dtype), start / jnp.linalg.norm(start), jnp.zeros((), start.dtype)
    (basis, *_), (diagonal, beside, alive) = jax.lax.scan(step, begin, jnp.arange(K))
    # Steps beyond that repeat the first Rayleigh quotient, which leaves the ends of the spectrum unchanged.
    diagonal = jnp.where(alive, diagonal, diagonal[0])
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1))
    eps, weights = jnp.finfo(start.dtype).eps, vectors[0] ** 2
    errors = jnp.maximum(jnp.abs(beside[-1] * vectors[-1]), 1e-5 * jnp.abs(values).max())
    top = dot(vectors[:, jnp.argmax(jnp.where(weights > eps, values, -jnp.inf))], basis)  # not of a repeated step
    return Lanczos(values, weights, errors, top / jnp.linalg.norm(top))


def spectrum(loss: Loss, params: Any, batch: Any, key: jax.Array, steps: int = 32) -> Lanczos:
    """The spectrum of the Hessian by `lanczos` from a random start; `top` is in the order of `ravel_pytree`.

    The weights at the Ritz values, averaged over keys, approximate the eigenvalue density (stochastic Lanczos
    quadrature: Ghorbani et al. 2019, arXiv:1901.10159). Memory: `steps` times the parameters.
    """
    flat, times = _flat_hessian(loss, params, batch)
    return lanczos(times, jax.random.normal(key, flat.shape, flat.dtype), steps)


def trace(loss: Loss, params: Any, batch: Any, key: jax.Array, probes: int = 16) -> jax.Array:
    """Unbiased estimates of the trace of the Hessian H, (probes,): v . H v for random signs v (Hutchinson 1989), whose
    variance is twice the sum of the squared off-diagonal entries of H."""
    flat, times = _flat_hessian(loss, params, batch)

    def one(key: jax.Array) -> jax.Array:
        v = jax.random.rademacher(key, flat.shape, flat.dtype)
        return jnp.dot(v, times(v), precision="highest")

    return jax.lax.map(one, jax.random.split(key, probes))


def _flat_hessian(loss: Loss, params: Any, batch: Any) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The parameters as one vector (P,), and the function that multiplies such a vector by the Hessian."""
    flat, unravel = ravel_pytree(params)
    return flat, lambda v: ravel_pytree(hvp(loss, params, batch, unravel(v)))[0]


def filter_normalized(params: Any, key: jax.Array) -> Any:
    """A random direction whose filters have the norms of those of `params`, so that landscapes of models of different
    scale can be compared (Li et al. 2018, "Visualizing the loss landscape of neural nets", arXiv:1712.09913).

    A filter is a column of a kernel (..., K, N) or a row of an embedding; biases and norm scales do not move.
    """

    def scaled(path: tuple[Any, ...], d: jax.Array, p: jax.Array) -> jax.Array:
        axis = {"kernel": -2, "embedding": -1}.get(path[-1].key)
        if axis is None:
            return jnp.zeros_like(p)
        return d * (jnp.linalg.norm(p, axis=axis, keepdims=True) / jnp.linalg.norm(d, axis=axis, keepdims=True))

    return jax.tree_util.tree_map_with_path(scaled, optax.tree.random_like(key, params), params)


def along(loss: Loss, params: Any, batch: Any, direction: Any, distances: jax.Array) -> jax.Array:
    """The loss at `params + distance * direction`: (N,) distances -> (N,). If the direction is the difference to other
    parameters, this interpolates between both (Goodfellow et al. 2015, arXiv:1412.6544)."""
    return jax.lax.map(lambda distance: loss(optax.tree.add_scale(params, distance, direction), batch), distances)


def plane(loss: Loss, params: Any, batch: Any, first: Any, second: Any, xs: jax.Array, ys: jax.Array) -> jax.Array:
    """The loss at `params + x * first + y * second`: (X,) and (Y,) distances -> (Y, X)."""
    return jax.lax.map(lambda y: along(loss, optax.tree.add_scale(params, y, second), batch, first, xs), ys)
