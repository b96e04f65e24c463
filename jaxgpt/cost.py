"""The size of a model and the FLOPs of its matmuls, from the config alone.

C, L, H, T and V are n_embd, n_layer, n_head, block_size and vocab_size.
"""

import dataclasses
from functools import lru_cache

from jaxgpt.config import ModelConfig

FLOAT = 4
"""Bytes of a float32."""
LOGITS = 2**26
"""Logits that may exist at once in training, 256 MiB of float32; more are computed chunk by chunk."""
BLOCKED = 256
"""Shortest context whose attention may be computed by blocks of queries."""


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


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs of the matmuls of a forward pass, per token of a full context: L (24 C² + 4 T C) + 2 V C for GPT-2.

    (M, K) @ (K, N) is 2 M K N: 24 C² for the kernels of a block, 4 T C for its attention scores and weighted values
    (counting the masked half, which some kernels skip), 2 V C for the head. Training takes three times as many, since
    the backward pass has two matmuls for each. Everything else is left out: embedding look-ups (so a bigram has 0),
    norms, softmax, activation functions, dropout, the loss and the optimizer.
    """
    C, T = config.n_embd, config.block_size
    if config.kind == "bigram":
        return 0
    block = 2 * sum(k * n for k, n in kernels(config).values()) + 4 * T * C
    return config.n_layer * block + 2 * config.vocab_size * C
