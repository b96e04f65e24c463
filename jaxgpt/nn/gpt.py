"""The GPT of the lecture and of nanoGPT: blocks that communicate, then compute."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.nn import layers, numerics
from jaxgpt.nn.attention import MultiHeadAttention


class MLP(nn.Module):
    """Computation of each node on its own."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> (B, T, C)."""
        cfg, C = self.config, x.shape[-1]
        x = layers.dense(cfg, 4 * C, "c_fc")(x)
        x = jax.nn.gelu(x, approximate=cfg.gelu == "tanh")
        return layers.dropout(self, "drop_out")(layers.dense(cfg, C, "c_proj", residual=True)(x))


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> (B, T, C)."""
        cfg = self.config
        x = x + MultiHeadAttention(cfg, name="attn")(layers.layer_norm(cfg, "ln_1")(x))
        return x + MLP(cfg, name="mlp")(layers.layer_norm(cfg, "ln_2")(x))


class GPT(nn.Module):
    """Token and position embeddings, L blocks, a last norm, and a head that may share the token embedding."""

    config: ModelConfig

    @nn.compact
    def __call__(self, idx: jax.Array) -> jax.Array:
        """(B, T) ids, T up to block_size -> (B, T, V) logits."""
        cfg = self.config
        T = idx.shape[1]
        wte = layers.embed(cfg.vocab_size, cfg.n_embd, "wte")
        wpe = layers.embed(cfg.block_size, cfg.n_embd, "wpe")
        x = wte(idx) + wpe(jnp.arange(T))[None]
        x = layers.dropout(self, "drop")(x)
        for i in range(cfg.n_layer):
            x = Block(cfg, name=f"h_{i}")(x)
        x = layers.layer_norm(cfg, "ln_f")(x)
        if cfg.tie_weights:
            return numerics.dot_general(x, wte.embedding.T, (((2,), (0,)), ((), ())))
        head = nn.Dense(
            cfg.vocab_size,
            use_bias=False,
            kernel_init=nn.initializers.normal(0.02),
            dot_general=numerics.dot_general,
            name="lm_head",
        )
        return head(x)
