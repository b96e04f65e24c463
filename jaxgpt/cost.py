"""The number of parameters of a model, and the shapes of its kernels."""

import dataclasses
from functools import lru_cache

from jaxgpt.config import ModelConfig

FLOAT = 4
"""Bytes of a float32."""


@lru_cache(maxsize=1024)
def n_params(config: ModelConfig) -> int:
    """Number of parameters; an unknown vocab_size (0) counts as 1."""
    import jax

    from jaxgpt import prng
    from jaxgpt.model import init_params  # which imports this module

    one_block = dataclasses.replace(config, n_layer=1, vocab_size=max(1, config.vocab_size))  # all blocks are alike
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


def swiglu_width(C: int) -> int:
    """Hidden channels of a SwiGLU with about the 8 C² parameters of the other MLPs: 8 C / 3, a multiple of 8."""
    return 8 * max(1, round(C / 3))
