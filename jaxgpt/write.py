"""Prompts in, text out: ids turned into characters as they come."""

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.generate import generate, stream
from jaxgpt.model import Params
from jaxgpt.tokenizer import Tokenizer, as_prepared, encode_typed, without_unknown


def write(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | bytes | None,
    n_tokens: int,
    *,
    temperature: float = 0.8,
    stop: Sequence[str] = (),
    seed: int = 1337,
    samples: int = 1,
    unknown: str = "error",
    **how: Any,
) -> Iterator[Iterator[str]]:
    """`samples` texts that begin with `prompt`, each as pieces of text; a single one streams while it is made.

    Args:
      prompt: None for a line feed, or the first character of a vocabulary that has none; bytes need not be UTF-8.
        Its line ends, and those of `stop`, become those of the training text.
      stop: a text ends before the first of these that is written after the prompt.
      how: top_k, top_p and min_p, as `generate` takes them.

    Raises:
      UsageError: an empty prompt, one with characters outside the vocabulary, an empty stop, or a number out of range.
    """
    if prompt is None:
        prompt = "\n" if tokenizer.knows("\n").all() else tokenizer.decode([0])
    stop = [as_prepared(tokenizer, each) for each in stop]
    if isinstance(prompt, str):
        prompt = as_prepared(tokenizer, prompt)
    if unknown == "skip" and isinstance(prompt, str):
        prompt = without_unknown(tokenizer, prompt)
    if not prompt:
        raise UsageError("the prompt is empty, expected at least one character of the vocabulary: --prompt TEXT")
    if samples < 1 or not 0 <= seed < 2**32:
        raise UsageError(f"samples is {samples}, expected 1 or more; seed is {seed}, expected 0 to 2**32 - 1")
    if "" in stop:
        raise UsageError("stop is '', expected at least one character: --stop TEXT")
    if any(re.search("[\ud800-\udfff]", each) for each in stop):
        raise UsageError(f"stop is {list(stop)}, expected UTF-8, as all that is written: --stop TEXT")
    prompt_ids = encode_typed(tokenizer, prompt)
    written = prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids)
    ids = np.tile(prompt_ids, (samples, 1))
    given: dict[str, Any] = {"temperature": temperature, "n_ids": tokenizer.vocab_size, **how}
    key = jax.random.key(seed)
    if samples == 1:
        pieces = (piece[0] for piece in stream(config, params, ids, n_tokens, key, **given))
        yield _texts(tokenizer, written, pieces, stop)
    else:
        for row in np.asarray(generate(config, params, ids, n_tokens, key, **given)):
            yield _texts(tokenizer, written, iter([row]), stop)


def _texts(tokenizer: Tokenizer, prompt: str, pieces: Iterator[Any], stop: Sequence[str] = ()) -> Iterator[str]:
    """The prompt, then each piece of ids as text, up to a `stop`."""
    yield prompt
    yield from until(_decoded(tokenizer, pieces), stop)


def _decoded(tokenizer: Tokenizer, pieces: Iterator[Any]) -> Iterator[str]:
    """Each piece of ids as text; a character whose bytes are split waits for its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    token_bytes = tokenizer.token_bytes
    for ids in pieces:
        yield decoder.decode(b"".join(token_bytes[i] for i in ids))
    yield decoder.decode(b"", final=True)


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` up to where the first `stop` to be complete begins; no piece after that is asked for.

    An end of the text that a stop may begin with waits for what follows it.

    >>> list(until(iter(["one t", "wo th", "ree"]), ["two"]))
    ['one ', '']
    >>> list(until(iter(["one t", "en"]), ["two"]))
    ['one ', 'ten', '']
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(start + len(each), start) for each in stop if (start := held.find(each)) >= 0]
        if found:
            yield held[: min(found)[1]]
            return
        # The longest end of the text that is the beginning of a stop.
        waits = max((n for each in stop for n in range(1, len(each)) if held.endswith(each[:n])), default=0)
        cut = len(held) - waits
        yield held[:cut]
        held = held[cut:]
    yield held
