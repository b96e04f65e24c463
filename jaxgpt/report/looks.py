"""What a run's weights say when they are asked: texts, losses token by token, attention, embeddings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxgpt import model as nn
from jaxgpt.checkpoint import CheckpointError, Checkpoints
from jaxgpt.cli.runs import corpus_of
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.corpus import Corpus
from jaxgpt.diagnostics import inside
from jaxgpt.display.baselines import Limits, limits, occurrences, stretches
from jaxgpt.report import embedding
from jaxgpt.run import Run
from jaxgpt.sample import write
from jaxgpt.start import load_checkpoint
from jaxgpt.step import init_state
from jaxgpt.tokenizer import Ids, Tokenizer

SEED, TEMPERATURE, PROMPT, WRITTEN = 1337, 0.8, 16, 300
"""How a report samples, and how many tokens: those given, and those written after them."""
READ, ALTERNATIVES = 480, 5
"""Tokens of the passage, and how many alternatives are told of each."""
WEIGHTS = 2**18
"""Attention weights in a report, at most: of large models fewer tokens are looked at."""
SHOWN, NEAR = 200, 5
"""The most frequent tokens, whose embeddings are shown, and how many neighbours of each."""


@dataclass(frozen=True)
class Sample:
    """What was written after `step` steps."""

    step: int
    prompt: str
    text: str
    """What came after it."""


@dataclass(frozen=True)
class Passage:
    """`inside.Scores` with its tokens as text."""

    tokens: list[str]
    losses: list[float]
    likely: list[list[tuple[str, float]]]
    """Of each, the most likely tokens in its place, with their probabilities."""


@dataclass(frozen=True)
class Attention:
    """`inside.attention_maps` of one text."""

    tokens: list[str]
    weights: NDArray[np.float32]  # (L, H, T, T)


@dataclass(frozen=True)
class Embedding:
    """The most frequent tokens, where they lie in the plane, and who is near whom."""

    tokens: list[str]
    projection: embedding.Projection
    near: list[list[tuple[str, float]]]
    """Of each, its neighbours with their cosines."""


@dataclass
class Looks:
    """What could be had; why the rest could not stands in `missing`, by its name."""

    step: int | None = None
    """Of the weights."""
    samples: list[Sample] = field(default_factory=list)
    limits: Limits | None = None
    passage: Passage | None = None
    attention: Attention | None = None
    embedding: Embedding | None = None
    missing: dict[str, str] = field(default_factory=dict)


def look(run: Run, data_dir: Path) -> Looks:
    """All looks at the best checkpoint of `run`. What is not to be had yet, or here, is said and left out."""
    looks = Looks()

    def attempt(name: str, get: Callable[[], Any]) -> Any:
        try:
            return get()
        except (ValueError, RuntimeError, OSError) as error:
            looks.missing[name] = str(error)
            return None

    corpus: Corpus | None = attempt("tokens", lambda: corpus_of(run, data_dir))
    found = attempt("weights", lambda: load_checkpoint(run))
    model, V = run.config.model, run.tokenizer.vocab_size
    train, val = corpus.split(run.config.data) if corpus else (None, None)
    if train is not None and val is not None:
        looks.limits = limits(train, val, V)
    if not found:
        return looks
    looks.step, params = found
    start = 0 if val is None else place(val, run.tokenizer, READ, model.block_size)
    prompt = None if val is None else run.tokenizer.decode(val[start : start + PROMPT])
    looks.samples = attempt("samples", lambda: samples(run, prompt)) or []
    looks.embedding = attempt("embedding", lambda: embedded(model, params, run.tokenizer, frequent(train, V, SHOWN)))
    if val is not None:
        looks.passage = attempt("passage", lambda: read(model, params, val, start, run.tokenizer))
        if model.kind == "gpt":
            looks.attention = attempt("attention", lambda: attend(model, params, val[start:], run.tokenizer))
    return looks


def place(val: Ids, tokenizer: Tokenizer, n: int, T: int) -> int:
    """Where to read about `n` tokens of `val` (M,): of 32 places evenly apart, the one with the most letters, where a
    line begins if then there is a window of T inputs and a target left."""
    letters = np.array([sum(map(str.isalpha, data.decode("utf-8", "ignore"))) for data in tokenizer.token_bytes])
    ends = np.array([data.endswith(b"\n") for data in tokenizer.token_bytes])
    last = max(0, len(val) - T - 1)
    starts = np.linspace(0, min(last, max(0, len(val) - n)), 32).astype(int)
    start = max(starts, key=lambda start: letters[val[start : start + n]].sum())
    line = start + np.flatnonzero(ends[val[start : start + n // 4]])[:1] + 1
    return int(line[0] if line.size and line[0] <= last else start)


def steps(run: Run) -> list[int]:
    """The steps whose weights can be had: the kept checkpoints, and 0, which is computed anew."""
    saved = Checkpoints(run.checkpoints).steps
    imported = any(event["event"] == "import" for event in run.events())
    return saved if imported else sorted({0, *saved})


def samples(run: Run, prompt: str | None) -> list[Sample]:
    """One text by each of `steps`, all with the same seed, and the same beginning if it can be encoded."""
    model, tokenizer, found = run.config.model, run.tokenizer, []
    for step in steps(run):
        try:
            fresh = step == 0 and step not in Checkpoints(run.checkpoints).steps
            params = init_state(run.config).params if fresh else load_checkpoint(run, step)[1]
        except (CheckpointError, UsageError):  # it has just made room for a newer one
            continue
        (pieces,) = write(model, params, tokenizer, prompt, WRITTEN, temperature=TEMPERATURE, seed=SEED)
        found.append(Sample(step, next(pieces), "".join(pieces)))
    return found


def read(model: ModelConfig, params: nn.Params, val: Ids, start: int, tokenizer: Tokenizer) -> Passage:
    """The validation split from `start` on, or from a little later, token by token."""
    T, half, V = model.block_size, max(1, model.block_size // 2), tokenizer.vocab_size
    before = max(0, start - T + T // 2 - 1)
    windows = min(-(-READ // half), (len(val) - before - 1 - T) // half + 1)
    if windows < 1:
        raise ValueError(f"{len(val) - before} tokens hold no window of {T} inputs and a target")
    ids = val[before : before + (windows - 1) * half + T + 1]
    found = inside.token_scores(model, params, ids, min(ALTERNATIVES, V), half, V)
    names, first = Names(tokenizer), T - half  # of the first window, the first half is context only
    likely = [
        [(names[i], float(p)) for i, p in zip(*both, strict=True)]
        for both in zip(found.ids[first:], found.probabilities[first:], strict=True)
    ]
    return Passage([names[i] for i in ids[1 + first :]], found.losses[first:].tolist(), likely)


def attend(model: ModelConfig, params: nn.Params, val: Ids, tokenizer: Tokenizer) -> Attention:
    """Who looks at whom in the beginning of `val` (M,)."""
    T = max(2, min(model.block_size, 64, math.isqrt(2 * WEIGHTS // (model.n_layer * model.n_head))))
    ids = np.asarray(val[:T], np.int32)
    maps = jax.jit(inside.attention_maps, static_argnums=0)(model, params, jnp.asarray(ids)[None])
    names = Names(tokenizer)
    return Attention([names[i] for i in ids], np.asarray(maps[:, 0], np.float32))


def embedded(model: ModelConfig, params: nn.Params, tokenizer: Tokenizer, ids: Ids) -> Embedding:
    """The embeddings of the tokens `ids` (N,), among each other."""
    rows = embedding.table(model, params)[ids]
    names, (near, cosines) = Names(tokenizer), embedding.neighbours(rows, NEAR)
    return Embedding(
        [names[i] for i in ids],
        embedding.project(rows),
        [[(names[ids[j]], float(c)) for j, c in zip(*both, strict=True)] for both in zip(near, cosines, strict=True)],
    )


def frequent(tokens: Ids | None, V: int, n: int) -> Ids:
    """The n most frequent ids of `tokens`, the most frequent first; the first n where there are none."""
    counts = np.zeros(V) if tokens is None else occurrences(stretches(tokens), V)
    return np.argsort(-counts, kind="stable")[: min(n, max(2, np.count_nonzero(counts) or V))]


class Names:
    """What each id stands for, as text: bytes that are no UTF-8 by themselves as \\xNN."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes: Sequence[bytes] = tokenizer.token_bytes

    def __getitem__(self, id: Any) -> str:
        return self._bytes[int(id)].decode("utf-8", "backslashreplace")
