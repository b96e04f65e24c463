"""The diagnoses of a trained model, each a pure function of (subject, effort) to a NamedTuple of arrays."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxgpt import cost, memory, prng
from jaxgpt import model as nn
from jaxgpt.config import Config, UsageError
from jaxgpt.data import Batch, Ids, estimate_starts, take
from jaxgpt.diagnostics import curvature as hessian
from jaxgpt.diagnostics import inside
from jaxgpt.diagnostics.gradients import NoiseScale, noise_scale
from jaxgpt.diagnostics.influence import influence as products
from jaxgpt.diagnostics.landscape import along, filter_normalised, plane
from jaxgpt.diagnostics.losses import mean_loss
from jaxgpt.diagnostics.tokens import Scores, token_scores
from jaxgpt.step import init_state


class Subject(NamedTuple):
    """What is looked at: a trained model, and the text that it learnt from."""

    config: Config
    params: nn.Params
    train: Ids
    val: Ids
    text: Ids  # what the diagnoses of single tokens read; of it the first block_size + 1 are one window


class Effort(NamedTuple):
    """How much work a diagnosis is."""

    windows: int = 256  # of training text, whose gradients are taken one by one
    batch: int = 32  # windows of training text in the batch whose loss is curved
    steps: int = 20  # of Lanczos
    probes: int = 8  # random vectors for the trace
    grid: int = 13  # points on each side of the plane
    seed: int = 0


# Purposes of random numbers: of windows, and of directions.
BATCH, WINDOWS, VAL, SPECTRUM, TRACE, FIRST, SECOND = range(7)


def noise(subject: Subject, effort: Effort) -> NoiseScale:
    """`gradients.noise_scale` over windows of the training text."""
    return _noise(subject.config, subject.params, _windows(subject, effort.seed, WINDOWS, effort.windows))


@partial(jax.jit, static_argnums=0)
def _noise(config: Config, params: nn.Params, batch: Batch) -> NoiseScale:
    return noise_scale(mean_loss(config.model), params, batch)


class Curvature(NamedTuple):
    spectrum: hessian.Lanczos
    traces: Any  # (probes,) estimates
    distances: Any  # (N,) along the eigenvector of the greatest eigenvalue
    losses: Any  # (N,) there
    slope: Any  # () of the loss along it


def curvature(subject: Subject, effort: Effort) -> Curvature:
    """Spectrum and trace of the Hessian of a batch's loss, and the loss along the direction of greatest curvature.

    The line is as long as a parabola of that curvature takes to rise by half a nat, either way.
    """
    config, params = subject.config, subject.params
    batch = _windows(subject, effort.seed, BATCH, effort.batch)
    found = _spectrum(config, effort.steps, params, batch, _key(effort.seed, SPECTRUM))
    traces = _traces(config, effort.probes, params, batch, _key(effort.seed, TRACE))
    reach = 1 / np.sqrt(max(float(found.values[-1]), 1e-6))
    distances = np.linspace(-reach, reach, 21, dtype=np.float32)
    return Curvature(
        found, traces, distances, *_line(config, params, batch, ravel_pytree(params)[1](found.top), distances)
    )


@partial(jax.jit, static_argnums=(0, 1))
def _spectrum(config: Config, steps: int, params: nn.Params, batch: Batch, key: jax.Array) -> hessian.Lanczos:
    found = hessian.spectrum(mean_loss(config.model), params, batch, key, steps)
    return jax.tree.map(lambda x: x[0], found)


@partial(jax.jit, static_argnums=(0, 1))
def _traces(config: Config, probes: int, params: nn.Params, batch: Batch, key: jax.Array) -> jax.Array:
    return hessian.trace(mean_loss(config.model), params, batch, key, probes)


@partial(jax.jit, static_argnums=0)
def _line(config: Config, params: nn.Params, batch: Batch, direction: Any, distances: Any) -> tuple[jax.Array, Any]:
    """The loss along a line, and its slope where the line begins."""
    loss = mean_loss(config.model)
    slope = jax.jvp(lambda params: loss(params, batch), (params,), (direction,))[1]
    return along(loss, params, batch, direction, distances), slope


class Landscape(NamedTuple):
    places: Any  # (grid,) distances along each direction, in lengths of the filters
    losses: Any  # (grid, grid): [y, x]
    shares: Any  # (N,) of the way from the first parameters of the run, 0, to these, 1
    path: Any  # (N,) the loss there


def landscape(subject: Subject, effort: Effort) -> Landscape:
    """The loss of a batch in a plane of two random directions, and on the straight line from where training began.

    A run that began with imported weights is shown the way from random ones.
    """
    batch = _windows(subject, effort.seed, BATCH, effort.batch)
    directions = [filter_normalised(subject.params, _key(effort.seed, k)) for k in (FIRST, SECOND)]
    places, shares = np.linspace(-1, 1, effort.grid, dtype=np.float32), np.linspace(-0.2, 1.4, 33, dtype=np.float32)
    losses = _plane(subject.config, subject.params, batch, *directions, places)
    first = init_state(subject.config).params
    way = jax.tree.map(jnp.subtract, subject.params, first)
    return Landscape(places, losses, shares, _line(subject.config, first, batch, way, shares)[0])


@partial(jax.jit, static_argnums=0)
def _plane(config: Config, params: nn.Params, batch: Batch, first: Any, second: Any, places: Any) -> jax.Array:
    return plane(mean_loss(config.model), params, batch, first, second, places, places)


class Influence(NamedTuple):
    products: Any  # (windows,) with the gradient of each, nats per token per unit of learning rate
    starts: Any  # (windows,) where each begins in the training text


def influence(subject: Subject, effort: Effort) -> Influence:
    """What windows of the training text do for the loss of the first window of the text."""
    starts = _starts(subject.train, subject.config, effort.seed, WINDOWS, effort.windows)
    train = take(subject.train, starts, subject.config.model.block_size)
    return Influence(_products(subject.config, subject.params, train, _first_window(subject))[0], starts)


@partial(jax.jit, static_argnums=0)
def _products(config: Config, params: nn.Params, train: Batch, val: Batch) -> jax.Array:
    return products(mean_loss(config.model), params, train, val)


class Lens(NamedTuple):
    losses: Any  # (L + 1,) nats per token, means over windows of the validation text
    divergence: Any  # (L + 1,) nats per token, from the last depth
    agreement: Any  # (L + 1,) the share of tokens whose likeliest next one is already the last depth's
    text: inside.Lens  # of the first window of the text, (L + 1, 1, T) each


def lens(subject: Subject, effort: Effort) -> Lens:
    """`inside.lens`, on validation windows in the mean and on the text token by token."""
    many = _windows(subject, effort.seed, VAL, effort.batch)
    losses, divergence, agreement = _lens(subject.config, subject.params, many)
    text = inside.lens(subject.config.model, subject.params, _first_window(subject))
    return Lens(losses, divergence, agreement, text)


@partial(jax.jit, static_argnums=0)
def _lens(config: Config, params: nn.Params, batch: Batch) -> tuple[jax.Array, ...]:
    def one(window: Batch) -> tuple[jax.Array, ...]:
        found = inside.lens(config.model, params, jax.tree.map(lambda x: x[None], window))
        same = (found.top == found.top[-1][None]).astype(jnp.float32)
        return tuple(x.mean(axis=(1, 2)) for x in (found.losses, found.divergence, same))

    return tuple(x.mean(axis=0) for x in jax.lax.map(one, batch))


class Attention(NamedTuple):
    mean: inside.Attention  # over windows of the validation text
    maps: Any  # (L, H, T, T) on the first window of the text


def attention(subject: Subject, effort: Effort) -> Attention:
    """`inside.attention` on validation windows, and the maps of the text."""
    config, params = subject.config.model, subject.params
    many, idx = _windows(subject, effort.seed, VAL, effort.batch).inputs, _first_window(subject).inputs
    mean = jax.jit(inside.attention, static_argnums=0)(config, params, many)
    return Attention(mean, jax.jit(inside.exact_maps, static_argnums=0)(config, params, idx)[:, 0])


def tokens(subject: Subject, effort: Effort) -> Scores:
    """`tokens.token_scores` of the text. Its windows overlap by half: each token but the first sees half a context at
    least, where there are so many before it."""
    config = subject.config.model
    half = max(1, min(config.block_size, len(subject.text) - 1) // 2)
    return token_scores(config, subject.params, subject.text, min(5, config.vocab_size), stride=half)


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
      UsageError: a number is out of range, the text is too short, a bigram is asked for its attention, or the vectors
        of Lanczos do not fit.
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
    """The first block_size + 1 tokens of the text, or all where there are fewer, as a batch of one."""
    T = min(subject.config.model.block_size, len(subject.text) - 1)
    return take(subject.text, np.zeros(1, np.int64), T)


def _windows(subject: Subject, seed: int, purpose: int, n: int) -> Batch:
    """`n` random windows of the training text, or of the validation text for the purpose VAL."""
    text = subject.val if purpose == VAL else subject.train
    return take(text, _starts(text, subject.config, seed, purpose, n), subject.config.model.block_size)


def _starts(text: Ids, config: Config, seed: int, purpose: int, n: int) -> Any:
    return estimate_starts(seed, purpose, len(text), config.model.block_size, n)


def _key(seed: int, purpose: int) -> jax.Array:
    return jax.random.fold_in(prng.key(seed), purpose)
