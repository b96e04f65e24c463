"""What a run's weights show: samples, losses token by token, attention and embeddings."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxgpt import model
from jaxgpt.checkpoint import CheckpointError, Checkpoints
from jaxgpt.cli.runs import corpus_of
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.corpus import Corpus
from jaxgpt.diagnostics.inside import exact_maps, token_scores
from jaxgpt.display.baselines import Limits, limits, occurrences, stretches
from jaxgpt.display.text import token_texts
from jaxgpt.run import Run
from jaxgpt.sample import SamplingParams, write
from jaxgpt.start import load_checkpoint
from jaxgpt.step import init_state
from jaxgpt.tokenizer import Ids, Tokenizer

SEED, TEMPERATURE, PROMPT, WRITTEN = 1337, 0.8, 16, 300
"""How a report samples: PROMPT tokens are given, WRITTEN are sampled after them."""
READ, ALTERNATIVES = 480, 5
"""Tokens of the passage, and how many alternatives are shown for each."""
WEIGHTS = 2**18
"""Attention weights in a report, at most: for large models, of fewer tokens."""
SHOWN, NEAR = 200, 5
"""How many of the most frequent tokens are shown by their embeddings, and how many neighbours of each."""


Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sample:
    """A sample after `step` steps."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of the validation split, with their losses in nats."""

    tokens: list[str]
    losses: list[float]
    likely: list[list[tuple[str, float]]]
    """For each, the most likely tokens in its place, with their probabilities."""


@dataclass(frozen=True)
class Attention:
    """The attention maps of one text."""

    tokens: list[str]
    weights: NDArray[np.float32]  # (L, H, T, T)


@dataclass(frozen=True)
class Embedding:
    """The most frequent tokens, their places in the plane, and their nearest neighbours."""

    tokens: list[str]
    points: Floats  # (N, 2)
    shares: tuple[float, float]
    """Share of the variance along each axis of the plane."""
    near: list[list[tuple[str, float]]]
    """For each, its neighbours with their cosines."""


@dataclass
class Looks:
    """What was available; `missing` gives the reason for each part that was not."""

    step: int | None = None
    """Of the weights."""
    samples: list[Sample] = field(default_factory=list)
    limits: Limits | None = None
    passage: Passage | None = None
    attention: Attention | None = None
    embedding: Embedding | None = None
    missing: dict[str, str] = field(default_factory=dict)


def look(run: Run, data_dir: Path) -> Looks:
    """Look at the best checkpoint of `run`; a part that is not available is left out, with the reason."""
    looks = Looks()

    def attempt(name: str, get: Callable[[], Any]) -> Any:
        try:
            return get()
        except (ValueError, RuntimeError, OSError) as error:
            looks.missing[name] = str(error)
            return None

    corpus: Corpus | None = attempt("tokens", lambda: corpus_of(run, data_dir))
    found = attempt("weights", lambda: load_checkpoint(run))
    config, V = run.config.model, run.tokenizer.vocab_size
    train, val = corpus.split(run.config.data) if corpus else (None, None)
    if train is not None and val is not None:
        looks.limits = limits(train, val, V)
    if not found:
        return looks
    looks.step, params = found
    start = 0 if val is None else place(val, run.tokenizer, READ, config.block_size)
    prompt = None if val is None else run.tokenizer.decode(val[start : start + PROMPT])
    looks.samples = attempt("samples", lambda: samples(run, prompt)) or []
    looks.embedding = attempt("embedding", lambda: embedded(config, params, run.tokenizer, frequent(train, V, SHOWN)))
    if val is not None:
        looks.passage = attempt("passage", lambda: read(config, params, val, start, run.tokenizer))
        if config.kind == "gpt":
            looks.attention = attempt("attention", lambda: attend(config, params, val[start:], run.tokenizer))
    return looks


def place(val: Ids, tokenizer: Tokenizer, n: int, T: int) -> int:
    """Where to read about `n` tokens of `val` (M,): of 32 evenly spaced places the one with the most letters, moved to
    the start of a line if that leaves room for a window of T inputs and a target."""
    letters = np.array([sum(map(str.isalpha, data.decode("utf-8", "ignore"))) for data in tokenizer.token_bytes])
    ends = np.array([data.endswith(b"\n") for data in tokenizer.token_bytes])
    last = max(0, len(val) - T - 1)
    starts = np.linspace(0, min(last, max(0, len(val) - n)), 32).astype(int)
    start = max(starts, key=lambda start: letters[val[start : start + n]].sum())
    line = start + np.flatnonzero(ends[val[start : start + n // 4]])[:1] + 1
    return int(line[0] if line.size and line[0] <= last else start)


def steps(run: Run) -> list[int]:
    """The steps whose weights are available: the kept checkpoints, and 0, which is initialised again."""
    saved = Checkpoints(run.checkpoints).steps
    imported = any(event["event"] == "import" for event in run.events())
    return saved if imported else sorted({0, *saved})


def samples(run: Run, prompt: str | None) -> list[Sample]:
    """One text for each of `steps`, all with the same seed and prompt."""
    config, tokenizer, found = run.config.model, run.tokenizer, []
    for step in steps(run):
        try:
            fresh = step == 0 and step not in Checkpoints(run.checkpoints).steps
            params = init_state(run.config).params if fresh else load_checkpoint(run, step)[1]
        except (CheckpointError, UsageError):  # it was pruned just now
            continue
        (pieces,) = write(config, params, tokenizer, prompt, WRITTEN, SamplingParams(TEMPERATURE), seed=SEED)
        found.append(Sample(step, next(pieces), "".join(pieces)))
    return found


def read(config: ModelConfig, params: model.Params, val: Ids, start: int, tokenizer: Tokenizer) -> Passage:
    """About READ tokens of the validation split (M,) from `start` on, each predicted from at least half of block_size
    before it: near the beginning of the split they start a little later."""
    half = max(1, config.block_size // 2)
    before = max(0, start - half)
    text = np.asarray(val[before : start + READ])
    first = min(max(start - before, half), len(text) - 1)
    k, stride = min(ALTERNATIVES, tokenizer.vocab_size), min(half, len(text) - 1)
    found, names = token_scores(config, params, text, k, stride), token_texts(tokenizer)
    likely = [
        [(names[i], float(p)) for i, p in zip(ids, chances, strict=True) if i < len(names)]  # V may be rounded up
        for ids, chances in zip(found.ids[first - 1 :], found.probabilities[first - 1 :], strict=True)
    ]
    return Passage([names[i] for i in text[first:]], found.losses[first - 1 :].tolist(), likely)


def attend(config: ModelConfig, params: model.Params, val: Ids, tokenizer: Tokenizer) -> Attention:
    """The attention maps of the beginning of `val` (M,)."""
    T = max(2, min(config.block_size, 64, math.isqrt(2 * WEIGHTS // (config.n_layer * config.n_head))))
    ids = np.asarray(val[:T], np.int32)
    maps = jax.jit(exact_maps, static_argnums=0)(config, params, jnp.asarray(ids)[None])
    names = token_texts(tokenizer)
    return Attention([names[i] for i in ids], np.asarray(maps[:, 0], np.float32))


def embedded(config: ModelConfig, params: model.Params, tokenizer: Tokenizer, ids: Ids) -> Embedding:
    """The embeddings of the tokens `ids` (N,), among each other."""
    rows = table(config, params)[ids]
    texts, (near, cosines) = token_texts(tokenizer), neighbours(rows, NEAR)
    names = [texts[i] for i in ids]
    pairs = [[(names[j], float(c)) for j, c in zip(*both, strict=True)] for both in zip(near, cosines, strict=True)]
    return Embedding(names, *project(rows), pairs)


def table(config: ModelConfig, params: model.Params) -> Floats:
    """The embedding of each token, (V, C); for a bigram its table of logits, (V, V)."""
    rows = params["token_embedding_table" if config.kind == "bigram" else "wte"]["embedding"]
    return np.asarray(rows, np.float64)


def project(rows: Floats) -> tuple[Floats, tuple[float, float]]:
    """`rows` (N, C) at their two principal components, (N, 2), and the share of the variance along each."""
    centred = rows - rows.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    total = max(float(variances.sum()), np.finfo(float).tiny)
    first, second = axes[:, -1], axes[:, -2] if axes.shape[1] > 1 else np.zeros(1)
    points = centred @ np.stack([first, second], axis=1)
    points *= np.where(
        points[np.abs(points).argmax(axis=0), [0, 1]] < 0, -1, 1
    )  # the sign of an axis is arbitrary: fix it
    return points, (float(variances[-1] / total), float(sum(variances[-2:-1]) / total))


def neighbours(rows: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """The k nearest other rows of each of `rows` (N, C) by cosine, the nearest first: indices and cosines, (N, k)."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(k, len(rows) - 1)]
    return nearest, np.take_along_axis(cosines, nearest, axis=1)


def frequent(tokens: Ids | None, V: int, n: int) -> Ids:
    """The n most frequent ids of `tokens`, the most frequent first; without tokens, the first n."""
    counts = np.zeros(V) if tokens is None else occurrences(stretches(tokens), V)
    return np.argsort(-counts, kind="stable")[: min(n, max(2, np.count_nonzero(counts) or V))]
