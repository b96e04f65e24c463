"""Prompts in, text out: ids turned into characters as they come."""

import codecs
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.nn import Params
from jaxgpt.sampling.generate import generate, stream
from jaxgpt.text.tokenizer import Tokenizer, without_unknown


def write(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | None,
    n_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 1337,
    samples: int = 1,
    unknown: str = "error",
) -> Iterator[Iterator[str]]:
    """`samples` texts that begin with `prompt`, each as pieces of text; a single one streams while it is made.

    Args:
      prompt: None for a line feed, or the first character of a vocabulary that has none.

    Raises:
      UsageError: an empty prompt, one with characters outside the vocabulary, or a number out of range.
    """
    if prompt is None:
        prompt = "\n" if tokenizer.knows("\n").all() else tokenizer.decode([0])
    if unknown == "skip":
        prompt = without_unknown(tokenizer, prompt)
    if not prompt:
        raise UsageError("the prompt is empty, expected at least one character of the vocabulary: --prompt TEXT")
    if samples < 1 or not 0 <= seed < 2**32:
        raise UsageError(f"samples is {samples}, expected 1 or more; seed is {seed}, expected 0 to 2**32 - 1")
    ids = np.tile(tokenizer.encode(prompt), (samples, 1))
    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "n_ids": tokenizer.vocab_size}
    key = jax.random.key(seed)
    if samples == 1:
        pieces = (piece[0] for piece in stream(config, params, ids, n_tokens, key, **given))
        yield _texts(tokenizer, prompt, pieces)
    else:
        for row in np.asarray(generate(config, params, ids, n_tokens, key, **given)):
            yield _texts(tokenizer, prompt, iter([row]))


def _texts(tokenizer: Tokenizer, prompt: str, pieces: Iterator[Any]) -> Iterator[str]:
    """The prompt, then each piece of ids as text; a character whose bytes are split waits for its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    token_bytes = tokenizer.token_bytes
    yield prompt
    for ids in pieces:
        yield decoder.decode(b"".join(token_bytes[i] for i in ids))
    yield decoder.decode(b"", final=True)
