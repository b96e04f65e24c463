"""The bigram model of the notes: each token reads the logits of the next one directly off a table."""

import flax.linen as nn
import jax

from jaxgpt import sharding
from jaxgpt.cache import Cache
from jaxgpt.config import ModelConfig
from jaxgpt.loss import token_losses


class Bigram(nn.Module):
    """An embedding of size (V, V), normal(1) at the start as PyTorch's `nn.Embedding`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        idx: jax.Array,
        targets: jax.Array | None = None,
        cache: Cache | None = None,
        length: jax.Array | int | None = None,
    ) -> jax.Array:
        """(B, T) ids -> (B, T, V) logits; with targets (B, T), the loss of each, (B, T).

        With a cache, which is nothing to it, the logits of the token `length` - 1 alone, (B, V).
        """
        V = self.config.vocab_size
        table = nn.Embed(V, V, embedding_init=nn.initializers.normal(1.0), name="token_embedding_table")
        if length is not None:
            idx = jax.lax.dynamic_index_in_dim(idx, length - 1, axis=1, keepdims=False)
        logits = sharding.rows(table.embedding, idx) if cache is None else table(idx)
        if cache is None:
            logits = sharding.constrain(logits, "batch", "time", None)  # else each device would compute all of them
        return logits if targets is None else token_losses(logits, targets)
