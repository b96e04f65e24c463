"""Every model of the ladder as a pure function of its parameters, without Flax."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt import activations, prng
from jaxgpt.attention import attention, causal_mask
from jaxgpt.matmul import dot

Params = dict[str, Any]


@dataclass(frozen=True)
class Rung:
    """A model of the ladder and how it is trained."""

    name: str
    about: str
    lecture: tuple[float, ...] = ()  # the loss there, or reported by others: one figure, or both ends of a range
    lecture_size: str = ""  # of the lecture's model where it is larger
    kind: Literal["counted", "bigram", "transformer"] = "transformer"
    n_layer: int = 1
    n_head: int = 1
    feed_forward: int = 0  # hidden width in multiples of the channels; 0: none, 1: one linear layer and a ReLU
    residual: bool = False  # project the output of attention and of the feed-forward, and add it to the input
    layer_norm: bool = False
    dropout: float = 0.0
    channels: int = 32
    block_size: int = 8
    batch_size: int = 32
    learning_rate: float = 1e-3
    steps: int = 5000


def init_params(rung: Rung, V: int, key: jax.Array) -> Params:
    """Initial parameters with PyTorch's default distributions: a (V, V) table for the bigram, else embeddings, blocks
    and a head."""
    keys, C = iter(jax.random.split(key, 8 + 8 * rung.n_layer)), rung.channels

    def linear(n_in: int, n_out: int, bias: bool = True) -> Params:
        bound = n_in**-0.5
        drawn = jax.random.uniform(next(keys), (n_in + bias, n_out), minval=-bound, maxval=bound)
        return {"kernel": drawn[:n_in], "bias": drawn[n_in]} if bias else {"kernel": drawn}

    def norm() -> Params:
        return {"scale": jnp.ones(C), "bias": jnp.zeros(C)}

    def block() -> Params:
        params: Params = {name: linear(C, C, bias=False) for name in ("key", "query", "value")}
        if rung.residual:
            params["proj"] = linear(C, C)
        if rung.feed_forward:
            params["up"] = linear(C, rung.feed_forward * C)
        if rung.feed_forward > 1:
            params["down"] = linear(rung.feed_forward * C, C)
        if rung.layer_norm:
            params |= {"ln_1": norm(), "ln_2": norm()}
        return params

    if rung.kind == "bigram":
        return {"table": jax.random.normal(next(keys), (V, V))}
    return {
        "tokens": jax.random.normal(next(keys), (V, C)),
        "positions": jax.random.normal(next(keys), (rung.block_size, C)),
        "blocks": [block() for _ in range(rung.n_layer)],
        "head": linear(C, V),
        **({"ln_f": norm()} if rung.layer_norm else {}),
    }


@partial(jax.jit, static_argnums=0)
def forward(rung: Rung, params: Params, idx: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits of the next token: ids (B, T) -> (B, T, V). Dropout needs a key."""
    if "table" in params:
        return params["table"][idx]
    keys = None if dropout_key is None else iter(jax.random.split(dropout_key, 3 * rung.n_layer))

    def drop(x: jax.Array) -> jax.Array:
        if keys is None or not rung.dropout:
            return x
        kept = prng.keep_mask(next(keys), 1 - rung.dropout, x.shape[:-2], *map(jnp.arange, x.shape[-2:]))
        return jnp.where(kept, x / (1 - rung.dropout), 0)

    x = params["tokens"][idx] + params["positions"][None, : idx.shape[1]]
    B, T, C = x.shape
    for block in params["blocks"]:
        normed = _norm(block.get("ln_1"), x)
        heads = (_linear(block[name], normed).reshape(B, T, rung.n_head, -1) for name in ("query", "key", "value"))
        q, k, v = (each.swapaxes(1, 2) for each in heads)
        out = attention(q, k, v, causal_mask(T)[None, None], drop=drop).swapaxes(1, 2).reshape(B, T, C)
        x = x + drop(_linear(block["proj"], out)) if rung.residual else out
        if rung.feed_forward:
            out = jax.nn.relu(_linear(block["up"], _norm(block.get("ln_2"), x)))
            out = _linear(block["down"], out) if "down" in block else out
            x = x + drop(out) if rung.residual else out
    return _linear(params["head"], _norm(params.get("ln_f"), x))


def _linear(params: Params, x: jax.Array) -> jax.Array:
    y = dot(x, params["kernel"])
    return y + params["bias"][None, None] if "bias" in params else y


def _norm(params: Params | None, x: jax.Array) -> jax.Array:
    """LayerNorm; without parameters, `x` as it is."""
    return activations.layer_norm(x, params["scale"]) + params["bias"][None, None] if params else x
