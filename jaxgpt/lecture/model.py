"""Every model of the ladder as one pure function of its rung, without a framework."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt import activations, prng
from jaxgpt.attention import attention, causal_mask

Params = dict[str, Any]


@dataclass(frozen=True)
class Rung:
    """A model of the ladder; each differs from the one before it in a field or two."""

    name: str
    about: str
    lecture: tuple[float, ...] = ()
    """The loss in the lecture, or reported by others: one figure, or the two ends of a range."""
    lecture_size: str = ""
    """The size of the lecture's model, if it is larger."""
    kind: Literal["uniform", "unigram", "bigram counts", "bigram", "transformer"] = "transformer"
    n_layer: int = 1
    n_head: int = 1
    feed_forward: int = 0
    """Width of the hidden layer, in multiples of the channels; 0: none; 1: a single layer, as first in the lecture."""
    residual: bool = False
    """Project the output of each layer and add it to its input."""
    layer_norm: bool = False
    dropout: float = 0.0
    channels: int = 32
    block_size: int = 8
    batch_size: int = 32
    learning_rate: float = 1e-3
    steps: int = 5000


def init_params(rung: Rung, vocab_size: int, key: jax.Array) -> Params:
    """Fresh parameters, drawn as PyTorch does by default: a (V, V) table for the bigram, else embeddings, blocks and a
    head."""
    keys = iter(jax.random.split(key, 8 + 8 * rung.n_layer))
    C, V, sizes = rung.channels, vocab_size, {"tokens": vocab_size, "positions": rung.block_size}

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
        return params | ({"ln_1": norm(), "ln_2": norm()} if rung.layer_norm else {})

    if rung.kind == "bigram":
        return {"table": jax.random.normal(next(keys), (V, V))}
    params: Params = {name: jax.random.normal(next(keys), (n, C)) for name, n in sizes.items()}
    params["blocks"] = [block() for _ in range(rung.n_layer)]
    if rung.layer_norm:
        params["ln_f"] = norm()
    return params | {"head": linear(C, V)}


@partial(jax.jit, static_argnums=0)
def forward(rung: Rung, params: Params, idx: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits of the next token: (B, T) ids -> (B, T, V). Dropout is on with a key."""
    if "row" in params:
        return jnp.broadcast_to(params["row"], (*idx.shape, len(params["row"])))
    if "table" in params:
        return params["table"][idx]
    keys = None if dropout_key is None else iter(jax.random.split(dropout_key, 3 * rung.n_layer))

    def drop(x: jax.Array) -> jax.Array:
        if keys is None or not rung.dropout:
            return x
        kept = prng.keep_mask(next(keys), 1 - rung.dropout, x.shape[:-2], *map(jnp.arange, x.shape[-2:]))
        return jnp.where(kept, x / (1 - rung.dropout), 0)

    x = params["tokens"][idx] + params["positions"][None, : idx.shape[1]]
    for block in params["blocks"]:
        x = _attend(rung, block, x, drop)
        x = _feed_forward(rung, block, x, drop)
    if rung.layer_norm:
        x = _norm(params["ln_f"], x)
    return _linear(params["head"], x)


def _attend(rung: Rung, params: Params, x: jax.Array, drop: Any) -> jax.Array:
    B, T, C = x.shape
    H = rung.n_head
    seen = _norm(params["ln_1"], x) if rung.layer_norm else x
    q, k, v = (
        _linear(params[name], seen).reshape(B, T, H, C // H).swapaxes(1, 2) for name in ("query", "key", "value")
    )
    out = attention(q, k, v, causal_mask(T)[None, None], drop=drop).swapaxes(1, 2).reshape(B, T, C)
    return x + drop(_linear(params["proj"], out)) if rung.residual else out


def _feed_forward(rung: Rung, params: Params, x: jax.Array, drop: Any) -> jax.Array:
    if not rung.feed_forward:
        return x
    seen = _norm(params["ln_2"], x) if rung.layer_norm else x
    out = jax.nn.relu(_linear(params["up"], seen))
    if "down" in params:
        out = _linear(params["down"], out)
    return x + drop(out) if rung.residual else out


def _linear(params: Params, x: jax.Array) -> jax.Array:
    y = x @ params["kernel"]
    return y + params["bias"].reshape((1,) * (y.ndim - 1) + (-1,)) if "bias" in params else y


def _norm(params: Params, x: jax.Array) -> jax.Array:
    return activations.layer_norm(x, params["scale"]) + params["bias"][None, None]
