"""The parts that a forward pass consists of, each as a function of its own: what can be counted and timed alone."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import attention, cost, kernels, layers, loss, prng
from jaxgpt import matmul as numerics
from jaxgpt.config import ModelConfig

Shape = jax.ShapeDtypeStruct


class Part(NamedTuple):
    """One kind of work in a forward pass."""

    name: str
    times: int
    """How often a forward pass does it."""
    function: Callable[..., Any]  # of (params, *inputs)
    params: dict[str, Shape]
    inputs: tuple[Shape, ...]


def parts(config: ModelConfig, B: int) -> list[Part]:
    """The parts of the loss of B full contexts, in their order: together they have the parameters of `init_params`, and
    the products of `forward`."""
    T, C, V, L = config.block_size, config.n_embd, config.vocab_size, config.n_layer
    idx, x = Shape((B, T), jnp.int32), _floats(B, T, C)
    logits = _floats(B, T, V)
    if config.kind == "bigram":
        rows = Part("embeddings", 1, lambda p, idx: jnp.take(p["table"], idx, axis=0), {"table": _floats(V, V)}, (idx,))
        return [rows, Part("loss", 1, _loss, {}, (logits, idx))]
    H, D = config.n_head, C // config.n_head
    kv, shapes = config.n_kv_head or H, cost.kernels(config)
    hidden = shapes["c_fc"][1]
    found = [Part("embeddings", 1, partial(_embed, config), _tables(config), (idx,)), _norm(config, x)]
    found.append(_linear(config, "queries, keys, values", ("query", "key", "value"), x))
    if config.value_embed:
        table, values = {"table": _floats(V, kv * D)}, _floats(B, T, kv * D)
        found.append(
            Part("value embedding", L, lambda p, v, idx: v + jnp.take(p["table"], idx, axis=0), table, (values, idx))
        )
    heads = _floats(B, H, T, D), _floats(B, kv, T, D), _floats(B, kv, T, D)
    if config.qk_norm or config.position == "rope":
        found.append(Part("norm, rotation of queries, keys", L, partial(_turn, config), {}, heads[:2]))
    found.append(Part("attention", L, lambda p, q, k, v: kernels.causal_attention(config, q, k, v), {}, heads))
    found.append(_linear(config, "attention's projection", ("attn/c_proj",), x))
    found.append(_linear(config, "MLP up", ("c_gate", "c_fc") if config.mlp == "swiglu" else ("c_fc",), x))
    wide = _floats(B, T, hidden)
    found.append(
        Part("MLP's non-linearity", L, partial(_activate, config), {}, (wide,) * (1 + (config.mlp == "swiglu")))
    )
    found.append(_linear(config, "MLP down", ("mlp/c_proj",), wide))
    found.append(Part("residual sums", 2 * L, lambda p, x, y: x + y, {}, (x, x)))
    head = {} if config.tie_weights else {"kernel": _floats(C, V)}
    inputs = (x, _floats(V, C)) if config.tie_weights else (x,)  # a tied head's parameters are the embedding's
    return [*found, Part("head", 1, partial(_head, config), head, inputs), Part("loss", 1, _loss, {}, (logits, idx))]


def _floats(*shape: int) -> Shape:
    return Shape(shape, jnp.float32)


def _tables(config: ModelConfig) -> dict[str, Shape]:
    C, V = config.n_embd, config.vocab_size
    tables = {"wte": _floats(V, C)}
    if config.position == "learned":
        tables["wpe"] = _floats(config.block_size, C)
    if config.smear:
        tables["smear"] = _floats(C)
    if config.bigram_embed:
        tables["bigram"] = _floats(V * V, C)
    return tables


def _embed(config: ModelConfig, params: Any, idx: jax.Array) -> jax.Array:
    """As in `gpt.GPT`: (B, T) -> (B, T, C)."""
    before = jnp.pad(idx, [(0, 0), (1, 0)])[:, :-1]
    x = jnp.take(params["wte"], idx, axis=0)
    if config.smear:
        x = x + params["smear"][None, None] * jnp.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1]
    if config.bigram_embed:
        pairs = jnp.take(params["bigram"], before * config.vocab_size + idx, axis=0)
        x = x + pairs.at[:, 0].set(0.0)  # the first has no token before it
    return x + params["wpe"][None] if config.position == "learned" else x


def _norm(config: ModelConfig, x: Shape) -> Part:
    norm: Any = layers.norm(config, "norm")
    if config.norm == "rms":
        return Part("norms", 2 * config.n_layer + 1, lambda p, x: norm(x), {}, (x,))
    params = jax.eval_shape(norm.init, prng.key(0), x)["params"]
    return Part("norms", 2 * config.n_layer + 1, lambda p, x: norm.apply({"params": p}, x), params, (x,))


def _linear(config: ModelConfig, name: str, kernels: tuple[str, ...], x: Shape) -> Part:
    """Kernels side by side, one product, as `layers.joined`."""
    K, N = x.shape[-1], sum(cost.kernels(config)[kernel][1] for kernel in kernels)
    params = {"kernel": _floats(K, N)} | ({"bias": _floats(N)} if config.bias else {})

    def apply(params: Any, x: jax.Array) -> jax.Array:
        out = numerics.dot(x, params["kernel"], config.precision)
        return out + params["bias"][None, None] if config.bias else out

    return Part(name, config.n_layer, apply, params, (x,))


def _turn(config: ModelConfig, params: Any, q: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
    both: tuple[jax.Array, ...] = (q, k)
    if config.qk_norm:
        both = tuple(map(numerics.rms_norm, both))
    return tuple(map(attention.rotate, both)) if config.position == "rope" else both


def _activate(config: ModelConfig, params: Any, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """As in `gpt.MLP`."""
    if gate is not None:
        return jax.nn.silu(gate) * x
    return jnp.square(jax.nn.relu(x)) if config.mlp == "relu2" else jax.nn.gelu(x, approximate=config.gelu == "tanh")


def _head(config: ModelConfig, params: Any, x: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
    kernel = params["kernel"] if embedding is None else embedding.T
    out = numerics.dot(x, kernel, config.precision).astype(jnp.float32)
    return numerics.softcap(out, config.softcap) if config.softcap else out


def _loss(params: Any, logits: jax.Array, targets: jax.Array) -> jax.Array:
    return loss.token_losses(logits, targets).mean()
