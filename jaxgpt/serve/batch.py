"""What is compiled: texts read into the rows of a batch, and a few tokens more for all its rows at once.

A row is one sequence, with its own position, key and settings; none sees another, and each draws what
`sample.generate` would draw for it alone.
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
"""The most tokens that a row gets at once."""
LIKELY = 8
"""How many of the most likely tokens are told of, beside the one that was drawn."""


class Settings(NamedTuple):
    """How a row draws, each (R,): those of `SamplingParams`, as values that a compiled program is given."""

    temperature: Any  # 0 takes the most likely token
    top_k: Any  # int32
    top_p: Any
    min_p: Any


DTYPES = Settings(np.float32, np.int32, np.float32, np.float32)


class Rows(NamedTuple):
    """Where R sequences stand."""

    cache: Cache  # of each row one of B = 1: every leaf has an axis of R before its own
    token: jax.Array  # (R,) int32: the last, drawn and not yet read
    step: jax.Array  # (R,) int32: tokens drawn so far
    key: jax.Array  # (R,)
    how: Settings


class Drawn(NamedTuple):
    """n tokens of N rows, and what the model thought of them, before any filter."""

    token: Any  # (n, N) int32
    chance: Any  # (n, N) its probability
    likely: Any  # (n, N, K) int32: the most likely tokens, the likeliest first
    chances: Any  # (n, N, K) their probabilities


def empty(config: ModelConfig, R: int) -> Rows:
    """R rows that hold nothing."""
    one = init_cache(config, 1, config.block_size)
    cache = one._replace(read=jnp.zeros((), jnp.int32))
    token, step, top_k = (jnp.zeros(R, jnp.int32) for _ in range(3))
    return Rows(
        jax.tree.map(lambda x: jnp.zeros((R, *x.shape), x.dtype), cache),
        token,
        step,
        jax.random.split(prng.key(0), R),
        Settings(jnp.zeros(R), top_k, jnp.ones(R), jnp.zeros(R)),
    )


def bytes_per_row(config: ModelConfig) -> int:
    """The memory that a row takes."""
    leaves = jax.tree.leaves(jax.eval_shape(partial(empty, config, 1)).cache)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@partial(jax.jit, static_argnames=("config", "n_ids"), donate_argnames="rows")
def read(config: ModelConfig, params: model.Params, rows: Rows, new: dict[str, Any], n_ids: int) -> tuple[Rows, Drawn]:
    """N texts read into rows of their own, and the next token of each, (1, N).

    Args:
      new: of each text its ids `idx` (N, T) and how many of the T are real, `length`; the `row` it goes into, R for
        none; the number `step` of the token to draw; the `seed` and the settings `how`.
      n_ids: ids below this only are drawn.
    """
    key = jax.vmap(lambda seed: jax.random.fold_in(prng.key(seed), 0))(new["seed"])

    def one(idx: jax.Array, length: jax.Array) -> tuple[jax.Array, Cache]:
        logits, cache = model.extend(config, params, init_cache(config, 1, config.block_size), idx[None], length)
        return logits[0], cache

    logits, cache = jax.vmap(one)(new["idx"], new["length"])
    drawn = _draw(n_ids, logits, jax.vmap(jax.random.fold_in)(key, new["step"]), new["how"])
    filled = Rows(cache, drawn.token, new["step"] + 1, key, new["how"])
    put = partial(jax.tree.map, lambda old, x: old.at[new["row"]].set(x, mode="drop"))
    return put(rows, filled), jax.tree.map(lambda x: x[None], drawn)


@partial(jax.jit, static_argnames=("config", "N", "n_ids"), donate_argnames="rows")
def decode(
    config: ModelConfig, params: model.Params, rows: Rows, n: jax.Array, N: int, n_ids: int
) -> tuple[Rows, Drawn]:
    """`n` more tokens, up to CHUNK, for the first N rows: (CHUNK, N), of which the first n are real."""
    key, how = rows.key[:N], jax.tree.map(lambda x: x[:N], rows.how)
    start = jax.tree.map(lambda x: x[:N], (rows.cache, rows.token, rows.step))

    def one(cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache]:
        logits, cache = model.extend(config, params, cache, token[None, None])
        return logits[0], cache

    def body(i: jax.Array, carry: Any) -> Any:
        (cache, token, step), written = carry
        logits, cache = jax.vmap(one)(cache, token)
        drawn = _draw(n_ids, logits, jax.vmap(jax.random.fold_in)(key, step), how)
        written = jax.tree.map(lambda to, x: lax.dynamic_update_index_in_dim(to, x, i, 0), written, drawn)
        return (cache, drawn.token, step + 1), written

    K = min(LIKELY, n_ids)
    blank = Drawn(
        jnp.zeros((CHUNK, N), jnp.int32),
        jnp.zeros((CHUNK, N)),
        jnp.zeros((CHUNK, N, K), jnp.int32),
        jnp.zeros((CHUNK, N, K)),
    )
    (cache, token, step), written = lax.fori_loop(0, n, body, (start, blank))
    if len(rows.token) > N:
        cache, token, step = jax.tree.map(
            lambda old, x: old.at[:N].set(x), (rows.cache, rows.token, rows.step), (cache, token, step)
        )
    return Rows(cache, token, step, rows.key, rows.how), written


@partial(jax.jit, static_argnames=("config", "n_ids"))
def look(config: ModelConfig, params: model.Params, idx: jax.Array, length: jax.Array, n_ids: int) -> tuple[Any, ...]:
    """What the last of `length` tokens, idx (1, T), attends to, (L, H, T), and the likely tokens after it, (K,), with
    their probabilities (K,). A bigram attends to nothing: (0, 0, T)."""
    logits, _ = model.extend(config, params, init_cache(config, 1, idx.shape[1]), idx, length)
    chances, likely = lax.top_k(jax.nn.softmax(logits[0, :n_ids]), min(LIKELY, n_ids))
    if config.kind == "bigram":
        return jnp.zeros((0, 0, idx.shape[1])), likely, chances
    maps = inside.attention_maps(config, params, idx)
    # Layer by layer, which XLA does before it puts them together: of deep models it then holds two at once.
    rows = [lax.dynamic_index_in_dim(maps[i, 0], length - 1, 1, keepdims=False) for i in range(config.n_layer)]
    return jnp.stack(rows), likely, chances


def padded(texts: list[list[int]], T: int, N: int) -> dict[str, Any]:
    """The `idx` and `length` of up to N texts of up to T ids for `read`, with zeros where there are none."""
    idx, length = np.zeros((N, T), np.int32), np.ones(N, np.int32)
    for i, ids in enumerate(texts):
        idx[i, : len(ids)], length[i] = ids, len(ids)
    return {"idx": idx, "length": length}


def _draw(n_ids: int, logits: jax.Array, keys: jax.Array, how: Settings) -> Drawn:
    """The next token of each row from its logits (N, V) and its key (N,): `sample.next_tokens`, with settings (N,)."""
    logits = logits[:, :n_ids]
    likely_chances, likely = lax.top_k(jax.nn.softmax(logits), min(LIKELY, n_ids))
    t, k, top_p, min_p = (x[:, None] for x in how)
    kept = logits / jnp.where(t == 0, 1, t)

    def cut(kept: jax.Array) -> jax.Array:
        ordered = jnp.sort(kept, descending=True)
        smallest = jnp.take_along_axis(ordered, jnp.clip(k - 1, 0, n_ids - 1), axis=1)
        kept = jnp.where((k > 0) & (kept < smallest), -jnp.inf, kept)
        return jnp.where(top_p < 1, sample.top_p(kept, top_p), kept)

    # Sorting a large vocabulary takes its time: only where some row asks for it.
    kept = lax.cond(jnp.any((k > 0) | (top_p < 1)), cut, lambda kept: kept, kept)
    kept = sample.min_p(kept, min_p)
    sampled = jax.vmap(jax.random.categorical)(keys, kept)
    token = jnp.where(how.temperature == 0, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)
    chance = jnp.take_along_axis(jax.nn.softmax(logits), token[:, None], axis=1)[:, 0]
    return Drawn(token, chance, likely, likely_chances)
