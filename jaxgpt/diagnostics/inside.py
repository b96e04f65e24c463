"""What happens between a model's embeddings and its logits: the logit lens, and where attention looks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import model as nn
from jaxgpt.config import ModelConfig
from jaxgpt.diagnostics.losses import exact


class Lens(NamedTuple):
    """The next token as each depth of the model would have it, 0 the embeddings, L the logits."""

    losses: jax.Array  # (L + 1, B, T) nats, of the targets
    divergence: jax.Array  # (L + 1, B, T) nats, KL(last || this): what the blocks above still change
    top: jax.Array  # (L + 1, B, T) the id of greatest probability
    probability: jax.Array  # (L + 1, B, T) of that id


def lens(config: ModelConfig, params: nn.Params, batch: Any) -> Lens:
    """The logit lens (nostalgebraist 2020) on a batch of (B, T) inputs and targets, in float32.

    All depths' logits exist at once, (L + 1) B T V floats.
    """
    with jax.default_matmul_precision("highest"):
        logits = nn.logit_lens(exact(config), params, batch.inputs)
    chances = jax.nn.log_softmax(logits)
    last = chances[-1][None]
    divergence = (jnp.exp(last) * (last - chances)).sum(axis=-1)
    targets = jnp.broadcast_to(batch.targets, logits.shape[:-1])
    top = logits.argmax(axis=-1)
    return Lens(nn.token_losses(logits, targets), divergence, top, jnp.exp(chances.max(axis=-1)))


class Attention(NamedTuple):
    """Where the heads of each block look: means over all tokens."""

    entropy: jax.Array  # (L, H) nats; exp of it is about how many tokens a head looks at
    uniform: jax.Array  # () nats, the entropy of a head that has no preference among the past
    distance: jax.Array  # (L, H) tokens back, by the weights


def attention(config: ModelConfig, params: nn.Params, idx: jax.Array) -> Attention:
    """Entropy and reach of attention on (B, T) ids, from `exact_maps`; the maps of one window exist at a time.

    Raises:
      ValueError: as `nn.attention_maps`.
    """
    T = idx.shape[1]
    back = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]  # (T, S) tokens back

    def one(window: jax.Array) -> tuple[jax.Array, jax.Array]:
        maps = exact_maps(config, params, window[None])[:, 0]  # (L, H, T, S)
        return entropy(maps).mean(axis=-1), jnp.einsum("lhts,ts->lht", maps, back.astype(maps.dtype)).mean(axis=-1)

    entropies, distances = jax.lax.map(one, idx)
    uniform = jnp.log(jnp.minimum(jnp.arange(T) + 1, config.window or T)).mean()
    return Attention(entropies.mean(axis=0), uniform, distances.mean(axis=0))


def exact_maps(config: ModelConfig, params: nn.Params, idx: jax.Array) -> jax.Array:
    """`nn.attention_maps` in float32, whatever the precision of the model: (B, T) ids -> (L, B, H, T, T)."""
    with jax.default_matmul_precision("highest"):
        return nn.attention_maps(exact(config), params, idx)


def entropy(weights: jax.Array) -> jax.Array:
    """-sum(w log w) of each row in nats, (..., S) -> (...); a weight of 0 adds nothing."""
    return -jax.scipy.special.xlogy(weights, weights).sum(axis=-1)
