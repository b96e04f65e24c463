"""The gradient of each example alone: what it would change, and how much examples agree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.diagnostics.losses import Loss


def per_example(
    loss: Loss, params: Any, batch: Any, take: Callable[[Any], Any] = lambda gradient: gradient, chunk: int = 8
) -> Any:
    """`take(gradient of the loss of an example)` for each of the B examples of a batch, as `vmap(grad)` gives it.

    Args:
      take: a function of a gradient (a tree like `params`); its results are kept, (B, ...), the gradients are not. The
        default keeps them: B times the memory of the parameters.
      chunk: examples at a time, the most gradients that exist at once where `take` keeps less.
    """

    def one(example: Any) -> Any:
        return take(jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example)))

    return jax.lax.map(one, batch, batch_size=chunk)


class NoiseScale(NamedTuple):
    """How gradients scatter: scalars float32, but for `norms`."""

    scale: jax.Array  # B_simple, in examples: noise / signal
    standard_error: jax.Array  # of scale, by the jackknife
    signal: jax.Array  # |G|**2 of the true gradient G, estimated without bias: may be negative where noise drowns it
    noise: jax.Array  # tr(Sigma), the summed variance of an example's gradient
    norms: jax.Array  # (B,) of each example's gradient


def noise_scale(loss: Loss, params: Any, batch: Any, chunk: int = 8) -> NoiseScale:
    """The simple gradient noise scale of McCandlish et al. 2018 ("An empirical model of large-batch training",
    arXiv:1812.06162, eq. 2.9 and appendix A.1): about the largest batch that still learns as much per example.

    Their unbiased estimates from gradients of two batch sizes, here 1 and B: the noise is the sample variance of the B
    gradients, the signal the square of their mean less a B-th of the noise. The ratio of the two has a small bias. It
    is sure only where B comes near the scale itself: see its standard error.

    Args:
      batch: B examples, drawn independently, at least 3.

    Raises:
      ValueError: fewer than 3 examples.
    """
    B = jax.tree.leaves(batch)[0].shape[0]
    if B < 3:
        raise ValueError(f"{B} examples have no scatter to measure, expected at least 3")
    mean = jax.grad(loss)(params, batch)
    squares, along = per_example(
        loss,
        params,
        batch,
        lambda gradient: (optax.tree.vdot(gradient, gradient), optax.tree.vdot(gradient, mean)),
        chunk,
    )
    signal, noise = _estimates(optax.tree.vdot(mean, mean), squares.mean(), B)
    # The same of all examples but one, for each: |mean without i|**2, and the mean square without i.
    others = (B * B * optax.tree.vdot(mean, mean) - 2 * B * along + squares) / (B - 1) ** 2
    signals, noises = _estimates(others, (squares.sum() - squares) / (B - 1), B - 1)
    ratios = noises / signals
    error = jnp.sqrt((B - 1) * jnp.var(ratios))
    return NoiseScale(noise / signal, error, signal, noise, jnp.sqrt(squares))


def _estimates(of_mean: jax.Array, mean_of: jax.Array, B: int) -> tuple[jax.Array, jax.Array]:
    """(signal, noise) from the square of the mean of B gradients and the mean of their squares."""
    noise = (mean_of - of_mean) * B / (B - 1)
    return of_mean - noise / B, noise
