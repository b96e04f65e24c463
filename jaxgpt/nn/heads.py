"""Attention heads with their projections: one as the notes write it, and many side by side."""

import flax.linen as nn
import jax

from jaxgpt.config import ModelConfig
from jaxgpt.nn import kernels, layers, numerics
from jaxgpt.nn.attention import attention, causal_mask, rotate


class Head(nn.Module):
    """One head, as the notes write it: key, query and value without bias, each C -> head_size."""

    head_size: int
    scale: float | None = None
    """As in `attention`; the notes leave it out: 1.0."""

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, head_size).

        Args:
          context: (B, S, C), where keys and values come from (cross-attention, to all of it). None: from `x` itself
            (self-attention, to the past).
        """
        source, mask = (x, causal_mask(x.shape[1])[None]) if context is None else (context, None)
        k = nn.Dense(self.head_size, use_bias=False, name="key")(source)  # (B, S, 16)
        q = nn.Dense(self.head_size, use_bias=False, name="query")(x)  # (B, T, 16)
        v = nn.Dense(self.head_size, use_bias=False, name="value")(source)
        return attention(q, k, v, mask, scale=self.scale)


class MultiHeadAttention(nn.Module):
    """H heads side by side, and a projection back to C channels."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, idx: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C), with `context` (B, S, C) as in `Head`; `idx` (B, T), the tokens, for value_embed."""
        cfg = self.config
        B, T, C = x.shape
        H, D = cfg.n_head, C // cfg.n_head
        kv = cfg.n_kv_head or H
        query = layers.dense(cfg, C, "query")
        key, value = (layers.dense(cfg, kv * D, name) for name in ("key", "value"))

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(B, x.shape[1], -1, D).swapaxes(1, 2)  # (B, H or kv, T or S, D)

        if context is None:
            q, k, v = layers.joined(x, [query, key, value])
        else:
            (q,), (k, v) = layers.joined(x, [query]), layers.joined(context, [key, value])
        if cfg.value_embed and idx is not None:
            v = v + layers.embed(cfg.vocab_size, kv * D, "value_embed", stddev=0.0)(idx)
        q, k, v = heads(q), heads(k), heads(v)
        if cfg.qk_norm:
            q, k = numerics.rms_norm(q), numerics.rms_norm(k)
        if cfg.position == "rope" and context is None:
            q, k = rotate(q), rotate(k)
        drop = layers.dropout(self, "drop_weights") if cfg.dropout and self.has_rng("dropout") else None
        if context is None:
            out = kernels.causal_attention(cfg, q, k, v, drop)
        else:
            out = attention(q, *(kernels.repeated(x, H) for x in (k, v)), drop=drop, precision=cfg.precision)
        out = out.swapaxes(1, 2).reshape(B, T, C)
        return layers.dropout(self, "drop_out")(layers.residual(cfg, "c_proj")(out))
