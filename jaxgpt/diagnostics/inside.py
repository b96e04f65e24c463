"""A look inside a model: attention maps, the logit lens, and the loss of each token of a text."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import kernels, model
from jaxgpt.attention import attention_weights, causal_mask
from jaxgpt.config import ModelConfig
from jaxgpt.diagnostics.derivatives import exact
from jaxgpt.loss import token_losses
from jaxgpt.tokenizer import Ids


def attention_maps(config: ModelConfig, params: model.Params, idx: jax.Array) -> jax.Array:
    """The attention weights of query t (row) for key s (column): (B, T) ids -> (L, B, H, T, T). Rows sum to one.

    The reference attention computes them in float32 without dropout, whichever kernel and precision `forward` uses.

    Raises:
      ValueError: T is longer than block_size, or the model is a bigram.
    """
    if config.kind == "bigram":
        raise ValueError("a bigram has no attention: a model of kind gpt is expected")
    mask = causal_mask(idx.shape[1], config.window)[None, None]
    calls = _calls(config, params, idx, model.MultiHeadAttention, "attend")
    with jax.default_matmul_precision("highest"):
        return jnp.stack([attention_weights(q, kernels.repeat_kv(k, config.n_head), mask) for (q, k, *_), _ in calls])


def logit_lens(config: ModelConfig, params: model.Params, idx: jax.Array) -> jax.Array:
    """The last norm and the head applied to the residual stream at every depth, in float32: (B, T) ids ->
    (L + 1, B, T, V) logits.

    Depth 0 is the embeddings, depth l the output of block l; the last has the logits of `forward` (nostalgebraist 2020,
    "interpreting GPT: the logit lens"). A bigram has only depth 0. Raises ValueError if T is longer than block_size.
    """
    config = exact(config)
    if config.kind == "bigram":  # no matmuls
        return model.forward(config, params, idx)[None]
    blocks = _calls(config, params, idx, model.Block, "__call__")
    norm, kernel = model.norm(config, "ln_f"), model.head_kernel(config, params)
    if isinstance(norm, nn.Module):
        norm = norm.bind({"params": params["ln_f"]})
    stream = [blocks[0][0][0], *(out for _, out in blocks)]  # input of the first block, output of each
    with jax.default_matmul_precision("highest"):
        return jnp.stack([model.head(config, norm(x), kernel).astype(jnp.float32) for x in stream])


def _calls(config: ModelConfig, params: model.Params, idx: jax.Array, kind: Any, method: str) -> list[Any]:
    """(arguments, result) of each call of a method of the modules of a `kind` in a float32 forward pass."""
    found = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, kind) and context.method_name == method:
            found.append((args, out))
        return out

    with nn.intercept_methods(record), jax.default_matmul_precision("highest"):
        model.features(replace(exact(config), scan_layers=False), model.unstacked(params), idx)
    return found


class Lens(NamedTuple):
    """The prediction of the next token at each depth; arrays (L + 1, B, T)."""

    losses: jax.Array  # nats
    divergence: jax.Array  # KL(last depth || this depth), nats
    top: jax.Array  # the most likely id
    probability: jax.Array  # of that id


def lens(config: ModelConfig, params: model.Params, batch: Any) -> Lens:
    """`logit_lens` on a batch of (B, T) inputs and targets. Memory: (L + 1) B T V logits."""
    logits = logit_lens(config, params, batch.inputs)
    log_p = jax.nn.log_softmax(logits)
    last = log_p[-1][None]
    divergence = (jnp.exp(last) * (last - log_p)).sum(axis=-1)
    targets = jnp.broadcast_to(batch.targets, logits.shape[:-1])
    return Lens(token_losses(logits, targets), divergence, logits.argmax(axis=-1), jnp.exp(log_p.max(axis=-1)))


class Scores(NamedTuple):
    """Predictions of the N - 1 tokens after the first of a text."""

    losses: Any  # (N - 1,) nats
    ids: Any  # (N - 1, k) the most likely tokens at that position, the likeliest first
    probabilities: Any  # (N - 1, k) of `ids`


def token_scores(config: ModelConfig, params: model.Params, tokens: Ids, k: int = 5, stride: int = 0) -> Scores:
    """The loss of each token of a text (N,), in float32, and the k most likely tokens at its position.

    Args:
      stride: distance of the windows of block_size. 0: block_size, as in `evaluate`, whose loss is the mean of these;
        1: each token has the block_size tokens before it as context.

    Raises:
      ValueError: fewer than 2 tokens, or stride is out of range.
    """
    N, T = len(tokens), min(config.block_size, len(tokens) - 1)
    stride = stride or T
    if N < 2:
        raise ValueError(f"{N} tokens have none to predict, expected at least 2")
    if not 1 <= stride <= T:
        raise ValueError(f"stride is {stride}, expected 1 to {T}, the tokens of a window")
    starts = np.minimum(np.arange(0, N - 1 - T + stride, stride), N - 1 - T)
    inputs = starts[:, None] + np.arange(T)[None]  # (windows, T) the position of each input token
    tokens = np.asarray(tokens, np.int32)
    scores = jax.device_get(_scores(exact(config), k, params, tokens[inputs], tokens[inputs + 1]))
    # Of several windows with a token, the first gives it the most context.
    first = np.unique(inputs, return_index=True)[1]
    return Scores(*(x.reshape(-1, *x.shape[2:])[first] for x in scores))


@partial(jax.jit, static_argnums=(0, 1))
def _scores(config: ModelConfig, k: int, params: model.Params, inputs: jax.Array, targets: jax.Array) -> Scores:
    """Scores (windows, T, ...), one window at a time, because the logits of all may not fit into memory."""

    def one(window: tuple[jax.Array, jax.Array]) -> Scores:
        with jax.default_matmul_precision("highest"):
            logits = model.forward(config, params, window[0][None])[0]
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits), k)
        return Scores(token_losses(logits, window[1]), ids, probabilities)

    return jax.lax.map(one, (inputs, targets))
