"""Tokens to logits and loss: the seam that the rest of the package sees, and the only package that knows Flax.

Parameters are plain nested dicts of arrays; the models are pure functions of them.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxgpt import cost, kernels
from jaxgpt import matmul as numerics
from jaxgpt.bigram import Bigram
from jaxgpt.cache import Cache, init_cache
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.gpt import GPT
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


def model(config: ModelConfig) -> GPT | Bigram:
    """The Flax module of `config.kind`."""
    return Bigram(config) if config.kind == "bigram" else GPT(config)


@numerics.in_32_bits
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, a pure function of (config, key); the same numbers with scan_layers as without.

    Raises:
      UsageError: nobody has said how many ids there are.
    """
    if config.vocab_size < 1:
        raise UsageError("vocab_size is 0, expected at least 1: that of the tokenizer (start.resolve fills it in)")
    idx = jnp.zeros((1, config.block_size), jnp.int32)
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


@numerics.in_32_bits
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


@numerics.in_32_bits
def _apply(config: ModelConfig, params: Params, dropout_key: jax.Array | None, idx: jax.Array, *more: Any) -> jax.Array:
    _require_short(config, idx)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return cast(jax.Array, model(config).apply({"params": params}, idx, *more, rngs=rngs))


def _require_short(config: ModelConfig, idx: jax.Array) -> None:
    if idx.shape[1] > config.block_size:
        raise ValueError(f"{idx.shape[1]} tokens are longer than block_size, {config.block_size}")


def describe(config: ModelConfig) -> str:
    """What computes a model here, for a person: size, precision, the kernel of its attention, and whether training with
    it is not repeatable."""
    told = f"{cost.n_params(config):,} parameters, {numerics.resolve(config.precision)} products"
    if config.kind == "bigram":
        return told
    plain, dropped = (kernels.kernel(config, config.block_size, dropped) for dropped in (False, config.dropout > 0))
    told += f", attention: {plain}" + (f" ({dropped} while weights are dropped)" if dropped != plain else "")
    if not kernels.repeatable(dropped, config.block_size):
        told += "; its gradients are not repeatable, so a resumed run is equal up to rounding, not bit for bit"
    return told


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
