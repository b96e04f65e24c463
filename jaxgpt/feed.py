"""What serves the training tokens: the windows of each scan of steps, from the device or read ahead from disk."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache
from itertools import islice
from threading import Lock
from typing import Any

import jax
import numpy as np

from jaxgpt import data as batches
from jaxgpt.config import Config
from jaxgpt.data import Ids, Part, Starts
from jaxgpt.placement import ONE_DEVICE, Placement

DEVICE_TOKENS = 2**28
"""A corpus up to this size lives on the device; a larger one is gathered from disk, a chunk at a time."""
Feed = Callable[[int, int], tuple[jax.Array | None, jax.Array]]
"""The steps begin..end to the (tokens, windows) that `train_steps` takes."""


def window_starts(config: Config, parts: Sequence[Part], step: int) -> Starts:
    """The starts (B,) of the windows that `step` (0-based) trains on."""
    return chunk_starts(config, parts, step, step + 1)[0]


def chunk_starts(config: Config, parts: Sequence[Part], begin: int, end: int) -> Starts:
    """The starts (end - begin, B) of the windows of some steps, in the parts of the training tokens in a row."""
    train = config.train
    return batches.mixed_starts(
        train.seed, begin, end, parts, config.model.block_size, train.batch_size, train.sampling
    )


def chunks(config: Config, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of each scan from `step` on; ends are multiples of scan_steps, and the last step."""
    K = config.train.scan_steps
    while step < config.train.steps:
        end = min((step // K + 1) * K, config.train.steps)
        yield step, end
        step = end


def device_tokens(config: Config, n_tokens: int) -> int:
    """How many tokens lie on the device: the corpus, or the windows of a chunk of a larger one."""
    windows = config.train.scan_steps * config.train.batch_size * (config.model.block_size + 1)
    return n_tokens if n_tokens <= DEVICE_TOKENS else windows


def feeder(
    config: Config,
    tokens: Ids,
    placement: Placement = ONE_DEVICE,
    parts: Sequence[Part] | None = None,
    pool: Executor | None = None,
) -> Feed:
    """What serves the training tokens: from the device, or, where they are too many, from disk.

    Args:
      parts: of the tokens, with their weights; by default they are one.
      pool: reads from disk a chunk ahead; by default nothing is read ahead.
    """
    parts = parts or [Part(len(tokens), 1.0)]
    if len(tokens) > DEVICE_TOKENS:
        return reader(config, tokens, placement, parts, pool)

    def put(x: np.ndarray[Any, Any]) -> jax.Array:
        """The whole of `x`, which every process has, on every device."""
        if jax.process_count() == 1:
            return jax.device_put(x, placement.everywhere)
        return jax.make_array_from_callback(x.shape, placement.everywhere, lambda index: x[index])

    on_device = put(np.asarray(tokens))
    return lambda begin, end: (on_device, put(chunk_starts(config, parts, begin, end).astype(np.int32)))


def reader(config: Config, tokens: Ids, placement: Placement, parts: Sequence[Part], pool: Executor | None) -> Feed:
    """Reads the windows of the next chunk in `pool` while the device is busy with this one; a process reads those of
    its own devices alone. Several threads may call it: a chunk that is asked for again is not read again."""
    lock, held = Lock(), dict[tuple[int, int], Future[jax.Array]]()
    T = config.model.block_size

    def read(begin: int, end: int) -> jax.Array:
        starts = chunk_starts(config, parts, begin, end)

        @lru_cache  # devices that split other things than the batch have the same windows
        def rows(first: int | None, last: int | None) -> Ids:
            return batches.gather(tokens, starts[:, first:last], T)

        shape = (*starts.shape, T + 1)

        def mine(at: Any) -> Ids:
            return rows(at[1].start, at[1].stop)

        return jax.make_array_from_callback(shape, placement.windows, mine)

    def feed(begin: int, end: int) -> tuple[None, jax.Array]:
        if not pool:
            return None, read(begin, end)
        with lock:  # a new run's first chunk is asked for by who compiles for it, and by who trains on it
            wanted = [(begin, end), *islice(chunks(config, end), 1)]
            kept = {chunk: held.get(chunk) or pool.submit(read, *chunk) for chunk in wanted}
            held.clear()
            held.update(kept)
        return None, kept[begin, end].result()

    return feed
