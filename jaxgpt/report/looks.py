"""What a report shows of a run's weights: samples, the loss of each token of a passage, and attention."""

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxgpt import model
from jaxgpt.checkpoint import CheckpointError, Checkpoints
from jaxgpt.cli.runs import corpus_of
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.diagnostics.inside import attention_maps, token_scores
from jaxgpt.display.baselines import ngram_losses
from jaxgpt.display.text import token_texts
from jaxgpt.run import Run
from jaxgpt.sample import SamplingParams, write
from jaxgpt.start import load_checkpoint
from jaxgpt.step import init_state
from jaxgpt.tokenizer import Ids, Tokenizer

SEED, TEMPERATURE, PROMPT, WRITTEN = 1337, 0.8, 16, 300
"""Of the samples; each has WRITTEN tokens after a prompt of PROMPT."""
READ, ALTERNATIVES = 480, 5
"""Tokens of the passage, and likely tokens shown for each."""
WEIGHTS = 2**18
"""Most attention weights in a report: of a large model it shows fewer tokens."""


class Sample(NamedTuple):
    step: int
    prompt: str
    text: str  # after the prompt


@dataclass
class Looks:
    """What a report shows of a run's tokens and weights, as far as they are available."""

    samples: list[Sample] = field(default_factory=list)
    ngrams: dict[str, float] = field(default_factory=dict)  # nats per token of each baseline
    passage: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)  # section -> why it is unavailable


def look(run: Run, data_dir: Path) -> Looks:
    """Look at the best checkpoint of `run`. Sections that are unavailable are in `missing`."""
    looks = Looks()

    def attempt(name: str, get: Callable[[], Any]) -> Any:
        try:
            return get()
        except (ValueError, RuntimeError, OSError) as error:
            looks.missing[name] = str(error)
            return None

    corpus = attempt("tokens", lambda: corpus_of(run, data_dir))
    weights = attempt("weights", lambda: load_checkpoint(run))
    model, tokenizer, val = run.config.model, run.tokenizer, None
    if corpus:
        train, val = corpus.split(run.config.data)
        looks.ngrams = ngram_losses(train, val, tokenizer.vocab_size)
    if weights:
        looks.samples = attempt("samples", lambda: samples(run, val)) or []
    if weights and val is not None:
        _, params = weights
        looks.passage = attempt("passage", lambda: read(model, params, val, tokenizer))
        if model.kind == "gpt":
            looks.attention = attempt("attention", lambda: attend(model, params, val, tokenizer))
    return looks


def steps(run: Run) -> list[int]:
    """The steps whose weights are available: the kept checkpoints, and 0, which can be initialized again."""
    saved = Checkpoints(run.checkpoints).steps
    imported = any(event["event"] == "import" for event in run.events())
    return saved if imported else sorted({0, *saved})


def samples(run: Run, val: Ids | None) -> list[Sample]:
    """A sample for each of `steps`, all with the same seed and, if there are tokens, the beginning of `val` (M,)."""
    # A split, or the prompt, may begin or end within a character; a U+FFFD would be another text.
    prompt = None if val is None else run.tokenizer.decode(val[:PROMPT]).strip("\ufffd") or None
    found, config, saved = [], run.config, Checkpoints(run.checkpoints).steps
    for step in steps(run):
        try:
            params = load_checkpoint(run, step)[1] if step or step in saved else init_state(config).params
        except (CheckpointError, UsageError):  # it was pruned just now
            continue
        (pieces,) = write(config.model, params, run.tokenizer, prompt, WRITTEN, SamplingParams(TEMPERATURE), seed=SEED)
        found.append(Sample(step, next(pieces), "".join(pieces)))
    return found


def read(model: ModelConfig, params: model.Params, val: Ids, tokenizer: Tokenizer) -> dict[str, Any]:
    """The first READ tokens of `val` (M,) after half a context, each scored with at least that much context: the texts
    of the "tokens", their "losses" in nats, and the "likely" tokens in each place with their probabilities."""
    half = max(1, model.block_size // 2)
    text = np.asarray(val[: half + READ])
    half = min(half, len(text) - 1)
    k, names = min(ALTERNATIVES, tokenizer.vocab_size), token_texts(tokenizer)
    scores = token_scores(model, params, text, k, half)
    likely = [
        [(names[i], round(float(p), 6)) for i, p in zip(*pair, strict=True) if i < len(names)]  # ids may be padded
        for pair in zip(scores.ids[half - 1 :], scores.probabilities[half - 1 :], strict=True)
    ]
    losses = [round(loss, 5) for loss in scores.losses[half - 1 :].tolist()]
    return {"tokens": [names[i] for i in text[half:]], "losses": losses, "likely": likely}


def attend(model: ModelConfig, params: model.Params, val: Ids, tokenizer: Tokenizer) -> dict[str, Any]:
    """The attention maps of the first tokens of `val` (M,), `packed`."""
    T = min(model.block_size, 64, max(2, math.isqrt(2 * WEIGHTS // (model.n_layer * model.n_head))))
    ids, names = np.asarray(val[:T], np.int32), token_texts(tokenizer)
    maps = jax.jit(attention_maps, static_argnums=0)(model, params, jnp.asarray(ids)[None])
    return packed([names[i] for i in ids], np.asarray(maps[:, 0], np.float32))


def packed(tokens: list[str], weights: NDArray[np.floating]) -> dict[str, Any]:
    """Attention (L, H, T, T) as page.js reads it: a byte for each weight up to the diagonal, by layer, head and row."""
    L, H, T, _ = weights.shape
    data = np.rint(255 * weights).astype(np.uint8)[:, :, *np.tril_indices(T)].tobytes()
    return {"layers": L, "heads": H, "size": T, "tokens": tokens, "weights": base64.b64encode(data).decode()}
