"""GPT and the bigram model: ids -> features -> logits and losses, as pure functions of (config, params, ids).

Parameters are nested dicts of arrays. Of the core, only this module imports Flax.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxgpt import activations, kernels, loss, matmul, sharding
from jaxgpt.attention import Cache, cached_attention, rotate, update_cache
from jaxgpt.config import Config, ModelConfig, UsageError, check
from jaxgpt.loss import cross_entropy, token_losses
from jaxgpt.prng import Drop

Params = dict[str, Any]
Rate = jax.Array | float | None
"""Dropout probability, which may be traced; None: no dropout."""


def normal(stddev: float) -> nn.initializers.Initializer:
    """Draws from a normal distribution; zeros if `stddev` is 0."""
    return nn.initializers.normal(stddev) if stddev else nn.initializers.zeros


def parameter(module: nn.Module, name: str, initializer: nn.initializers.Initializer, *shape: int) -> jax.Array:
    """`module.param`, which would trace the initializer wherever a parameter is used: a fifth of the time to trace a
    model."""
    found: Any = module.get_variable("params", name)
    return found if np.shape(found) == shape else module.param(name, initializer, shape)


class Linear(nn.Module):
    """(..., K) -> (..., N): a kernel (K, N) and, if `config.bias`, a bias (N,), initially zero."""

    config: ModelConfig
    features: int
    stddev: float = 0.02

    @nn.compact
    def weights(self, K: int) -> tuple[jax.Array, jax.Array | None]:
        """(kernel, bias or None) for inputs of K channels."""
        if self.is_transposed:
            kernel: Any = self.get_variable("params", "transposed").T
        else:  # before the bias: Flax numbers the keys of parameters in the order of these calls
            kernel = parameter(self, "kernel", normal(self.stddev), K, self.features)
        return kernel, parameter(self, "bias", nn.initializers.zeros, self.features) if self.config.bias else None

    @property
    def is_transposed(self) -> bool:
        """Whether the kernel is stored as (N, K), by `transposed`."""
        return self.has_variable("params", "transposed")

    def __call__(self, x: jax.Array) -> jax.Array:
        return fused_linear(x, [self])[0]


def fused_linear(x: jax.Array, layers: Sequence[Linear]) -> list[jax.Array]:
    """The outputs (..., N) of several layers applied to `x` (..., K): one matmul with the kernels side by side."""
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in layers), strict=True)
    precision = layers[0].config.precision
    # Columns of sharded kernels are sharded each by itself. Transposed kernels are applied to one token, side by side.
    if sharding.num_shards("width") > 1 or layers[0].is_transposed:
        outs = [matmul.dot(x, kernel, precision) for kernel in kernels]
    else:
        ends = np.cumsum([layer.features for layer in layers])[:-1]
        outs = jnp.split(matmul.dot(x, jnp.concatenate(kernels, axis=1), precision), ends, axis=-1)
    return [
        out if bias is None else out + activations.per_channel(bias, out)
        for out, bias in zip(outs, biases, strict=True)
    ]


def embed(rows: int, features: int, name: str, stddev: float = 0.02) -> nn.Embed:
    return nn.Embed(rows, features, embedding_init=normal(stddev), name=name)


class LayerNorm(nn.Module):
    """(..., C) -> (..., C): LayerNorm with a scale (C,), initially one, and optionally a bias (C,), initially zero."""

    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        x = activations.layer_norm(x, parameter(self, "scale", nn.initializers.ones, C))
        if not self.use_bias:
            return x
        return x + activations.per_channel(parameter(self, "bias", nn.initializers.zeros, C), x)


def norm(config: ModelConfig, name: str) -> Callable[[jax.Array], jax.Array]:
    """The norm of the config, (..., C) -> (..., C)."""
    return rms_norm if config.norm == "rms" else LayerNorm(config.bias, name=name)


def rms_norm(x: jax.Array) -> jax.Array:
    """RMSNorm (Zhang and Sennrich 2019) without a gain, (..., C) -> (..., C) float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


class Dropout(nn.Module):
    """Zero each entry of (..., T, S) with probability `rate` and scale up the others. Flax's Dropout does not accept a
    traced rate."""

    rate: Rate

    def __call__(self, x: jax.Array) -> jax.Array:
        drop = self.drop()
        return x if drop is None else drop(x, *map(jnp.arange, x.shape[-2:]))

    @nn.compact
    def drop(self) -> Drop | None:
        return None if self.rate is None else Drop(self.make_rng("dropout"), 1.0 - self.rate)


def to_residual(config: ModelConfig, rate: Rate, x: jax.Array) -> jax.Array:
    """The projection to the residual stream, and dropout: (..., K) -> (..., C). Its initial kernel is divided by
    sqrt(2 L), because 2 L such outputs add up (GPT-2)."""
    stddev = 0.0 if config.zero_init else 0.02 * (2 * config.n_layer) ** -0.5
    return Dropout(rate, name="drop_out")(Linear(config, config.n_embd, stddev, name="c_proj")(x))


class MultiHeadAttention(nn.Module):
    """Causal self-attention with H heads, and a projection back to C channels."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, x: jax.Array, *, start: jax.Array | int | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C). `start` is the position of the first token; Flax's collection "cache" has the keys
        and values of the tokens before it. None: 0, without a cache."""
        cfg = self.config
        B, T, C = x.shape
        H, D = cfg.n_head, C // cfg.n_head
        kv = cfg.n_kv_head or H

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(B, T, x.shape[-1] // D, D).swapaxes(1, 2)  # (B, H or kv, T, D)

        sizes = {"query": C, "key": kv * D, "value": kv * D}
        q, k, v = fused_linear(x, [Linear(cfg, size, name=name) for name, size in sizes.items()])
        # If the context is sharded, each device has its own queries, and the keys and values of all tokens.
        q = sharding.constrain(heads(q), "batch", "width", "time", None)
        k, v = (sharding.constrain(heads(x), "batch", "width", None, None) for x in (k, v))
        if cfg.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if cfg.position == "rope":
            first = 0 if start is None else start
            q, k = rotate(q, first), rotate(k, first)
        drop = Dropout(self.dropout, name="drop_weights").drop()
        out = self.attend(q, k, v, start, drop).swapaxes(1, 2).reshape(B, T, C)
        return to_residual(cfg, self.dropout, out)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int | None, drop: Drop | None
    ) -> jax.Array:
        """Causal attention of T tokens to themselves and to the cache, to which they are added: queries (B, H, T, D),
        keys and values (B, kv, T, D) -> (B, H, T, D)."""
        if start is not None:
            keys: nn.Variable[jax.Array] = self.variable("cache", "keys")
            values: nn.Variable[jax.Array] = self.variable("cache", "values")
            keys.value, values.value = update_cache(keys.value, k, start), update_cache(values.value, v, start)
            # An int is 0: the cache was empty, and the fast kernels apply, unless the context slides.
            if not isinstance(start, int) or q.shape[2] > self.config.block_size:
                return cached_attention(self.config, q, keys.value, values.value, start)
        return kernels.causal_attention(self.config, q, k, v, drop)


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), each token by itself."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, C = self.config, x.shape[-1]
        if cfg.mlp == "swiglu":
            hidden = swiglu_width(C)
            gate, up = fused_linear(x, [Linear(cfg, hidden, name=name) for name in ("c_gate", "c_fc")])
            x = jax.nn.silu(gate) * up
        else:
            x = Linear(cfg, 4 * C, name="c_fc")(x)
            x = jnp.square(jax.nn.relu(x)) if cfg.mlp == "relu2" else activations.gelu(x, cfg.gelu == "tanh")
        return to_residual(cfg, self.dropout, sharding.constrain(x, "batch", "time", "width"))


def swiglu_width(C: int) -> int:
    """Hidden channels of SwiGLU: 8 C / 3, rounded to a multiple of 8, for the 8 C² parameters of the other MLPs."""
    return 8 * max(1, round(C / 3))


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, x: jax.Array, start: jax.Array | int | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C); `start` as in `MultiHeadAttention`."""
        cfg, rate = self.config, self.dropout
        x += MultiHeadAttention(cfg, rate, name="attn")(norm(cfg, "ln_1")(x), start=start).astype(x.dtype)
        x += MLP(cfg, rate, name="mlp")(norm(cfg, "ln_2")(x)).astype(x.dtype)
        return sharding.constrain(x, "batch", "time", None)


class GPT(nn.Module):
    """Token and position embeddings, L blocks, and a final norm."""

    config: ModelConfig
    dropout: Rate = None

    @nn.compact
    def __call__(self, idx: jax.Array, cache: Cache | None = None) -> jax.Array:
        """(B, T) ids -> features (B, T, C), the input of `head`. With a cache, the ids follow the tokens in it."""
        cfg = self.config
        C, V, T = cfg.n_embd, cfg.vocab_size, idx.shape[1]
        idx = sharding.constrain(idx, "batch", "time")
        wte = embed(V, C, "wte").embedding
        x = sharding.lookup(wte, idx)
        start = None if cache is None else cache.read
        positions = jnp.arange(T) if start is None else start + jnp.arange(T)
        if cfg.smear:
            factor = parameter(self, "smear", nn.initializers.zeros, C)
            before = None if cache is None else jnp.where(cache.read > 0, sharding.rows(wte, cache.last), 0)
            x = x + factor[None, None] * previous(x, before)
        if cfg.bigram_embed:
            pairs = previous(idx, None if cache is None else cache.last).astype(jnp.int32) * V + idx.astype(jnp.int32)
            embedded = sharding.rows(embed(V * V, C, "bigram", stddev=0.0).embedding, pairs)
            x = x + jnp.where(positions[None, :, None] > 0, embedded, 0)  # position 0 has no previous token
        if cfg.position == "learned":
            x = x + embed(cfg.block_size, C, "wpe")(positions)[None]
        if sharding.platform() != "cpu":  # the dtype of the blocks' outputs, as `matmul.dot` writes them
            x = matmul.to_compute_dtype(x, cfg.precision)
        x = Dropout(self.dropout, name="drop")(sharding.constrain(x, "batch", "time", None))
        block = Block
        if cfg.remat != "none" and cache is None:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "matmuls" else None
            block = nn.remat(Block, policy=policy)
        if cfg.scan_layers and cache is None:
            rngs: dict[Any, bool] = {"params": True, "dropout": True}
            # One loop, whose body is compiled once.
            loop = nn.scan(lambda block, x, _: (block(x), None), {"params": 0}, split_rngs=rngs, length=cfg.n_layer)
            x, _ = loop(block(cfg, self.dropout, name="h"), x, None)
        else:
            for i in range(cfg.n_layer):
                x = block(cfg, self.dropout, name=f"h_{i}")(x, start)
        if not cfg.tie_weights:  # initialized here, applied by `head`
            unbiased = dataclasses.replace(cfg, bias=False)
            Linear(unbiased, V, 0.0 if cfg.zero_init else 0.02, name="lm_head").weights(C)
        return norm(cfg, "ln_f")(x)


def previous(x: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """(B, T, ...) shifted by one token: x[:, t - 1] at t, and `before` (B, ...) at 0, by default zeros."""
    if before is None:
        return jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))[:, :-1]
    return jnp.concatenate([before[:, None], x[:, :-1]], axis=1)


class Bigram(nn.Module):
    """A (V, V) embedding, initially normal(1) as PyTorch's `nn.Embedding`. Its features are the logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, idx: jax.Array, cache: Cache | None = None) -> jax.Array:
        """(B, T) ids -> (B, T, V) logits; the cache is ignored."""
        table = embed(self.config.vocab_size, self.config.vocab_size, "token_embedding_table", stddev=1.0)
        # Without the constraint, each device would compute the logits of the whole batch.
        return sharding.constrain(sharding.rows(table.embedding, idx), "batch", "time", None)


def module(config: ModelConfig, dropout: Rate = None) -> GPT | Bigram:
    return Bigram(config) if config.kind == "bigram" else GPT(config, dropout)


def head_kernel(config: ModelConfig, params: Params) -> jax.Array:
    """The kernel (C, V) of a GPT's `head`; with tied weights the token embedding."""
    if config.tie_weights:
        return params["wte"]["embedding"].T
    head = params["lm_head"]
    return head["transposed"].T if "transposed" in head else head["kernel"]


def head(config: ModelConfig, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Features (..., C) and a kernel (C, V) -> logits (..., V), in the dtype of `matmul.dot`, or float32 with
    softcap."""
    out = matmul.dot(x, kernel, config.precision)
    out = sharding.constrain(out, *["batch", "time", None][: x.ndim - 1], "width")
    return config.softcap * jnp.tanh(out.astype(jnp.float32) / config.softcap) if config.softcap else out


@partial(jax.jit, static_argnums=0)
@matmul.in_32_bits
def init_params(config: ModelConfig, key: jax.Array, init_scale: jax.Array | float | None = None) -> Params:
    """Initial float32 parameters, a pure function of (config, key). scan_layers stacks them but does not change them.

    Args:
      init_scale: a traced value in place of `config.init_scale`.

    Raises:
      UsageError: vocab_size is 0, or the config cannot run (`config.check`).
    """
    check(Config(model=config))
    if config.vocab_size < 1:
        raise UsageError("vocab_size is 0, expected at least 1: set the tokenizer's, as start.resolve does")
    scale = config.init_scale if init_scale is None else init_scale
    idx = jnp.zeros((1, 1), jnp.int32)  # no parameter depends on the length
    params = module(dataclasses.replace(config, scan_layers=False)).init(key, idx, mutable=["params"])["params"]
    params = jax.tree.map_with_path(lambda path, x: x * scale if path[-1].key in ("kernel", "embedding") else x, params)
    return stacked(params) if config.scan_layers else params


def stacked(params: Params) -> Params:
    """Replace the parameters of blocks h_0, h_1, ... by one block h, with a leading axis of L."""
    rest = {name: value for name, value in params.items() if not name.startswith("h_")}
    blocks = [params[f"h_{i}"] for i in range(len(params) - len(rest))]
    return rest | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)} if blocks else rest


def unstacked(params: Params) -> Params:
    """The inverse of `stacked`; parameters that are not stacked are returned as they are."""
    if "h" not in params:
        return params
    n = jax.tree.leaves(params["h"])[0].shape[0]
    rest = {name: value for name, value in params.items() if name != "h"}
    return rest | {f"h_{i}": jax.tree.map(lambda x, i=i: x[i], params["h"]) for i in range(n)}


@matmul.in_32_bits
def features(
    config: ModelConfig, params: Params, idx: jax.Array, dropout_key: jax.Array | None = None, dropout: Rate = None
) -> jax.Array:
    """The input of the head: (B, T) ids -> (B, T, C). A bigram has no head: its features are the logits, (B, T, V).

    Args:
      idx: ids below V, T up to block_size.
      dropout_key: turns on the dropout of the config; None for evaluation.
      dropout: a traced rate in place of `config.dropout`.

    Raises:
      ValueError: the ids are not (B, T) integers, or T is longer than block_size.
    """
    if idx.ndim != 2 or not jnp.issubdtype(idx.dtype, jnp.integer):
        raise ValueError(f"the ids have shape {idx.shape} and dtype {idx.dtype}, expected (B, T) integers")
    if idx.shape[1] > config.block_size:
        raise ValueError(f"{idx.shape[1]} tokens are longer than block_size, {config.block_size}")
    if dropout_key is None or not config.dropout:
        return cast(jax.Array, module(config).apply({"params": params}, idx))
    rate = config.dropout if dropout is None else dropout
    return cast(jax.Array, module(config, rate).apply({"params": params}, idx, rngs={"dropout": dropout_key}))


@partial(jax.jit, static_argnums=0)
@matmul.in_32_bits
@sharding.in_auto_mode(lambda params, idx, *_, **__: PartitionSpec(*sharding.spec_of(idx), None))
def forward(config: ModelConfig, params: Params, idx: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Float32 logits of the next token at every position: (B, T) ids -> (B, T, V). Arguments and errors as in
    `features`."""
    x = features(config, params, idx, dropout_key)
    return x if config.kind == "bigram" else head(config, x, head_kernel(config, params)).astype(jnp.float32)


@matmul.in_32_bits
@sharding.in_auto_mode(lambda params, idx, *_, **__: sharding.spec_of(idx))
def losses(
    config: ModelConfig,
    params: Params,
    idx: jax.Array,
    targets: jax.Array,
    dropout_key: jax.Array | None = None,
    dropout: Rate = None,
) -> jax.Array:
    """Loss of each target in nats: ids and targets (B, T) -> (B, T).

    Equals `token_losses` of `forward`, but large logits never exist all at once (`loss.losses_of`). Arguments and
    errors as in `features`; also a ValueError if the targets have another shape than the ids.
    """
    x = features(config, params, idx, dropout_key, dropout)
    if targets.shape != idx.shape:
        raise ValueError(f"the targets have shape {targets.shape}, expected {idx.shape}")
    if config.kind == "bigram":
        return token_losses(x, targets)
    return loss.losses_of(partial(head, config), x, head_kernel(config, params), targets, config.precision)


@matmul.in_32_bits
@sharding.in_auto_mode(lambda *_, **__: PartitionSpec())
def extend(
    config: ModelConfig, params: Params, cache: Cache, idx: jax.Array, length: jax.Array | int | None = None
) -> tuple[jax.Array, Cache]:
    """Read T more tokens: (B, T) ids -> the logits after the last one (B, V), and the updated cache.

    Up to block_size tokens, the logits are those of `forward` on all tokens so far. Beyond that, RoPE slides: each
    token attends to the last block_size tokens, whose keys and values above the first block depend on still earlier
    ones. Learned positions end: more tokens give NaN.

    A cache of S slots is enough for S tokens in total, padding included, or for any number if S >= block_size + T - 1.

    Args:
      length: how many of the T tokens are real, 1 to T. The others are padding on the right: nothing attends to them,
        and the next tokens overwrite them. Learned positions must hold them, too. None: all.

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
@sharding.in_auto_mode(
    lambda params, idx, targets=None: (
        sharding.spec_of(idx) if targets is None else (PartitionSpec(sharding.spec_of(idx)[0]), PartitionSpec())
    )
)
def logits_and_loss(
    config: ModelConfig, params: Params, idx: jax.Array, targets: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """(logits, loss), as in the lecture notes.

    Without targets: logits (B, T, V) and None. With targets (B, T): logits (B*T, V), and the mean cross-entropy in
    nats.
    """
    logits = forward(config, params, idx)
    if targets is None:
        return logits, None
    B, T, V = logits.shape
    logits = logits.reshape(B * T, V)
    return logits, cross_entropy(logits, targets.reshape(B * T))
