"""The diagnoses of a trained model: each a function of (subject, effort) that returns a NamedTuple of arrays."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxgpt import cost, model, prng
from jaxgpt.cli import memory
from jaxgpt.config import Config, UsageError
from jaxgpt.data import Batch, Ids, estimate_starts, take
from jaxgpt.diagnostics import derivatives, inside
from jaxgpt.diagnostics.cli import Effort
from jaxgpt.diagnostics.derivatives import Lanczos, NoiseScale, mean_loss
from jaxgpt.step import init_state


class Subject(NamedTuple):
    """A trained model, and its text."""

    config: Config
    params: model.Params
    train: Ids
    val: Ids
    text: Ids  # for the diagnoses of single tokens; its first block_size + 1 are one window


BATCH, WINDOWS, VAL, SPECTRUM, TRACE, FIRST, SECOND = range(7)
"""What random numbers are drawn for."""


def noise(subject: Subject, effort: Effort) -> NoiseScale:
    """The gradient noise scale, from windows of the training text."""
    measure = jax.jit(partial(derivatives.noise_scale, mean_loss(subject.config.model)))
    return measure(subject.params, _windows(subject, effort.seed, WINDOWS, effort.windows))


class Curvature(NamedTuple):
    spectrum: Lanczos
    traces: Any  # (probes,) estimates
    distances: Any  # (N,) along the eigenvector of the largest eigenvalue
    losses: Any  # (N,) there
    slope: Any  # () of the loss along it


def curvature(subject: Subject, effort: Effort) -> Curvature:
    """Spectrum and trace of the Hessian of a batch's loss, and the loss along the top eigenvector, as far as a parabola
    of that curvature takes to rise by half a nat."""
    loss, params = mean_loss(subject.config.model), subject.params
    batch = _windows(subject, effort.seed, BATCH, effort.batch)
    measure = jax.jit(partial(derivatives.spectrum, loss, steps=effort.steps))
    found = jax.tree.map(lambda x: x[0], measure(params, batch, _key(effort.seed, SPECTRUM)))
    traces = jax.jit(partial(derivatives.trace, loss, probes=effort.probes))(params, batch, _key(effort.seed, TRACE))
    reach = 1 / np.sqrt(max(float(found.values[-1]), 1e-6))
    distances, direction = np.linspace(-reach, reach, 21, dtype=np.float32), ravel_pytree(params)[1](found.top)
    losses = jax.jit(partial(derivatives.along, loss))(params, batch, direction, distances)
    slope = jax.jit(lambda params, v: optax.tree.vdot(jax.grad(loss)(params, batch), v))(params, direction)
    return Curvature(found, traces, distances, losses, slope)


class Landscape(NamedTuple):
    places: Any  # (grid,) distances along each direction, in norms of the filters
    losses: Any  # (grid, grid): [y, x]
    shares: Any  # (N,) of the way from the initial parameters, 0, to these, 1
    path: Any  # (N,) the loss there


def landscape(subject: Subject, effort: Effort) -> Landscape:
    """The loss of a batch in a plane of two random directions, and on the line from the initial parameters.

    The initial parameters are random ones, even if the run began with imported weights.
    """
    loss, params = mean_loss(subject.config.model), subject.params
    batch = _windows(subject, effort.seed, BATCH, effort.batch)
    directions = [derivatives.filter_normalised(params, _key(effort.seed, k)) for k in (FIRST, SECOND)]
    places, shares = np.linspace(-1, 1, effort.grid, dtype=np.float32), np.linspace(-0.2, 1.4, 33, dtype=np.float32)
    losses = jax.jit(partial(derivatives.plane, loss))(params, batch, *directions, places, places)
    first = init_state(subject.config).params
    way = jax.tree.map(jnp.subtract, params, first)
    return Landscape(places, losses, shares, jax.jit(partial(derivatives.along, loss))(first, batch, way, shares))


class Influence(NamedTuple):
    products: Any  # (windows,) dot products of gradients, nats per token per unit of learning rate
    starts: Any  # (windows,) where each begins in the training text


def influence(subject: Subject, effort: Effort) -> Influence:
    """How windows of the training text change the loss of the first window of the text."""
    starts = _starts(subject, effort.seed, WINDOWS, effort.windows)
    train = take(subject.train, starts, subject.config.model.block_size)
    measure = jax.jit(partial(derivatives.influence, mean_loss(subject.config.model)))
    return Influence(measure(subject.params, train, _first_window(subject))[0], starts)


class Lens(NamedTuple):
    losses: Any  # (L + 1,) nats per token, means over windows of the validation text
    divergence: Any  # (L + 1,) nats per token, KL(last depth || this one)
    agreement: Any  # (L + 1,) how often the likeliest token is the last depth's
    text: inside.Lens  # of the first window of the text, (L + 1, 1, T) each


def lens(subject: Subject, effort: Effort) -> Lens:
    """`inside.lens`: means over validation windows, and the text token by token."""
    config, params = subject.config.model, subject.params

    def one(window: Batch) -> tuple[jax.Array, ...]:
        found = inside.lens(config, params, jax.tree.map(lambda x: x[None], window))
        same = (found.top == found.top[-1][None]).astype(jnp.float32)
        return tuple(x.mean(axis=(1, 2)) for x in (found.losses, found.divergence, same))

    means = jax.jit(lambda batch: tuple(x.mean(axis=0) for x in jax.lax.map(one, batch)))
    text = jax.jit(inside.lens, static_argnums=0)(config, params, _first_window(subject))
    losses, divergence, agreement = means(_windows(subject, effort.seed, VAL, effort.batch))
    return Lens(losses, divergence, agreement, text)


class Attention(NamedTuple):
    mean: inside.Attention  # over windows of the validation text
    maps: Any  # (L, H, T, T) on the first window of the text


def attention(subject: Subject, effort: Effort) -> Attention:
    """`inside.attention` on validation windows, and the maps of the text."""
    config, params = subject.config.model, subject.params
    many, idx = _windows(subject, effort.seed, VAL, effort.batch).inputs, _first_window(subject).inputs
    mean = jax.jit(inside.attention, static_argnums=0)(config, params, many)
    return Attention(mean, jax.jit(inside.exact_maps, static_argnums=0)(config, params, idx)[:, 0])


def tokens(subject: Subject, effort: Effort) -> inside.Scores:
    """`inside.token_scores` of the text, in windows that overlap by half: beyond the first window, each token sees at
    least half a context."""
    config = subject.config.model
    half = max(1, min(config.block_size, len(subject.text) - 1) // 2)
    return inside.token_scores(config, subject.params, subject.text, min(5, config.vocab_size), half)


DIAGNOSES: dict[str, Callable[[Subject, Effort], Any]] = {
    "noise": noise,
    "curvature": curvature,
    "landscape": landscape,
    "influence": influence,
    "lens": lens,
    "attention": attention,
    "tokens": tokens,
}


def require(config: Config, effort: Effort, names: Sequence[str], text: Ids, free: int | None = None) -> None:
    """Check, before anything is compiled, that the diagnoses `names` can be made.

    Args:
      free: bytes of memory; None for what is free on the device.

    Raises:
      UsageError: a number is out of range, the text is too short, a bigram has no attention, or the Lanczos vectors do
        not fit.
    """
    least = {"windows": 3, "batch": 1, "steps": 2, "probes": 2, "grid": 3, "seed": 0}
    for name, low in least.items():
        if getattr(effort, name) < low:
            raise UsageError(f"{name} is {getattr(effort, name)}, expected at least {low}: --{name} {low}")
    if len(text) < 2:
        raise UsageError(f"the text has {len(text)} tokens, expected at least 2: --text TEXT")
    if "attention" in names and config.model.kind == "bigram":
        raise UsageError("a bigram has no attention: leave it out of --only")
    free = memory.available() if free is None else free
    vector = cost.FLOAT * cost.n_params(config.model)
    if "curvature" in names and free is not None and vector * (effort.steps + 6) > free:
        fits = free // vector - 6
        raise UsageError(
            f"{effort.steps} steps of Lanczos hold as many vectors of {memory.size(vector)}, {memory.size(free)} are "
            "free: " + (f"try --steps {fits}" if fits >= 2 else "leave curvature out, --only NAME ...")
        )


def _first_window(subject: Subject) -> Batch:
    """The first block_size + 1 tokens of the text, or all if there are fewer, as a batch of one."""
    T = min(subject.config.model.block_size, len(subject.text) - 1)
    return take(subject.text, np.zeros(1, np.int64), T)


def _windows(subject: Subject, seed: int, purpose: int, n: int) -> Batch:
    """`n` random windows of the training text, or of the validation text for the purpose VAL."""
    text = subject.val if purpose == VAL else subject.train
    return take(text, _starts(subject, seed, purpose, n), subject.config.model.block_size)


def _starts(subject: Subject, seed: int, purpose: int, n: int) -> Any:
    text = subject.val if purpose == VAL else subject.train
    return estimate_starts(seed, purpose, len(text), subject.config.model.block_size, n)


def _key(seed: int, purpose: int) -> jax.Array:
    return jax.random.fold_in(prng.key(seed), purpose)
