"""The diagnoses of a trained model: functions of a subject that return a NamedTuple of arrays."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.filesize import decimal as size

from jaxgpt import model, prng
from jaxgpt.cli import memory
from jaxgpt.config import Config, UsageError
from jaxgpt.data import Batch, Part, Starts, chunk_starts, take
from jaxgpt.diagnostics import derivatives, inside
from jaxgpt.diagnostics.cli import Effort
from jaxgpt.diagnostics.derivatives import Lanczos, NoiseScale, mean_loss
from jaxgpt.display.text import count, visible
from jaxgpt.monitor import cost
from jaxgpt.step import init_state
from jaxgpt.tokenizer import Ids

PROBES, GRID = 8, 13
"""Random vectors that estimate the trace of the Hessian; points along each side of the landscape's plane."""
BATCH, WINDOWS, _, SPECTRUM, TRACE, FIRST, SECOND = range(7)
"""The purposes of random numbers, each with its own stream."""


class Subject(NamedTuple):
    """A trained model, the tokens it was trained on, and a text to look at."""

    config: Config
    params: model.Params
    train: Ids
    text: Ids
    token_bytes: Sequence[bytes]  # of each token id
    parts: Sequence[Part] = ()  # of a mixture
    effort: Effort = Effort()

    def show(self, ids: Any) -> str:
        """Tokens on one line; "?" for the padding of the vocabulary."""
        texts = (self.token_bytes[i] if i < len(self.token_bytes) else b"?" for i in np.atleast_1d(ids))
        return visible(b"".join(texts).decode("utf-8", "backslashreplace"))

    def measure(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """`function` of the model's mean loss, its parameters and `args`, compiled."""
        return jax.jit(partial(function, mean_loss(self.config.model), **static))(self.params, *args)

    @property
    def first(self) -> Batch:
        """The first window of the text, as a batch of one; all of a text that is shorter."""
        return take(self.text, np.zeros(1, np.int64), min(self.config.model.block_size, len(self.text) - 1))

    def windows(self, purpose: int, n: int) -> tuple[Batch, Starts]:
        """`n` random windows of the training tokens, of a mixture by its weights, and where they start."""
        T, seed, parts = self.config.model.block_size, self.effort.seed, self.parts or len(self.train)
        starts = chunk_starts(seed, purpose, purpose + 1, parts, T, n, "estimate")[0]
        return take(self.train, starts, T), starts

    def key(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(prng.key(self.effort.seed), purpose)


def noise(subject: Subject) -> NoiseScale:
    """The gradient noise scale, from windows of the training tokens."""
    windows, _ = subject.windows(WINDOWS, subject.effort.windows)
    return subject.measure(derivatives.noise_scale, windows)


class Curvature(NamedTuple):
    spectrum: Lanczos
    traces: Any  # (PROBES,) estimates
    distances: Any  # (N,) along the eigenvector of the largest eigenvalue
    losses: Any  # (N,) at these distances
    slope: Any  # () of the loss along the eigenvector


def curvature(subject: Subject) -> Curvature:
    """Spectrum and trace of the Hessian of a batch's loss, and the loss along the top eigenvector, as far as a parabola
    of that curvature takes to rise by half a nat."""
    batch, _ = subject.windows(BATCH, subject.effort.batch)
    spectrum = subject.measure(derivatives.spectrum, batch, subject.key(SPECTRUM), steps=subject.effort.steps)
    traces = subject.measure(derivatives.trace, batch, subject.key(TRACE), probes=PROBES)
    reach = 1 / np.sqrt(max(float(spectrum.values[-1]), 1e-6))
    distances = np.linspace(-reach, reach, 21, dtype=np.float32)
    direction = ravel_pytree(subject.params)[1](spectrum.top)
    losses = subject.measure(derivatives.along, batch, direction, distances)
    gradient = subject.measure(lambda loss, params: jax.grad(loss)(params, batch))
    return Curvature(spectrum, traces, distances, losses, optax.tree.vdot(gradient, direction))


class Landscape(NamedTuple):
    places: Any  # (GRID,) distances along each direction, in filter norms
    losses: Any  # (GRID, GRID): [y, x]
    shares: Any  # (N,) of the way from the initial parameters (0) to the trained ones (1)
    path: Any  # (N,) the losses at these shares


def landscape(subject: Subject) -> Landscape:
    """The loss of a batch in a plane of two random directions, and on the line from random initial parameters."""
    batch, _ = subject.windows(BATCH, subject.effort.batch)
    directions = [derivatives.filter_normalized(subject.params, subject.key(k)) for k in (FIRST, SECOND)]
    places, shares = np.linspace(-1, 1, GRID, dtype=np.float32), np.float32(np.arange(-4, 29) / 20)  # 0 and 1 exactly
    losses = subject.measure(derivatives.plane, batch, *directions, places, places)
    begin = subject._replace(params=init_state(subject.config).params)
    path = begin.measure(derivatives.along, batch, optax.tree.sub(subject.params, begin.params), shares)
    return Landscape(places, losses, shares, path)


class Influence(NamedTuple):
    dots: Any  # (windows,) dot products of gradients, nats per token per unit of learning rate
    starts: Any  # (windows,) position of each in the training tokens


def influence(subject: Subject) -> Influence:
    """`derivatives.influence` of windows of the training tokens on the first window of the text."""
    windows, starts = subject.windows(WINDOWS, subject.effort.windows)
    return Influence(subject.measure(derivatives.influence, windows, subject.first)[0], starts)


def lens(subject: Subject) -> inside.Lens:
    """`inside.lens` of the first window of the text, (L + 1, 1, T) each."""
    return jax.jit(partial(inside.lens, subject.config.model))(subject.params, subject.first)


class Attention(NamedTuple):
    """On the first window of the text."""

    maps: Any  # (L, H, T, T)
    entropy: Any  # (L, H) nats, mean over tokens; its exponential is about the number of tokens that a head attends to
    uniform: Any  # () entropy of uniform attention
    distance: Any  # (L, H) mean distance to the key, in tokens


def attention(subject: Subject) -> Attention:
    """`inside.attention_maps` of the first window of the text, with their entropy and distance."""
    config, idx = subject.config.model, subject.first.inputs
    maps = jax.jit(partial(inside.attention_maps, config))(subject.params, idx)[:, 0]
    t = jnp.arange(idx.shape[1])
    distance = (maps * (t[:, None] - t[None])[None, None]).sum(axis=-1)
    uniform = jnp.log(jnp.minimum(t + 1, config.window or config.block_size)).mean()
    return Attention(maps, jax.scipy.special.entr(maps).sum(axis=-1).mean(axis=-1), uniform, distance.mean(axis=-1))


def tokens(subject: Subject) -> inside.Scores:
    """`inside.token_scores` of the text, in windows that overlap by half: beyond the first window, each token has at
    least half a context before it."""
    config = subject.config.model
    half = max(1, min(config.block_size, len(subject.text) - 1) // 2)
    return inside.token_scores(config, subject.params, subject.text, min(5, config.vocab_size), half)


DIAGNOSES: dict[str, Callable[[Subject], Any]] = {
    each.__name__: each for each in (noise, curvature, landscape, influence, lens, attention, tokens)
}


def require(config: Config, effort: Effort, names: Sequence[str], text: Ids) -> None:
    """Raise a UsageError, before anything is compiled, if a number is out of range, the text is too short, a bigram has
    no attention, or the Lanczos vectors do not fit into memory."""
    for name, low in {"windows": 3, "batch": 1, "steps": 2, "seed": 0}.items():
        if not low <= getattr(effort, name) < 2**32:
            found = f"{name} is {getattr(effort, name)}"
            raise UsageError(f"{found}, expected at least {low}, and below 2**32: --{name} {low}")
    if len(text) < 2:
        raise UsageError(f"the text has {count(len(text), 'token')}, expected at least 2: --text TEXT")
    if "attention" in names and config.model.kind == "bigram":
        raise UsageError("a bigram has no attention: leave it out of --only")
    free, vector = memory.available(), cost.FLOAT * cost.n_params(config.model)
    if "curvature" in names and free is not None and vector * (effort.steps + 6) > free:
        raise UsageError(
            f"{effort.steps} Lanczos steps need as many vectors of {size(vector)}, {size(free)} is free: "
            f"try --steps {max(2, free // vector - 6)}, or leave curvature out of --only"
        )
