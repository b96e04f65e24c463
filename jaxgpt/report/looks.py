"""What a run's weights show: samples, losses token by token, and attention."""

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
from jaxgpt.diagnostics.inside import attention_maps, token_scores
from jaxgpt.display.baselines import Limits, limits
from jaxgpt.display.text import token_texts
from jaxgpt.run import Run
from jaxgpt.sample import SamplingParams, write
from jaxgpt.start import load_checkpoint
from jaxgpt.step import init_state
from jaxgpt.tokenizer import Ids, Tokenizer

SEED, TEMPERATURE, PROMPT, WRITTEN = 1337, 0.8, 16, 300
"""A report samples WRITTEN tokens after a prompt of PROMPT."""
READ, ALTERNATIVES = 480, 5
"""Tokens of the passage, and alternatives shown for each."""
WEIGHTS = 2**18
"""Attention weights in a report, at most: a large model shows fewer tokens."""


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


@dataclass
class Looks:
    """What was available; `missing` gives the reason for each part that was not."""

    step: int | None = None
    """Of the weights."""
    samples: list[Sample] = field(default_factory=list)
    limits: Limits | None = None
    passage: Passage | None = None
    attention: Attention | None = None
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
    model, tokenizer = run.config.model, run.tokenizer
    train, val = corpus.split(run.config.data) if corpus else (None, None)
    if train is not None and val is not None:
        looks.limits = limits(train, val, tokenizer.vocab_size)
    if not found:
        return looks
    looks.step, params = found
    looks.samples = attempt("samples", lambda: samples(run, None if val is None else tokenizer.decode(val[:PROMPT])))
    if val is not None:
        looks.passage = attempt("passage", lambda: read(model, params, val, tokenizer))
        if model.kind == "gpt":
            looks.attention = attempt("attention", lambda: attend(model, params, val, tokenizer))
    return looks


def steps(run: Run) -> list[int]:
    """The steps whose weights are available: the kept checkpoints, and 0, which is initialised again."""
    saved = Checkpoints(run.checkpoints).steps
    imported = any(event["event"] == "import" for event in run.events())
    return saved if imported else sorted({0, *saved})


def samples(run: Run, prompt: str | None) -> list[Sample]:
    """One text for each of `steps`, all with the same seed and prompt."""
    found = []
    for step in steps(run):
        try:
            fresh = step == 0 and step not in Checkpoints(run.checkpoints).steps
            params = init_state(run.config).params if fresh else load_checkpoint(run, step)[1]
        except (CheckpointError, UsageError):  # it was pruned just now
            continue
        config, tokenizer = run.config.model, run.tokenizer
        (pieces,) = write(config, params, tokenizer, prompt, WRITTEN, SamplingParams(TEMPERATURE), seed=SEED)
        found.append(Sample(step, next(pieces), "".join(pieces)))
    return found


def read(model: ModelConfig, params: model.Params, val: Ids, tokenizer: Tokenizer) -> Passage:
    """The first READ tokens of the validation split (M,) that have at least half of block_size before them."""
    half = max(1, model.block_size // 2)
    text = np.asarray(val[: half + READ])
    half = min(half, len(text) - 1)
    k, names = min(ALTERNATIVES, tokenizer.vocab_size), token_texts(tokenizer)
    scores = token_scores(model, params, text, k, half)
    likely = [
        [(names[i], float(p)) for i, p in zip(*pair, strict=True) if i < len(names)]  # ids may be padded
        for pair in zip(scores.ids[half - 1 :], scores.probabilities[half - 1 :], strict=True)
    ]
    return Passage([names[i] for i in text[half:]], scores.losses[half - 1 :].tolist(), likely)


def attend(model: ModelConfig, params: model.Params, val: Ids, tokenizer: Tokenizer) -> Attention:
    """The attention maps of the beginning of `val` (M,)."""
    T = max(2, min(model.block_size, 64, math.isqrt(2 * WEIGHTS // (model.n_layer * model.n_head))))
    ids, names = np.asarray(val[:T], np.int32), token_texts(tokenizer)
    maps = jax.jit(attention_maps, static_argnums=0)(model, params, jnp.asarray(ids)[None])
    return Attention([names[i] for i in ids], np.asarray(maps[:, 0], np.float32))
