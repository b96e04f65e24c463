"""How the next token is drawn from its logits."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxgpt import filters
from jaxgpt.config import ModelConfig, UsageError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "min_p"],
    meta_fields=["top_k", "n_ids"],
)
@dataclass(frozen=True)
class Draw:
    """The filters between logits and a token, in this order; those that are None are not compiled either."""

    temperature: jax.Array | float | None
    """None: the most likely token, whatever else is set."""
    top_k: int
    top_p: jax.Array | float | None
    min_p: jax.Array | float | None
    n_ids: int

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """(B, V) logits and (B,) keys -> (B,) int32 tokens."""
        logits = logits[:, : self.n_ids]
        if self.temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filters.top_k(filters.temperature(logits, self.temperature), self.top_k)
        if self.top_p is not None:
            logits = filters.top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = filters.min_p(logits, self.min_p)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def draw(
    config: ModelConfig,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    n_ids: int = 0,
) -> Draw:
    """A checked `Draw`.

    Args:
      temperature: below 1 sharper, above 1 flatter; 0 takes the most likely token.
      top_k: draw from the k most likely tokens only; 0 from all.
      top_p: draw from the fewest of the most likely tokens that reach this probability together; 1 from all.
      min_p: draw from tokens at least this many times as likely as the most likely one; 0 from all.
      n_ids: draw ids below this only, where the model's vocabulary is padded beyond the tokenizer's; 0 for all V.

    Raises:
      UsageError: a number out of range.
    """
    if temperature != 0 and not 1e-4 <= temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}, expected 0 or a number from 1e-4 up")
    if top_k < 0:
        raise UsageError(f"top_k is {top_k}, expected 0 (all) or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}, expected a number above 0, up to 1 (all)")
    if not 0 <= min_p <= 1:
        raise UsageError(f"min_p is {min_p}, expected a number from 0 (all) to 1")
    if not 0 <= n_ids <= config.vocab_size:
        raise UsageError(f"n_ids is {n_ids}, expected 0 (all) to the model's {config.vocab_size}")
    n_ids = n_ids or config.vocab_size
    if temperature == 0:  # one program, whatever else was asked for
        return Draw(None, 0, None, None, n_ids)
    return Draw(float(temperature), top_k, float(top_p) if top_p < 1 else None, float(min_p) or None, n_ids)
