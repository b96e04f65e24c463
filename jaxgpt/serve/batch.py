"""The compiled programs of the playground: read texts into rows of a batch, decode a few tokens for all rows at once.

A row is one sequence, with its own position, key and filters. Rows do not influence each other: each draws what
`sample.generate` draws for it alone.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgpt import model, prng, sample
from jaxgpt.attention import Cache, init_cache
from jaxgpt.config import ModelConfig
from jaxgpt.diagnostics import inside

CHUNK = 16
"""Most tokens that one `decode` generates."""
LIKELY = 8
"""How many alternatives are reported for each token."""


class Settings(NamedTuple):
    """The filters of R rows, as in `SamplingParams`, but all traced: a new value does not recompile."""

    temperature: Any  # (R,), 0 takes the most likely token
    top_k: Any  # (R,) int32
    top_p: Any  # (R,)
    min_p: Any  # (R,)


DTYPES = Settings(np.float32, np.int32, np.float32, np.float32)
DEFAULT = Settings(0.8, 0, 1.0, 0.0)


class Rows(NamedTuple):
    """The state of R sequences."""

    cache: Cache  # each leaf is (R, ...), R caches of B = 1
    token: jax.Array  # (R,) int32: the last token, drawn but not yet read
    step: jax.Array  # (R,) int32: tokens drawn so far
    key: jax.Array  # (R,)
    settings: Settings


class Drawn(NamedTuple):
    """n tokens of N rows, with the model's probabilities before temperature and filters."""

    token: Any  # (n, N) int32
    p: Any  # (n, N) their probabilities
    likely: Any  # (n, N, K) int32: the most likely tokens, in order
    likely_p: Any  # (n, N, K) their probabilities


def empty(config: ModelConfig, R: int) -> Rows:
    cache = init_cache(config, 1, config.block_size)._replace(read=jnp.int32(0))
    settings = Settings(jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.float32(0))
    row = Rows(cache, jnp.int32(0), jnp.int32(0), prng.key(0), settings)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (R, *x.shape)), row)


@partial(jax.jit, static_argnames=("config", "n_ids"), donate_argnames="rows")
def read(config: ModelConfig, params: model.Params, rows: Rows, new: dict[str, Any], n_ids: int) -> tuple[Rows, Drawn]:
    """Read N texts into a row each, and draw the next token of each, (1, N).

    Args:
      new: the texts `idx` (N, T) with their `length` (N,); for each the `row` (N,) it goes into, R for none, its `seed`
        (N,), the `step` (N,) of the token to draw, and its `settings`.
      n_ids: only ids below this are drawn.
    """
    key = jax.vmap(lambda seed: jax.random.fold_in(prng.key(seed), 0))(new["seed"])  # of sequence 0 in `generate`

    def one(idx: jax.Array, length: jax.Array) -> tuple[jax.Array, Cache]:
        logits, cache = model.extend(config, params, init_cache(config, 1, config.block_size), idx[None], length)
        return logits[0], cache

    logits, cache = jax.vmap(one)(new["idx"], new["length"])
    drawn = _draw(n_ids, logits, jax.vmap(jax.random.fold_in)(key, new["step"]), new["settings"])
    filled = Rows(cache, drawn.token, new["step"] + 1, key, new["settings"])
    rows = jax.tree.map(lambda old, x: old.at[new["row"]].set(x, mode="drop"), rows, filled)
    return rows, jax.tree.map(lambda x: x[None], drawn)


@partial(jax.jit, static_argnames=("config", "N", "n_ids"), donate_argnames="rows")
def decode(
    config: ModelConfig, params: model.Params, rows: Rows, n: jax.Array, N: int, n_ids: int
) -> tuple[Rows, Drawn]:
    """Draw `n` more tokens, up to CHUNK, for the first N rows: (CHUNK, N), of which the first n are valid."""

    def one(cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache]:
        logits, cache = model.extend(config, params, cache, token[None, None])
        return logits[0], cache

    def body(i: jax.Array, carry: tuple[Rows, Drawn]) -> tuple[Rows, Drawn]:
        state, written = carry
        logits, cache = jax.vmap(one)(state.cache, state.token)
        drawn = _draw(n_ids, logits, jax.vmap(jax.random.fold_in)(state.key, state.step), state.settings)
        written = jax.tree.map(lambda to, x: lax.dynamic_update_index_in_dim(to, x, i, 0), written, drawn)
        return state._replace(cache=cache, token=drawn.token, step=state.step + 1), written

    likely = (CHUNK, N, min(LIKELY, n_ids))
    blank = Drawn(*(jnp.zeros(shape, dtype) for shape in (likely[:2], likely) for dtype in (jnp.int32, jnp.float32)))
    state, written = lax.fori_loop(0, n, body, (jax.tree.map(lambda x: x[:N], rows), blank))
    if len(rows.token) > N:
        state = jax.tree.map(lambda old, x: old.at[:N].set(x), rows, state)
    return state, written


@partial(jax.jit, static_argnames=("config", "n_ids"))
def look(config: ModelConfig, params: model.Params, idx: jax.Array, length: jax.Array, n_ids: int) -> tuple[Any, ...]:
    """The attention of the last of the first `length` tokens in idx (1, T), (L, H, T), or (0, 0, T) for a bigram; and
    the K most likely tokens after it, with their probabilities, (K,)."""
    logits, _ = model.extend(config, params, init_cache(config, 1, idx.shape[1]), idx, length)
    p, likely = lax.top_k(jax.nn.softmax(logits[0, :n_ids]), min(LIKELY, n_ids))
    if config.kind == "bigram":
        return jnp.zeros((0, 0, idx.shape[1])), likely, p
    maps = inside.attention_maps(config, params, idx)
    # Indexed layer by layer, XLA stacks these rows only, and holds a second copy of one layer's maps, not of all.
    rows = [lax.dynamic_index_in_dim(maps[i, 0], length - 1, 1, keepdims=False) for i in range(config.n_layer)]
    return jnp.stack(rows), likely, p


def _draw(n_ids: int, logits: jax.Array, keys: jax.Array, settings: Settings) -> Drawn:
    """The next token of each row from its logits (N, V) and key (N,): `sample.next_tokens` with settings per row."""
    logits = logits[:, :n_ids]
    probabilities = jax.nn.softmax(logits)
    likely_p, likely = lax.top_k(probabilities, min(LIKELY, n_ids))
    t, k, top_p, min_p = (x[:, None] for x in settings)
    kept = logits / jnp.where(t == 0, 1, t)

    def cut(kept: jax.Array) -> jax.Array:
        ordered = jnp.sort(kept, descending=True)
        smallest = jnp.take_along_axis(ordered, jnp.clip(k - 1, 0, n_ids - 1), axis=1)
        kept = jnp.where((k > 0) & (kept < smallest), -jnp.inf, kept)
        return jnp.where(top_p < 1, sample.top_p(kept, top_p), kept)

    # Sorting a large vocabulary is slow: skip it unless a row needs it.
    kept = lax.cond(jnp.any((k > 0) | (top_p < 1)), cut, lambda kept: kept, kept)
    sampled = jax.vmap(jax.random.categorical)(keys, sample.min_p(kept, min_p))
    token = jnp.where(settings.temperature == 0, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)
    return Drawn(token, jnp.take_along_axis(probabilities, token[:, None], axis=1)[:, 0], likely, likely_p)
