"""GPT and the bigram: ids to features, logits and losses, as pure functions of (config, params, ids).

Parameters are nested dicts of arrays. Only this module and the rooms that look inside a model import Flax.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import activations, kernels, loss, matmul, prng, sharding
from jaxgpt.attention import Cache, Drop, cached_attention, rotate, update_cache
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.loss import cross_entropy, token_losses

Params = dict[str, Any]
Rate = jax.Array | float | None
"""A dropout rate, which may be traced; None: no dropout."""


class Linear(nn.Module):
    """A linear layer (..., K) -> (..., N): kernel (K, N) of normal(stddev), or of zeros, and bias (N,) of zeros."""

    config: ModelConfig
    features: int
    stddev: float = 0.02
    may_have_bias: bool = True

    @nn.compact
    def weights(self, K: int) -> tuple[jax.Array, jax.Array | None]:
        """(kernel, bias or None) for inputs of K channels."""
        init = nn.initializers.normal(self.stddev) if self.stddev else nn.initializers.zeros
        kernel = self.param("kernel", init, (K, self.features))
        if not (self.config.bias and self.may_have_bias):
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return fused_linear(x, [self])[0]


def fused_linear(x: jax.Array, layers: Sequence[Linear]) -> list[jax.Array]:
    """The outputs (..., N) of several layers for one `x` (..., K), by one matmul with their kernels side by side."""
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in layers), strict=True)
    precision = layers[0].config.precision
    if sharding.num_shards("width") > 1:  # each kernel is split by its own columns
        outs = [matmul.dot(x, kernel, precision) for kernel in kernels]
    else:
        ends = [sum(layer.features for layer in layers[: i + 1]) for i in range(len(layers) - 1)]
        outs = jnp.split(matmul.dot(x, jnp.concatenate(kernels, axis=1), precision), ends, axis=-1)
    return [
        out if bias is None else out + activations.per_channel(bias, out)
        for out, bias in zip(outs, biases, strict=True)
    ]


def residual(config: ModelConfig, name: str) -> Linear:
    """A linear layer that writes into the residual stream: smaller by sqrt(2 L), since 2 L of them add up (GPT-2)."""
    stddev = 0.0 if config.zero_init else 0.02 * (2 * config.n_layer) ** -0.5
    return Linear(config, config.n_embd, stddev, name=name)


def embed(rows: int, features: int, name: str, stddev: float = 0.02) -> nn.Embed:
    """A table (rows, features), normal(stddev)."""
    init = nn.initializers.normal(stddev) if stddev else nn.initializers.zeros
    return nn.Embed(rows, features, embedding_init=init, name=name)


class LayerNorm(nn.Module):
    """(..., C) -> (..., C): `activations.layer_norm` with a scale (C,) of ones, and a bias (C,) of zeros."""

    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        x = activations.layer_norm(x, self.param("scale", nn.initializers.ones, (C,)))
        if not self.use_bias:
            return x
        return x + activations.per_channel(self.param("bias", nn.initializers.zeros, (C,)), x)


def norm(config: ModelConfig, name: str) -> Callable[[jax.Array], jax.Array]:
    """(..., C) -> (..., C): RMSNorm, or LayerNorm with epsilon 1e-5 as in GPT-2 and PyTorch."""
    if config.norm == "rms":
        return rms_norm
    return LayerNorm(config.bias, name=name)


def rms_norm(x: jax.Array) -> jax.Array:
    """(..., C) divided by the root of its mean square, in float32: RMSNorm (Zhang and Sennrich 2019) without a gain."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


class Dropout(nn.Module):
    """Zero each entry of (..., T, S) with probability `rate` and scale up the others. Flax's own cannot take a traced
    rate."""

    rate: jax.Array | float

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop()(x, *map(jnp.arange, x.shape[-2:]))

    @nn.compact
    def drop(self) -> Drop:
        """The same of blocks of one array: a block (..., T', S'), its rows (T',) and columns (S',) -> the block."""
        key, keep = self.make_rng("dropout"), 1.0 - self.rate

        def drop(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
            kept = prng.keep_mask(key, keep, x.shape[:-2], rows, columns)
            return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))

        return drop


def dropout(rate: Rate, name: str) -> Callable[[jax.Array], jax.Array]:
    """Dropout at `rate`, or the identity."""
    return (lambda x: x) if rate is None else Dropout(rate, name=name)


class MultiHeadAttention(nn.Module):
    """H heads side by side, and a projection back to C channels."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, x: jax.Array, *, start: jax.Array | int | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C).

        Args:
          start: the position of the first token, where those before it are in the cache, Flax's collection "cache".
            None: 0, and no cache.
        """
        cfg = self.config
        B, T, C = x.shape
        H, D = cfg.n_head, C // cfg.n_head
        kv = cfg.n_kv_head or H

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(B, T, -1, D).swapaxes(1, 2)  # (B, H or kv, T, D)

        sizes = {"query": C, "key": kv * D, "value": kv * D}
        q, k, v = fused_linear(x, [Linear(cfg, size, name=name) for name, size in sizes.items()])
        # Where the context is split, each device has its queries, and the keys and values of all tokens.
        q = sharding.constrain(heads(q), "batch", "width", "time", None)
        k, v = (sharding.constrain(heads(x), "batch", "width", None, None) for x in (k, v))
        if cfg.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if cfg.position == "rope":
            first = 0 if start is None else start
            q, k = rotate(q, first), rotate(k, first)
        drop = None if self.dropout is None else Dropout(self.dropout, name="drop_weights").drop()
        out = self.attend(q, k, v, start, drop).swapaxes(1, 2).reshape(B, T, C)
        return dropout(self.dropout, "drop_out")(residual(cfg, "c_proj")(out))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int | None, drop: Drop | None
    ) -> jax.Array:
        """Causal attention of T tokens to themselves and to the cache, if there is one, which keeps them: queries
        (B, H, T, D), keys and values (B, kv, T, D) -> (B, H, T, D)."""
        if start is not None:
            keys: nn.Variable[jax.Array] = self.variable("cache", "keys")
            values: nn.Variable[jax.Array] = self.variable("cache", "values")
            keys.value, values.value = update_cache(keys.value, k, start), update_cache(values.value, v, start)
            if not isinstance(start, int):  # an int is 0: an empty cache, and attention as fast as without one
                return cached_attention(self.config, q, keys.value, values.value, start)
        return kernels.causal_attention(self.config, q, k, v, drop)


class MLP(nn.Module):
    """Computation of each token on its own."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> (B, T, C)."""
        cfg, C = self.config, x.shape[-1]
        if cfg.mlp == "swiglu":
            hidden = swiglu_width(C)
            gate, up = fused_linear(x, [Linear(cfg, hidden, name=name) for name in ("c_gate", "c_fc")])
            x = jax.nn.silu(gate) * up
        else:
            x = Linear(cfg, 4 * C, name="c_fc")(x)
            x = jnp.square(jax.nn.relu(x)) if cfg.mlp == "relu2" else activations.gelu(x, cfg.gelu == "tanh")
        x = sharding.constrain(x, "batch", "time", "width")
        return dropout(self.dropout, "drop_out")(residual(cfg, "c_proj")(x))


def swiglu_width(C: int) -> int:
    """Hidden channels of a SwiGLU with about the 8 C² parameters of the other MLPs: 8 C / 3, a multiple of 8."""
    return 8 * max(1, round(C / 3))


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, x: jax.Array, start: jax.Array | int | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C); `start` as in `MultiHeadAttention`."""
        cfg, rate = self.config, self.dropout
        x = x + MultiHeadAttention(cfg, rate, name="attn")(norm(cfg, "ln_1")(x), start=start)
        x = x + MLP(cfg, rate, name="mlp")(norm(cfg, "ln_2")(x))
        return sharding.constrain(x, "batch", "time", None)


class GPT(nn.Module):
    """Token and position embeddings, L blocks, and a last norm."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, idx: jax.Array, cache: Cache | None = None) -> jax.Array:
        """(B, T) ids -> features (B, T, C), which `head` turns into logits. With a cache, the ids come after those that
        it holds."""
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
        x = dropout(self.dropout, "drop")(sharding.constrain(x, "batch", "time", None))
        block = Block
        if cfg.remat != "none" and cache is None:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "matmuls" else None
            block = nn.remat(Block, policy=policy)
        if cfg.scan_layers and cache is None:
            x = self.scanned(block, x)
        else:
            for i in range(cfg.n_layer):
                x = block(cfg, self.dropout, name=f"h_{i}")(x, start)
        if not cfg.tie_weights:  # only initialized here
            Linear(cfg, V, 0.0 if cfg.zero_init else 0.02, may_have_bias=False, name="lm_head").weights(C)
        return norm(cfg, "ln_f")(x)

    def scanned(self, block: type[Block], x: jax.Array) -> jax.Array:
        """The blocks one after another as one loop, which is compiled once: (B, T, C) -> (B, T, C)."""

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x), None

        each: dict[Any, Any] = {"params": 0}
        rngs: dict[Any, bool] = {"params": True, "dropout": True}
        loop = nn.scan(body, variable_axes=each, split_rngs=rngs, length=self.config.n_layer)
        out, _ = loop(block(self.config, self.dropout, name="h"), x, None)
        return out


def previous(x: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """(B, T, ...) one step later: at t what was at t - 1, and `before` (B, ...) at the first, or zeros."""
    if before is not None:
        return jnp.concatenate([before[:, None], x[:, :-1]], axis=1)
    return jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))[:, :-1]


class Bigram(nn.Module):
    """An embedding of size (V, V), normal(1) at the start as PyTorch's `nn.Embedding`; its features are the logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, idx: jax.Array, cache: Cache | None = None) -> jax.Array:
        """(B, T) ids -> (B, T, V) logits, with a cache or without."""
        table = embed(self.config.vocab_size, self.config.vocab_size, "token_embedding_table", stddev=1.0)
        if cache is not None:
            return table(idx)
        # Else each device would compute all of them.
        return sharding.constrain(sharding.rows(table.embedding, idx), "batch", "time", None)


def module(config: ModelConfig, dropout: Rate = None) -> GPT | Bigram:
    """The Flax module of `config.kind`."""
    return Bigram(config) if config.kind == "bigram" else GPT(config, dropout)


def head_kernel(config: ModelConfig, params: Params) -> jax.Array:
    """The kernel (C, V) of a GPT's `head`: its own, or the token embedding."""
    return cast(jax.Array, params["wte"]["embedding"].T if config.tie_weights else params["lm_head"]["kernel"])


def head(config: ModelConfig, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Features (..., C) and a kernel (C, V) -> logits (..., V), in the dtype of `matmul.dot`; with softcap (Gemma 2,
    2024) float32."""
    out = matmul.dot(x, kernel, config.precision)
    out = sharding.constrain(out, *["batch", "time", None][: x.ndim - 1], "width")
    return config.softcap * jnp.tanh(out.astype(jnp.float32) / config.softcap) if config.softcap else out


@partial(jax.jit, static_argnums=0)
@matmul.in_32_bits
def init_params(config: ModelConfig, key: jax.Array, init_scale: jax.Array | float | None = None) -> Params:
    """Fresh float32 parameters, a pure function of (config, key); the same numbers with scan_layers as without.

    Args:
      init_scale: a traced value in place of that of the config.

    Raises:
      UsageError: vocab_size is 0.
    """
    if config.vocab_size < 1:
        raise UsageError("vocab_size is 0, expected at least 1: that of the tokenizer (start.resolve fills it in)")
    scale = config.init_scale if init_scale is None else init_scale
    idx = jnp.zeros((1, 1), jnp.int32)  # no parameter depends on the length
    params = module(dataclasses.replace(config, scan_layers=False)).init(key, idx, mutable=["params"])["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * scale if path[-1].key in ("kernel", "embedding") else x, params
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


@matmul.in_32_bits
def features(
    config: ModelConfig, params: Params, idx: jax.Array, dropout_key: jax.Array | None = None, dropout: Rate = None
) -> jax.Array:
    """What the head reads: (B, T) ids -> (B, T, C) of a GPT; of a bigram the logits, (B, T, V).

    Args:
      idx: ids below V, T up to block_size.
      dropout_key: None for evaluation; a key switches dropout on, where the config has any.
      dropout: a traced rate in place of that of the config.

    Raises:
      ValueError: T is longer than block_size.
    """
    if idx.shape[1] > config.block_size:
        raise ValueError(f"{idx.shape[1]} tokens are longer than block_size, {config.block_size}")
    if dropout_key is None or not config.dropout:
        return cast(jax.Array, module(config).apply({"params": params}, idx))
    rate = config.dropout if dropout is None else dropout
    return cast(jax.Array, module(config, rate).apply({"params": params}, idx, rngs={"dropout": dropout_key}))


@partial(jax.jit, static_argnums=0)
@matmul.in_32_bits
def forward(config: ModelConfig, params: Params, idx: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits of the next token at every position, float32: (B, T) ids -> (B, T, V). Arguments and errors as of
    `features`."""
    x = features(config, params, idx, dropout_key)
    return x if config.kind == "bigram" else head(config, x, head_kernel(config, params)).astype(jnp.float32)


@matmul.in_32_bits
def losses(
    config: ModelConfig,
    params: Params,
    idx: jax.Array,
    targets: jax.Array,
    dropout_key: jax.Array | None = None,
    dropout: Rate = None,
) -> jax.Array:
    """Loss of each target in nats, `token_losses` of `forward`: ids and targets (B, T) -> (B, T).

    Where the logits of all positions would be very many, they never exist at once (`loss.losses_of`). Arguments and
    errors as of `features`.
    """
    x = features(config, params, idx, dropout_key, dropout)
    if config.kind == "bigram":
        return token_losses(x, targets)
    return loss.losses_of(partial(head, config), x, head_kernel(config, params), targets, config.precision)


@matmul.in_32_bits
def extend(
    config: ModelConfig, params: Params, cache: Cache, idx: jax.Array, length: jax.Array | int | None = None
) -> tuple[jax.Array, Cache]:
    """Read T more tokens: (B, T) ids -> the logits after them (B, V), and the cache with them.

    Up to block_size tokens, the logits are those of `forward` for all tokens so far. Beyond, rotated positions slide:
    each token attends to the block_size tokens up to itself, which in the blocks above the first were computed from
    tokens further back. Learned positions end: more tokens give NaN.

    A cache of S slots keeps S tokens: enough for S tokens in all, and for any number where S >= block_size + T - 1.

    Args:
      length: how many of the T tokens are real, 1 to T; the others are padding on the right, which nothing attends to
        and the next tokens replace. None: all.

    Raises:
      ValueError: T is greater than S.
    """
    T = idx.shape[1]
    for slots in jax.tree.leaves(cache.blocks):
        if slots.shape[2] < T:
            raise ValueError(f"{T} tokens are more than the {slots.shape[2]} slots of the cache")
    length = T if length is None else length

    def last(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, length - 1, axis=1, keepdims=False)

    variables = {"params": unstacked(params), "cache": cache.blocks}
    x, kept = module(config).apply(variables, idx, cache, mutable=["cache"])
    logits = last(x)
    if config.kind != "bigram":
        logits = head(config, logits, head_kernel(config, params)).astype(jnp.float32)
    read = jnp.asarray(cache.read + length, jnp.int32)
    return logits, Cache(kept.get("cache", {}), read, last(idx).astype(jnp.int32))


@partial(jax.jit, static_argnums=0)
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
