"""The ladder: train each model, compute its loss on the whole validation split, sample from it, and show it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import prng
from jaxgpt.data import chunk_starts, evaluation_windows, take
from jaxgpt.display.baselines import ngram_losses
from jaxgpt.display.charts import Spec, dots
from jaxgpt.display.text import fixed, visible
from jaxgpt.evaluation import loss_sums, map_batches
from jaxgpt.lecture.model import Params, Rung, forward, init_params
from jaxgpt.loss import cross_entropy, token_losses
from jaxgpt.tokenizer import Ids, Tokenizer

_RESIDUAL = Rung(
    "residual", "three blocks with residual connections", (2.08,), n_layer=3, n_head=4, feed_forward=4, residual=True,
)  # fmt: skip

RUNGS = (
    Rung("uniform", "every character equally likely: ln V", kind="counted"),
    Rung("unigram", "how often each character occurs", kind="counted"),
    Rung("bigram counts", "how often each pair occurs", kind="counted"),
    Rung("bigram", "a (V, V) table, trained", (2.5,), kind="bigram", learning_rate=1e-2, steps=3000),
    Rung("one head", "self-attention, 32 channels", (2.4,)),
    Rung("four heads", "of 8 channels each", (2.28,), n_head=4),
    Rung("feed-forward", "each position computes on its own", (2.24, 2.27), n_head=4, feed_forward=1),
    _RESIDUAL,
    replace(_RESIDUAL, name="layer norm", about="before each layer, and at the end", lecture=(2.06,), layer_norm=True),
    replace(
        _RESIDUAL, name="dropout and scale", about="4 layers, 128 channels, context 64", lecture=(1.48,),
        lecture_size="6 layers, 384 channels, context 256", layer_norm=True, n_layer=4, channels=128, block_size=64,
        dropout=0.05, batch_size=16, learning_rate=2e-3, steps=1500,
    ),
)  # fmt: skip

FULL = replace(
    RUNGS[-1], about="6 layers, 384 channels, context 256", lecture_size="", n_layer=6, n_head=6, channels=384,
    block_size=256, batch_size=64, learning_rate=3e-4, steps=5000, dropout=0.2,
)  # fmt: skip
"""The last rung at the lecture's own size: for a GPU."""
KINDS = ["here", "in the lecture", "in the lecture, at a larger size"]


@dataclass(frozen=True)
class Result:
    rung: Rung
    loss: float  # nats per character over the whole validation split
    n_params: int
    seconds: float
    sample: str  # empty if it was counted


def climb(
    rungs: Iterable[Rung], train: Ids, val: Ids, tokenizer: Tokenizer, seed: int = 1337, sample: int = 100
) -> Iterator[Result]:
    """Train and score each rung in turn, and sample `sample` characters; those with counts in place of parameters are
    only scored. `train` and `val` are ids (N,)."""
    V = tokenizer.vocab_size
    uniform, unigram, bigram = ngram_losses(train, val, V).values()
    counted = {"uniform": (uniform, V), "unigram": (unigram, V), "bigram counts": (bigram, V * V)}
    for rung in rungs:
        began, text = time.perf_counter(), ""
        if rung.kind == "counted":
            loss, n_params = counted[rung.name]
        else:
            params = learn(rung, train, V, seed)
            loss, n_params = score(rung, params, val), sum(leaf.size for leaf in jax.tree.leaves(params))
            text = tokenizer.decode(write(rung, params, sample, seed))
        yield Result(rung, loss, n_params, time.perf_counter() - began, text)


def learn(rung: Rung, train: Ids, V: int, seed: int) -> Params:
    """The rung's parameters, trained with AdamW at a constant learning rate, as in the lecture."""
    init_key, dropout_key = jax.random.split(prng.key(seed))
    params = init_params(rung, V, init_key)
    state = params, _adamw(rung).init(params)
    tokens = jnp.asarray(np.asarray(train))
    K = 500
    for begin in range(0, rung.steps, K):
        end = min(begin + K, rung.steps)
        starts = chunk_starts(seed, begin, end, len(train), rung.block_size, rung.batch_size, "random")
        state = _train(rung, state, tokens, jnp.asarray(starts, jnp.int32), jax.random.fold_in(dropout_key, begin))
    return state[0]


def _adamw(rung: Rung) -> optax.GradientTransformation:
    return optax.adamw(rung.learning_rate, weight_decay=0.01)  # PyTorch's default decay


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _train(rung: Rung, state: Any, tokens: jax.Array, starts: jax.Array, key: jax.Array) -> Any:
    """K steps, on the windows that begin at `starts` (K, B)."""

    def step(state: Any, item: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (params, opt_state), (starts, key) = state, item
        batch = take(tokens, starts, rung.block_size)
        grads = jax.grad(lambda p: cross_entropy(forward(rung, p, batch.inputs, key), batch.targets))(params)
        updates, opt_state = _adamw(rung).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, state, (starts, jax.random.split(key, len(starts))))[0]


def score(rung: Rung, params: Params, val: Ids, B: int = 256) -> float:
    """Mean loss over the whole of `val`, in the windows of `evaluation.evaluate`, B at a time."""
    starts, skip = evaluation_windows(len(val), rung.block_size)
    sums = loss_sums(partial(_loss_sums, rung, params), val, rung.block_size, starts, skip, B)
    return float(sums.sum() / (len(val) - 1))


@partial(jax.jit, static_argnums=0)
def _loss_sums(rung: Rung, params: Params, windows: jax.Array, skip: jax.Array) -> jax.Array:
    return map_batches(lambda idx, targets: token_losses(forward(rung, params, idx), targets), windows, skip)


def write(rung: Rung, params: Params, n: int, seed: int) -> list[int]:
    """Sample `n` ids one by one, after id 0 as in the lecture, each given the last block_size ids."""
    ids, T = [0], rung.block_size
    for key in jax.random.split(prng.key(seed), n):
        context = ids[-T:]
        window = jnp.array(context + [0] * (T - len(context)))  # padded, so that one program serves
        ids.append(int(_draw(rung, params, window, len(context) - 1, key)))
    return ids[1:]


@partial(jax.jit, static_argnums=0)
def _draw(rung: Rung, params: Params, window: jax.Array, last: int, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, forward(rung, params, window[None])[0, last])


def line(result: Result) -> str:
    """A rung on one line, and its figures, the lecture's loss and the beginning of its sample on another."""
    rung, figures = result.rung, f"{result.n_params:,} parameters, {result.seconds:.1f}s"
    published = " to ".join(f"{figure:g}" for figure in rung.lecture)
    published += f" at {rung.lecture_size}" if rung.lecture_size else ""
    theirs = f" (lecture: {published})" if published else ""
    sample = f": {visible(result.sample)[:40]}" if result.sample else ""
    return f"{rung.name}: {rung.about}\n  loss {fixed(result.loss)}{theirs}, {figures}{sample}"


def chart(results: Sequence[Result]) -> Spec:
    """The loss of each rung beside the lecture's."""
    rows = []
    for result in results:
        rows.append({"what": result.rung.name, "loss": result.loss, "kind": KINDS[0]})
        kind = KINDS[2 if result.rung.lecture_size else 1]
        rows += [{"what": result.rung.name, "loss": figure, "kind": kind} for figure in result.rung.lecture]
    return dots(rows, KINDS, "loss on the validation split, nats per character")
