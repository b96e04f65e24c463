"""Multi-head attention: the projections of keys, queries and values, and back."""

import flax.linen as nn
import jax

from jaxgpt import cache, kernels, layers, sharding
from jaxgpt import matmul as numerics
from jaxgpt.attention import attention_weights, causal_mask, rotate
from jaxgpt.config import ModelConfig


class MultiHeadAttention(nn.Module):
    """H heads side by side, and a projection back to C channels."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        idx: jax.Array | None = None,
        start: jax.Array | int | None = None,
    ) -> jax.Array:
        """(B, T, C) -> (B, T, C).

        Args:
          idx: (B, T), the tokens, for value_embed.
          start: the position of the first token, where those before it are in the cache, Flax's collection "cache".
            None: 0, and no cache.
        """
        cfg = self.config
        B, T, C = x.shape
        H, D = cfg.n_head, C // cfg.n_head
        kv = cfg.n_kv_head or H
        query = layers.dense(cfg, C, "query")
        key, value = (layers.dense(cfg, kv * D, name) for name in ("key", "value"))

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(B, T, -1, D).swapaxes(1, 2)  # (B, H or kv, T, D)

        q, k, v = layers.joined(x, [query, key, value])
        if cfg.value_embed and idx is not None:
            table = layers.embed(cfg.vocab_size, kv * D, "value_embed", stddev=0.0)
            v = v + (sharding.rows(table.embedding, idx) if start is None else table(idx))
        # Where the context is split, each device has its queries, and the keys and values of all tokens.
        q = sharding.constrain(heads(q), "batch", "width", "time", None)
        k, v = (sharding.constrain(heads(x), "batch", "width", None, None) for x in (k, v))
        if cfg.qk_norm:
            q, k = numerics.rms_norm(q), numerics.rms_norm(k)
        if cfg.position == "rope":
            first = 0 if start is None else start
            q, k = rotate(q, first), rotate(k, first)
        drop = layers.dropout(self, "drop_weights") if layers.drops(self) else None
        if self.is_mutable_collection("attention_maps"):
            out = self.shown_attention(q, k, v)
        elif start is None:
            out = kernels.causal_attention(cfg, q, k, v, drop)
        else:
            out = self.cached_attention(q, k, v, start)
        out = out.swapaxes(1, 2).reshape(B, T, C)
        return layers.dropout(self, "drop_out")(layers.residual(cfg, "c_proj")(out))

    def shown_attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The reference attention, (B, H, T, D), which leaves its weights in Flax's collection "attention_maps"."""
        cfg, (H, T) = self.config, q.shape[1:3]
        mask = causal_mask(T, cfg.window)[None, None]
        weights = attention_weights(q, kernels.repeated(k, H), mask, precision=cfg.precision)
        self.sow("attention_maps", "weights", weights)
        return numerics.matmul(weights, kernels.repeated(v, H), cfg.precision)

    def cached_attention(self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int) -> jax.Array:
        """Causal attention of T new tokens to themselves and to the cache, which remembers them: (B, H, T, D)."""
        keys: nn.Variable[jax.Array] = self.variable("cache", "keys")
        values: nn.Variable[jax.Array] = self.variable("cache", "values")
        keys.value, values.value = cache.remember(keys.value, k, start), cache.remember(values.value, v, start)
        if isinstance(start, int) and start == 0:  # nothing to look back on: as fast as without a cache
            return kernels.causal_attention(self.config, q, k, v)
        return cache.look_back(self.config, q, keys.value, values.value, start)
