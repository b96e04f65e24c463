"""What a model costs, counted on paper from its config alone: parameters, operations, bytes.

C, L, H, T and V are n_embd, n_layer, n_head, block_size and vocab_size; a float has four bytes.
"""

from jaxgpt.config import ModelConfig

FLOAT = 4
"""Bytes of a float32."""
LOGITS = 2**26
"""Logits that may exist at once in training, 256 MiB of float32; of more, part by part."""
BLOCKED = 256
"""Contexts from here on may be attended a block of queries at a time."""


def n_params(config: ModelConfig) -> int:
    """How many numbers `nn.init_params` makes, exactly.

    A block has its kernels (12 C² for that of GPT-2), with biases as many numbers as they have columns, and two norms
    of C, with biases 2 C, or of nothing for RMSNorm. Around the blocks are V C for the tokens, T C for learned
    positions, a last norm, V C for a head of its own, and what smear and the embeddings of pairs and values add. The
    bigram is a table of V².
    """
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    if config.kind == "bigram":
        return V * V
    shapes = kernels(config)
    norm = 0 if config.norm == "rms" else C * (1 + config.bias)
    block = sum(k * n for k, n in shapes.values()) + config.bias * sum(n for _, n in shapes.values()) + 2 * norm
    tables = (2 - config.tie_weights) * V * C + (config.position == "learned") * config.block_size * C
    tables += config.smear * C + config.bigram_embed * V * V * C + L * config.value_embed * V * shapes["value"][1]
    return L * block + tables + norm


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
    """Operations of the products of a forward pass per token of a full context: L (24 C² + 4 T C) + 2 V C for GPT-2's
    blocks.

    (M, K) @ (K, N) is 2 M K N: 24 C² for a block's kernels, 4 T C for its scores and weighted values (as if the masked
    half was computed too, which not every kernel does), 2 V C for the head. Training is three times that: the backward
    pass has two products for each. Left out is all that is no product: look-ups (so the bigram has none), norms,
    softmax, GELU, dropout, the loss and the optimizer.
    """
    C, T = config.n_embd, config.block_size
    if config.kind == "bigram":
        return 0
    block = 2 * sum(k * n for k, n in kernels(config).values()) + 4 * T * C
    return config.n_layer * block + 2 * config.vocab_size * C


def activation_bytes(config: ModelConfig, batch_size: int, *, recomputed: bool = False) -> int:
    """Bytes that the backward pass of `batch_size` full contexts needs of the forward pass: an estimate from below.

    In floats per token, for GPT-2's blocks L (16 C + 2 H T) + 2 C + V:

    - of a block, 16 C: what goes into its norms (2 C), kernels (C, C, C, 4 C) and GELU (4 C), and q, k and v (3 C)
    - and 2 H T: the attention weights before and after they are divided by their sum; with dropout 3 H T
    - after the blocks: what goes into the last norm and out of it, and the logits

    The gradient of the logits may take their place, so it is not counted again; nor are masks and temporaries. Where
    operands are bfloat16, a float counts two bytes; weights of attention that may be made block by block, what remat
    makes again, and logits beyond a part are not counted.

    Args:
      recomputed: count the results of products only, L (10 C + H T) + V. All else follows from them, and compilers for
        accelerators compute it again where memory is short.
    """
    C, T, V, L = config.n_embd, config.block_size, config.vocab_size, config.n_layer
    low = config.precision != "float32"
    logits = min(V, LOGITS // (batch_size * T) + 1)
    if config.kind == "bigram":
        return FLOAT * batch_size * T * V
    columns = {name: n for name, (_, n) in kernels(config).items()}
    hidden = columns["c_fc"]
    weights = config.n_head * T if config.dropout or (T < BLOCKED and not low) else 0
    if config.remat == "blocks":
        block = C
    elif recomputed or config.remat == "products":
        block = sum(columns.values()) + C + weights  # of the kernels, and of the weighted values
    else:
        inputs = 5 * C + sum(columns[name] for name in ("query", "key", "value"))  # of norms and kernels; q, k, v
        block = inputs + (1 if config.mlp == "relu2" else 2) * hidden + (3 if config.dropout else 2) * weights
    floats = L * block + (0 if recomputed else 2 * C) + logits
    return (FLOAT // 2 if low else FLOAT) * batch_size * T * floats
