"""Tokens to logits and loss: GPT, the bigram, their layers, and the functions that the rest of the package calls.

Parameters are plain nested dicts of arrays; the models are pure functions of them. Only this module and the rooms that
look inside a model import Flax.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import cost, kernels, loss, matmul, sharding
from jaxgpt.attention import (
    Cache,
    attention_weights,
    cached_attention,
    causal_mask,
    init_cache,
    rotate,
    update_cache,
)
from jaxgpt.config import ModelConfig, UsageError, off
from jaxgpt.loss import cross_entropy, token_losses

__all__ = [
    "Cache",
    "Params",
    "cross_entropy",
    "describe",
    "extend",
    "forward",
    "init_cache",
    "init_params",
    "logits_and_loss",
    "losses",
    "model",
    "stacked",
    "token_losses",
    "unstacked",
]

Params = dict[str, Any]


class Linear(nn.Module):
    """A linear layer (..., K) -> (..., N): kernel (K, N) of normal(stddev), or of zeros, and bias (N,) of zeros."""

    config: ModelConfig
    features: int
    stddev: float = 0.02
    use_bias: bool = False

    @nn.compact
    def weights(self, K: int) -> tuple[jax.Array, jax.Array | None]:
        """(kernel, bias or None) for inputs of K channels."""
        init = nn.initializers.normal(self.stddev) if self.stddev else nn.initializers.zeros
        kernel = self.param("kernel", init, (K, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return fused_linear(x, [self])[0]


def fused_linear(x: jax.Array, linears: Sequence[Linear]) -> list[jax.Array]:
    """The outputs of several layers for the same `x`, computed by one matmul with their kernels side by side."""
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in linears), strict=True)
    precision = linears[0].config.precision
    if sharding.parts("width") > 1:  # each kernel is split by its own columns
        outs = [matmul.dot(x, kernel, precision) for kernel in kernels]
    else:
        ends = [sum(layer.features for layer in linears[: i + 1]) for i in range(len(linears) - 1)]
        outs = jnp.split(matmul.dot(x, jnp.concatenate(kernels, axis=1), precision), ends, axis=-1)
    return [
        out if bias is None else out + bias.reshape((1,) * (out.ndim - 1) + (-1,))
        for out, bias in zip(outs, biases, strict=True)
    ]


def dense(config: ModelConfig, features: int, name: str) -> Linear:
    """A linear layer inside a block, normal(0.02)."""
    return Linear(config, features, use_bias=config.bias, name=name)


def residual(config: ModelConfig, name: str) -> Linear:
    """A linear layer that writes into the residual stream. It starts smaller by sqrt(2 L), as in GPT-2, for 2 L of them
    add up; or at zero."""
    stddev = 0.0 if config.zero_init else 0.02 * (2 * config.n_layer) ** -0.5
    return Linear(config, config.n_embd, stddev, config.bias, name=name)


def embed(rows: int, features: int, name: str, stddev: float = 0.02) -> nn.Embed:
    """A table (rows, features), normal(stddev)."""
    init = nn.initializers.normal(stddev) if stddev else nn.initializers.zeros
    return nn.Embed(rows, features, embedding_init=init, name=name)


def norm(config: ModelConfig, name: str) -> Callable[[jax.Array], jax.Array]:
    """(..., C) -> (..., C): RMSNorm, or LayerNorm with epsilon 1e-5 as in GPT-2 and PyTorch."""
    if config.norm == "rms":
        return matmul.rms_norm
    return nn.LayerNorm(epsilon=1e-5, use_bias=config.bias, use_fast_variance=False, name=name)


class Dropout(nn.Module):
    """Zero each entry with probability `rate`, which JAX may trace, and scale up the others."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        keep = 1.0 - self.rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


def drops(module: nn.Module) -> bool:
    """Whether a module of a model drops activations: it has a rate, and a dropout key was given to `apply`."""
    return module.has_rng("dropout") and not off(module.config.dropout)


def dropout(module: nn.Module, name: str) -> Callable[[jax.Array], jax.Array]:
    """Dropout at the rate of `module.config` where the module `drops`; else the identity."""
    return Dropout(module.config.dropout, name=name) if drops(module) else lambda x: x


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
        query = dense(cfg, C, "query")
        key, value = (dense(cfg, kv * D, name) for name in ("key", "value"))

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(B, T, -1, D).swapaxes(1, 2)  # (B, H or kv, T, D)

        q, k, v = fused_linear(x, [query, key, value])
        if cfg.value_embed and idx is not None:
            table = embed(cfg.vocab_size, kv * D, "value_embed", stddev=0.0)
            v = v + (sharding.rows(table.embedding, idx) if start is None else table(idx))
        # Where the context is split, each device has its queries, and the keys and values of all tokens.
        q = sharding.constrain(heads(q), "batch", "width", "time", None)
        k, v = (sharding.constrain(heads(x), "batch", "width", None, None) for x in (k, v))
        if cfg.qk_norm:
            q, k = matmul.rms_norm(q), matmul.rms_norm(k)
        if cfg.position == "rope":
            first = 0 if start is None else start
            q, k = rotate(q, first), rotate(k, first)
        drop = dropout(self, "drop_weights") if drops(self) else None
        if self.is_mutable_collection("attention_maps"):
            out = self.shown_attention(q, k, v)
        elif start is None:
            out = kernels.causal_attention(cfg, q, k, v, drop)
        else:
            out = self.decode(q, k, v, start)
        out = out.swapaxes(1, 2).reshape(B, T, C)
        return dropout(self, "drop_out")(residual(cfg, "c_proj")(out))

    def shown_attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The reference attention, (B, H, T, D), which leaves its weights in Flax's collection "attention_maps"."""
        cfg, (H, T) = self.config, q.shape[1:3]
        mask = causal_mask(T, cfg.window)[None, None]
        weights = attention_weights(q, kernels.repeat_kv(k, H), mask, precision=cfg.precision)
        self.sow("attention_maps", "weights", weights)
        return matmul.matmul(weights, kernels.repeat_kv(v, H), cfg.precision)

    def decode(self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int) -> jax.Array:
        """Causal attention of T new tokens to themselves and to the cache, which remembers them: (B, H, T, D)."""
        keys: nn.Variable[jax.Array] = self.variable("cache", "keys")
        values: nn.Variable[jax.Array] = self.variable("cache", "values")
        keys.value, values.value = update_cache(keys.value, k, start), update_cache(values.value, v, start)
        if isinstance(start, int) and start == 0:  # nothing to look back on: as fast as without a cache
            return kernels.causal_attention(self.config, q, k, v)
        return cached_attention(self.config, q, keys.value, values.value, start)


class MLP(nn.Module):
    """Computation of each node on its own."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> (B, T, C)."""
        cfg, C = self.config, x.shape[-1]
        if cfg.mlp == "swiglu":
            hidden = cost.swiglu_width(C)
            gate, up = fused_linear(x, [dense(cfg, hidden, name) for name in ("c_gate", "c_fc")])
            x = jax.nn.silu(gate) * up
        else:
            x = dense(cfg, 4 * C, "c_fc")(x)
            x = jnp.square(jax.nn.relu(x)) if cfg.mlp == "relu2" else jax.nn.gelu(x, approximate=cfg.gelu == "tanh")
        x = sharding.constrain(x, "batch", "time", "width")
        return dropout(self, "drop_out")(residual(cfg, "c_proj")(x))


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, idx: jax.Array, start: jax.Array | int | None = None) -> jax.Array:
        """(B, T, C) of the tokens (B, T) -> (B, T, C); `start` as in `MultiHeadAttention`."""
        cfg = self.config
        x = x + MultiHeadAttention(cfg, name="attn")(norm(cfg, "ln_1")(x), idx=idx, start=start)
        x = x + MLP(cfg, name="mlp")(norm(cfg, "ln_2")(x))
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
        wte = embed(V, C, "wte")
        x = sharding.lookup(wte.embedding, idx) if cache is None else wte(idx)
        start = None if cache is None else cache.read
        places = jnp.arange(T) if start is None else start + jnp.arange(T)
        if cfg.smear:
            share = self.param("smear", nn.initializers.zeros, (C,))
            before = None if cache is None else jnp.where(cache.read > 0, wte(cache.last), 0)
            x = x + share[None, None] * previous(x, before)
        if cfg.bigram_embed:
            before = None if cache is None else cache.last
            table, ids = embed(V * V, C, "bigram", stddev=0.0), previous(idx, before) * V + idx
            pairs = sharding.rows(table.embedding, ids) if cache is None else table(ids)
            x = x + jnp.where(places[None, :, None] > 0, pairs, 0)  # the first has no token before it
        if cfg.position == "learned":
            x = x + embed(cfg.block_size, C, "wpe")(places)[None]
        x = dropout(self, "drop")(sharding.constrain(x, "batch", "time", None))
        block = Block
        if cfg.remat != "none" and cache is None:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "matmuls" else None
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
        final_norm = norm(cfg, "ln_f")
        x = final_norm(x)
        if cfg.tie_weights:
            kernel = wte.embedding.T
        else:
            head = Linear(cfg, V, 0.0 if cfg.zero_init else 0.02, name="lm_head")
            kernel, _ = head.weights(C)

        def logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
            out = matmul.dot(x, kernel, cfg.precision).astype(jnp.float32)
            out = sharding.constrain(out, *["batch", "time", None][: x.ndim - 1], "width")
            return matmul.softcap(out, cfg.softcap) if cfg.softcap else out

        if self.is_mutable_collection("logit_lens"):
            self.sow("logit_lens", "logits", jnp.stack([logits(final_norm(x), kernel) for x in stream]))
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


def model(config: ModelConfig) -> GPT | Bigram:
    """The Flax module of `config.kind`."""
    return Bigram(config) if config.kind == "bigram" else GPT(config)


@matmul.in_32_bits
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, a pure function of (config, key); the same numbers with scan_layers as without.

    Raises:
      UsageError: vocab_size is 0.
    """
    if config.vocab_size < 1:
        raise UsageError("vocab_size is 0, expected at least 1: that of the tokenizer (start.resolve fills it in)")
    idx = jnp.zeros((1, 1), jnp.int32)  # no parameter depends on the length
    params = model(dataclasses.replace(config, scan_layers=False)).init(key, idx, mutable=["params"])["params"]
    if not isinstance(config.init_scale, float) or config.init_scale != 1.0:
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x * config.init_scale if path[-1].key in ("kernel", "embedding") else x, params
        )
    return stacked(params) if config.scan_layers else params


def stacked(params: Params) -> Params:
    """Parameters of blocks h_0, h_1, ... as those of one, h, with an axis of L before the others."""
    blocks = [params[f"h_{i}"] for i in range(sum(name.startswith("h_") for name in params))]
    rest = {name: value for name, value in params.items() if not name.startswith("h_")}
    return rest | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)} if blocks else rest


def unstacked(params: Params) -> Params:
    """The inverse of `stacked`; parameters that are not stacked are themselves."""
    if "h" not in params:
        return params
    n = jax.tree.leaves(params["h"])[0].shape[0]
    rest = {name: value for name, value in params.items() if name != "h"}
    return rest | {f"h_{i}": jax.tree.map(lambda x, i=i: x[i], params["h"]) for i in range(n)}


def forward(config: ModelConfig, params: Params, idx: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits of the next token at every position: (B, T) ids -> (B, T, V).

    Args:
      idx: ids below V, T up to block_size.
      dropout_key: None for evaluation; a key switches dropout on.

    Raises:
      ValueError: T is longer than block_size.
    """
    return _apply(config, params, dropout_key, idx)


@matmul.in_32_bits
def extend(
    config: ModelConfig, params: Params, cache: Cache, idx: jax.Array, length: jax.Array | int | None = None
) -> tuple[jax.Array, Cache]:
    """T more tokens after those in the cache: (B, T) ids -> logits of the token after them (B, V), and the cache with
    them.

    Up to block_size tokens, the logits are those of `forward` for all the tokens so far. Beyond, it depends on the
    positions. Rotated ones slide: each token attends to the block_size tokens up to itself. In the blocks above the
    first, what these hold was computed from tokens further back, so that logits depend on more than the last block_size
    tokens, as `forward` of these would not. Learned positions end at block_size: more tokens give NaN.

    A cache of S slots keeps S tokens. That is enough as long as there are no more in all, and for any number of them
    where S is at least block_size + T - 1.

    Args:
      length: how many of the T tokens are real, 1 to T, where the others are padding on the right: nothing sees it, and
        the next tokens take its place. None: all.

    Raises:
      ValueError: T is greater than S.
    """
    T = idx.shape[1]
    for slots in jax.tree.leaves(cache.blocks):
        if slots.shape[2] < T:
            raise ValueError(f"{T} tokens are more than the {slots.shape[2]} slots of the cache")
    length = T if length is None else length
    variables = {"params": unstacked(params), "cache": cache.blocks}
    logits, kept = model(config).apply(variables, idx, cache=cache, length=length, mutable=["cache"])
    last = jax.lax.dynamic_index_in_dim(idx, length - 1, axis=1, keepdims=False).astype(jnp.int32)
    return logits, Cache(kept.get("cache", {}), jnp.asarray(cache.read + length, jnp.int32), last)


def losses(
    config: ModelConfig, params: Params, idx: jax.Array, targets: jax.Array, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Loss of each target in nats, `token_losses` of `forward`: ids and targets (B, T) -> (B, T).

    Where the logits of all positions would be very many, they never exist at once (`loss.losses_of`).

    Raises:
      ValueError: as `forward`.
    """
    return _apply(config, params, dropout_key, idx, targets)


@matmul.in_32_bits
def _apply(config: ModelConfig, params: Params, dropout_key: jax.Array | None, idx: jax.Array, *more: Any) -> jax.Array:
    _require_short(config, idx)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return cast(jax.Array, model(config).apply({"params": params}, idx, *more, rngs=rngs))


def _require_short(config: ModelConfig, idx: jax.Array) -> None:
    if idx.shape[1] > config.block_size:
        raise ValueError(f"{idx.shape[1]} tokens are longer than block_size, {config.block_size}")


def describe(config: ModelConfig) -> str:
    """One line for people: the size of a model, its compute dtype and attention kernel here, and whether training with
    that kernel is not repeatable."""
    line = f"{cost.n_params(config):,} parameters, {matmul.resolve(config.precision)} matmuls"
    if config.kind == "bigram":
        return line
    plain, dropped = (kernels.kernel(config, config.block_size, dropped) for dropped in (False, config.dropout > 0))
    line += f", attention: {plain}" + (f" ({dropped} while weights are dropped)" if dropped != plain else "")
    if not kernels.repeatable(dropped, config.block_size):
        line += "; its gradients are not repeatable, so a resumed run is equal up to rounding, not bit for bit"
    return line


def logits_and_loss(
    config: ModelConfig, params: Params, idx: jax.Array, targets: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The notes' own interface: `(logits, loss)`.

    Without targets: logits (B, T, V) and None. With targets (B, T): logits flattened to (B*T, V), and their mean
    cross-entropy with the targets flattened to (B*T,), a scalar in nats.
    """
    logits = forward(config, params, idx)
    if targets is None:
        return logits, None
    B, T, V = logits.shape
    logits = logits.reshape(B * T, V)
    return logits, cross_entropy(logits, targets.reshape(B * T))
