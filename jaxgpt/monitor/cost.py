"""The size of a model: its parameters, the shapes of its kernels, and the start-up line."""

import dataclasses
from functools import lru_cache

import jax

from jaxgpt import matmul, prng
from jaxgpt.config import ModelConfig
from jaxgpt.kernels import kernel, repeatable
from jaxgpt.model import init_params, swiglu_width

FLOAT = 4
"""Bytes of a float32."""


@lru_cache(maxsize=1024)
def n_params(config: ModelConfig) -> int:
    """Number of parameters; an unknown vocab_size (0) counts as 1."""
    # All blocks are alike, and no shape depends on the precision.
    one_block = dataclasses.replace(config, n_layer=1, vocab_size=max(1, config.vocab_size), precision="float32")
    shapes = jax.eval_shape(lambda: init_params(one_block, prng.key(0)))
    return sum(
        leaf.size * (config.n_layer if path[0].key in ("h", "h_0") else 1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    )


def kernels(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shape (in, out) of each kernel of a block."""
    C, kv = config.n_embd, (config.n_kv_head or config.n_head) * (config.n_embd // config.n_head)
    attention = {"query": (C, C), "key": (C, kv), "value": (C, kv), "attn/c_proj": (C, C)}
    if config.mlp == "swiglu":
        hidden = swiglu_width(C)
        return attention | {"c_gate": (C, hidden), "c_fc": (C, hidden), "mlp/c_proj": (hidden, C)}
    return attention | {"c_fc": (C, 4 * C), "mlp/c_proj": (4 * C, C)}


def describe(config: ModelConfig) -> str:
    """The model's size, compute dtype and attention kernel on this device, on one line, with a warning if the gradients
    of that kernel are not repeatable."""
    line = f"{n_params(config):,} parameters, {matmul.resolve(config.precision)} matmuls"
    if config.kind == "bigram":
        return line
    plain, dropped = (kernel(config, config.block_size, dropped) for dropped in (False, config.dropout > 0))
    line += f", attention: {plain}" + (f" ({dropped} while weights are dropped)" if dropped != plain else "")
    if not repeatable(dropped, config.block_size):
        line += "; its gradients are not repeatable, so resumed runs differ by rounding; --deterministic avoids it"
    return line
