"""What a model costs, counted on paper from its config alone: parameters, operations, bytes.

C, L, H, T and V are n_embd, n_layer, n_head, block_size and vocab_size; a float has four bytes.
"""

from jaxgpt.config import ModelConfig

FLOAT = 4
"""Bytes of a float32."""


def n_params(config: ModelConfig) -> int:
    """How many numbers `nn.init_params` makes, exactly.

    A block has 12 C² in six kernels and 2 C in two norms, and with biases 11 C more; around the blocks are V C for the
    tokens, T C for the positions, a last norm, and V C for a head of its own. The bigram is a table of V².
    """
    C, V = config.n_embd, config.vocab_size
    if config.kind == "bigram":
        return V * V
    block = 12 * C * C + 2 * C + 11 * C * config.bias
    tables = (2 - config.tie_weights) * V * C + config.block_size * C
    return config.n_layer * block + tables + C + C * config.bias


def flops_per_token(config: ModelConfig) -> int:
    """Operations of the products of a forward pass per token of a full context: L (24 C² + 4 T C) + 2 V C.

    (M, K) @ (K, N) is 2 M K N: 24 C² for a block's kernels, 4 T C for its scores and weighted values (the masked half
    is computed too), 2 V C for the head. Training is three times that: the backward pass has two products for each.
    Left out is all that is no product: look-ups (so the bigram has none), norms, softmax, GELU, dropout, the loss and
    the optimizer.
    """
    C, T = config.n_embd, config.block_size
    if config.kind == "bigram":
        return 0
    return config.n_layer * (24 * C * C + 4 * T * C) + 2 * config.vocab_size * C


def activation_bytes(config: ModelConfig, batch_size: int, *, recomputed: bool = False) -> int:
    """Bytes that the backward pass of `batch_size` full contexts needs of the forward pass: an estimate from below.

    In floats per token, L (16 C + 2 H T) + 2 C + V:

    - of a block, 16 C: what goes into its norms (2 C), kernels (C, C, C, 4 C) and GELU (4 C), and q, k and v (3 C)
    - and 2 H T: the attention weights before and after they are divided by their sum; with dropout 3 H T
    - after the blocks: what goes into the last norm and out of it, and the logits

    The gradient of the logits may take their place, so it is not counted again; nor are masks and temporaries.

    Args:
      recomputed: count the results of products only, L (10 C + H T) + V. All else follows from them, and compilers for
        accelerators compute it again where memory is short.
    """
    C, V, HT = config.n_embd, config.vocab_size, config.n_head * config.block_size
    if config.kind == "bigram":
        floats = V
    elif recomputed:
        floats = config.n_layer * (10 * C + HT) + V
    else:
        floats = config.n_layer * (16 * C + (3 if config.dropout else 2) * HT) + 2 * C + V
    return FLOAT * batch_size * config.block_size * floats
