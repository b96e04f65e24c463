"""The GPT of the lecture and of nanoGPT: blocks that communicate, then compute."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import cost, layers, loss, sharding
from jaxgpt import matmul as numerics
from jaxgpt.cache import Cache
from jaxgpt.config import ModelConfig
from jaxgpt.heads import MultiHeadAttention


class MLP(nn.Module):
    """Computation of each node on its own."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> (B, T, C)."""
        cfg, C = self.config, x.shape[-1]
        if cfg.mlp == "swiglu":
            hidden = cost.swiglu_width(C)
            gate, up = layers.joined(x, [layers.dense(cfg, hidden, name) for name in ("c_gate", "c_fc")])
            x = jax.nn.silu(gate) * up
        else:
            x = layers.dense(cfg, 4 * C, "c_fc")(x)
            x = jnp.square(jax.nn.relu(x)) if cfg.mlp == "relu2" else jax.nn.gelu(x, approximate=cfg.gelu == "tanh")
        x = sharding.constrain(x, "batch", "time", "width")
        return layers.dropout(self, "drop_out")(layers.residual(cfg, "c_proj")(x))


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, idx: jax.Array, start: jax.Array | int | None = None) -> jax.Array:
        """(B, T, C) of the tokens (B, T) -> (B, T, C); `start` as in `MultiHeadAttention`."""
        cfg = self.config
        x = x + MultiHeadAttention(cfg, name="attn")(layers.norm(cfg, "ln_1")(x), idx=idx, start=start)
        x = x + MLP(cfg, name="mlp")(layers.norm(cfg, "ln_2")(x))
        return sharding.constrain(x, "batch", "time", None)


class GPT(nn.Module):
    """Token and position embeddings, L blocks, a last norm, and a head that may share the token embedding."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        idx: jax.Array,
        targets: jax.Array | None = None,
        cache: Cache | None = None,
        length: jax.Array | int | None = None,
    ) -> jax.Array:
        """(B, T) ids, T up to block_size -> (B, T, V) logits; with targets (B, T), the loss of each, (B, T).

        With a cache the ids come after those that it holds, and the logits are those of the token `length` - 1 alone,
        (B, V).
        """
        cfg = self.config
        C, V, T = cfg.n_embd, cfg.vocab_size, idx.shape[1]
        idx = sharding.constrain(idx, "batch", "time")
        wte = layers.embed(V, C, "wte")
        x = sharding.lookup(wte.embedding, idx) if cache is None else wte(idx)
        start = None if cache is None else cache.read
        places = jnp.arange(T) if start is None else start + jnp.arange(T)
        if cfg.smear:
            share = self.param("smear", nn.initializers.zeros, (C,))
            before = None if cache is None else jnp.where(cache.read > 0, wte(cache.last), 0)
            x = x + share[None, None] * previous(x, before)
        if cfg.bigram_embed:
            before = None if cache is None else cache.last
            table, ids = layers.embed(V * V, C, "bigram", stddev=0.0), previous(idx, before) * V + idx
            pairs = sharding.rows(table.embedding, ids) if cache is None else table(ids)
            x = x + jnp.where(places[None, :, None] > 0, pairs, 0)  # the first has no token before it
        if cfg.position == "learned":
            x = x + layers.embed(cfg.block_size, C, "wpe")(places)[None]
        x = layers.dropout(self, "drop")(sharding.constrain(x, "batch", "time", None))
        block = Block
        if cfg.remat != "none" and cache is None:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "products" else None
            block = nn.remat(Block, policy=policy)
        stream = [x]  # what each block reads, and what the last writes
        if cfg.scan_layers and cache is None:
            x = self.scanned(block, x, idx)
        else:
            for i in range(cfg.n_layer):
                x = block(cfg, name=f"h_{i}")(x, idx, start)
                stream.append(x)
        if length is not None:
            x = jax.lax.dynamic_index_in_dim(x, length - 1, axis=1, keepdims=False)
        norm = layers.norm(cfg, "ln_f")
        x = norm(x)
        if cfg.tie_weights:
            kernel = wte.embedding.T
        else:
            head = layers.Linear(cfg, V, 0.0 if cfg.zero_init else 0.02, name="lm_head")
            kernel, _ = head.weights(C)

        def logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
            out = numerics.dot(x, kernel, cfg.precision).astype(jnp.float32)
            out = sharding.constrain(out, *["batch", "time", None][: x.ndim - 1], "width")
            return numerics.softcap(out, cfg.softcap) if cfg.softcap else out

        if self.is_mutable_collection("logit_lens"):
            self.sow("logit_lens", "logits", jnp.stack([logits(norm(x), kernel) for x in stream]))
        if targets is None:
            return logits(x, kernel)
        return loss.losses_of(logits, x, kernel, targets, cfg.precision)

    def scanned(self, block: type[Block], x: jax.Array, idx: jax.Array) -> jax.Array:
        """The blocks one after another as one loop, which is compiled once: (B, T, C) -> (B, T, C)."""

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x, idx), None

        each: dict[Any, Any] = {"params": 0}
        rngs: dict[Any, bool] = {"params": True, "dropout": True}
        loop = nn.scan(body, variable_axes=each, split_rngs=rngs, length=self.config.n_layer)
        out, _ = loop(block(self.config, name="h"), x, None)
        return out


def previous(x: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """(B, T, ...) one step later: what stood at t - 1, and `before` (B, ...) at the first, or zeros."""
    if before is not None:
        return jnp.concatenate([before[:, None], x[:, :-1]], axis=1)
    return jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))[:, :-1]
