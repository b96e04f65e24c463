"""A look inside a model: attention maps, the logit lens, and the loss of every token of a text."""

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
from jaxgpt.data import Ids
from jaxgpt.diagnostics.derivatives import exact
from jaxgpt.loss import token_losses


def attention_maps(config: ModelConfig, params: model.Params, idx: jax.Array) -> jax.Array:
    """How much each token attends to each: (B, T) ids -> (L, B, H, T, T), from query t (row) to key s.

    Rows sum to one; above the diagonal, and outside a window, there are zeros. They are the weights of the reference
    attention, without dropout, whichever kernel `forward` uses. All maps exist at once: L B H T**2 floats.

    Raises:
      ValueError: T is longer than block_size, or the model is a bigram.
    """
    if config.kind == "bigram":
        raise ValueError("a bigram has no attention: a model of kind gpt is expected")
    mask = causal_mask(idx.shape[1], config.window)[None, None]

    def weights(q: jax.Array, k: jax.Array, *_: Any) -> jax.Array:
        return attention_weights(q, kernels.repeat_kv(k, config.n_head), mask, precision=config.precision)

    calls = _calls(config, params, idx, model.MultiHeadAttention, "attend")
    return jnp.stack([weights(*args) for args, _ in calls])


def logit_lens(config: ModelConfig, params: model.Params, idx: jax.Array) -> jax.Array:
    """The last norm and the head applied to the residual stream at every depth: (B, T) ids -> (L + 1, B, T, V).

    Depth 0 is the embeddings, depth l the output of block l; the last are the logits of `forward` (nostalgebraist 2020,
    "interpreting GPT: the logit lens"). A bigram has only depth 0.

    Raises:
      ValueError: T is longer than block_size.
    """
    if config.kind == "bigram":
        return model.forward(config, params, idx)[None]
    blocks = _calls(config, params, idx, model.Block, "__call__")
    norm, kernel = model.norm(config, "ln_f"), model.head_kernel(config, params)
    if isinstance(norm, nn.Module):
        norm = norm.bind({"params": params["ln_f"]})
    stream = [blocks[0][0][0], *(out for _, out in blocks)]  # what the first block reads, and what each returns
    return jnp.stack([model.head(config, norm(x), kernel).astype(jnp.float32) for x in stream])


def _calls(config: ModelConfig, params: model.Params, idx: jax.Array, kind: Any, method: str) -> list[Any]:
    """(arguments, result) of each call of a module's method in a forward pass, block by block."""
    found = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, kind) and context.method_name == method:
            found.append((args, out))
        return out

    with nn.intercept_methods(record):
        model.forward(replace(config, scan_layers=False, remat="none"), model.unstacked(params), idx)
    return found


class Lens(NamedTuple):
    """The prediction of the next token at each depth of the model."""

    losses: jax.Array  # (L + 1, B, T) nats, of the targets
    divergence: jax.Array  # (L + 1, B, T) nats, KL(last || this)
    top: jax.Array  # (L + 1, B, T) the most likely id
    probability: jax.Array  # (L + 1, B, T) of that id


def lens(config: ModelConfig, params: model.Params, batch: Any) -> Lens:
    """`logit_lens` in float32 on a batch of (B, T) inputs and targets. Holds all (L + 1) B T V logits at once."""
    with jax.default_matmul_precision("highest"):
        logits = logit_lens(exact(config), params, batch.inputs)
    log_p = jax.nn.log_softmax(logits)
    last = log_p[-1][None]
    divergence = (jnp.exp(last) * (last - log_p)).sum(axis=-1)
    targets = jnp.broadcast_to(batch.targets, logits.shape[:-1])
    return Lens(token_losses(logits, targets), divergence, logits.argmax(axis=-1), jnp.exp(log_p.max(axis=-1)))


class Attention(NamedTuple):
    """Where the heads of each block look: means over all tokens."""

    entropy: jax.Array  # (L, H) nats; its exponential is about the number of tokens that a head attends to
    uniform: jax.Array  # () nats, the entropy of uniform attention to the past
    distance: jax.Array  # (L, H) mean distance to the key, in tokens


def attention(config: ModelConfig, params: model.Params, idx: jax.Array) -> Attention:
    """Entropy and reach of attention on (B, T) ids, in float32; the maps of one window exist at a time.

    Raises:
      ValueError: as `attention_maps`.
    """
    T = idx.shape[1]
    back = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]  # (T, S) tokens back

    def one(window: jax.Array) -> tuple[jax.Array, jax.Array]:
        maps = exact_maps(config, params, window[None])[:, 0]  # (L, H, T, S)
        return entropy(maps).mean(axis=-1), jnp.einsum("lhts,ts->lht", maps, back.astype(maps.dtype)).mean(axis=-1)

    entropies, distances = jax.lax.map(one, idx)
    uniform = jnp.log(jnp.minimum(jnp.arange(T) + 1, config.window or T)).mean()
    return Attention(entropies.mean(axis=0), uniform, distances.mean(axis=0))


def exact_maps(config: ModelConfig, params: model.Params, idx: jax.Array) -> jax.Array:
    """`attention_maps` in float32, whatever the precision of the model."""
    with jax.default_matmul_precision("highest"):
        return attention_maps(exact(config), params, idx)


def entropy(weights: jax.Array) -> jax.Array:
    """-sum(w log w) of each row in nats: (..., S) -> (...)."""
    return -jax.scipy.special.xlogy(weights, weights).sum(axis=-1)


class Scores(NamedTuple):
    """The N - 1 tokens after the first of a text, in order."""

    losses: Any  # (N - 1,) nats: -log of the probability of the token
    ids: Any  # (N - 1, k) the most likely tokens in its place, the likeliest first
    probabilities: Any  # (N - 1, k) of these


def token_scores(
    config: ModelConfig, params: model.Params, tokens: Ids, k: int = 5, stride: int = 0, n_ids: int = 0
) -> Scores:
    """The loss of each token of a text (N,) given those before it, in float32, and the k likeliest in its place.

    Args:
      stride: how far windows of block_size are apart. 0: block_size, as in `evaluate`, whose loss is then their mean;
        1: each token sees all of the block_size tokens before it, at block_size times the cost.
      n_ids: ids from here on are padding of the vocabulary and are never among the k; 0: there are none.

    Raises:
      ValueError: fewer than 2 tokens, or k or stride is out of range.
    """
    N, T, n_ids = len(tokens), min(config.block_size, len(tokens) - 1), n_ids or config.vocab_size
    stride = stride or T
    if N < 2:
        raise ValueError(f"{N} tokens have none to predict, expected at least 2")
    if not 1 <= k <= n_ids:
        raise ValueError(f"k is {k}, expected 1 to {n_ids}, the vocabulary")
    if not 1 <= stride <= T:
        raise ValueError(f"stride is {stride}, expected 1 to {T}, the tokens of a window")
    starts = np.minimum(np.arange(0, N - 1 - T + stride, stride), N - 1 - T)
    inputs = starts[:, None] + np.arange(T)[None]  # (windows, T) the position of each input token
    tokens = np.asarray(tokens, np.int32)
    scores = jax.device_get(_scores(exact(config), k, n_ids, params, tokens[inputs], tokens[inputs + 1]))
    # A token in several windows counts in the first of them, where it has the most context.
    first = np.unique(inputs, return_index=True)[1]
    return Scores(*(x.reshape(-1, *x.shape[2:])[first] for x in scores))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(
    config: ModelConfig, k: int, n_ids: int, params: model.Params, inputs: jax.Array, targets: jax.Array
) -> Scores:
    """Scores (windows, T, ...), one window at a time: the logits of all of them may not fit."""

    def one(window: tuple[jax.Array, jax.Array]) -> Scores:
        with jax.default_matmul_precision("highest"):
            logits = model.forward(config, params, window[0][None])[0]
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits)[:, :n_ids], k)
        return Scores(token_losses(logits, window[1]), ids, probabilities)

    return jax.lax.map(one, (inputs, targets))
