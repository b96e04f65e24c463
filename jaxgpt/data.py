"""(seed, step) -> window starts -> batches, and the loaders that put them on the device.

The window starts of a step are a pure function of (seed, step): exact 64-bit integers from Philox, a counter-based
generator with key (seed, purpose) and counter (step or epoch). So any process can compute the batch of any step, and a
resumed run trains on the same batches as an uninterrupted one.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from fractions import Fraction
from functools import cache, partial
from itertools import accumulate, islice
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import Config
from jaxgpt.tokenizer import Ids

if TYPE_CHECKING:
    from jax.sharding import Mesh

Array = TypeVar("Array", bound=Any)
Starts = NDArray[np.int64]
Loader = Callable[[int, int], tuple[Any, Any]]
"""(begin, end) -> (tokens, windows) of steps begin to end - 1, the arguments of `train_steps`."""

# Purposes of random numbers: part of the key, so that their streams are independent.
RANDOM, OFFSET, PERMUTATION, ESTIMATE, MIXTURE = range(5)
STREAMS = {"random": RANDOM, "estimate": ESTIMATE}
MIX = 1000
"""A mixture assigns windows in blocks of MIX: each part gets its share of every block, to within one window."""
DEVICE_TOKENS = 2**28
"""Largest corpus kept on the device. Windows of a larger one are read from disk, chunk by chunk."""


class Part(NamedTuple):
    """A part of a mixture of corpora."""

    n_tokens: int
    share: float  # of the windows, in any unit


class Batch(NamedTuple):
    """What one step trains on: `targets` are `inputs` shifted by one token."""

    inputs: Any  # (B, T) int32
    targets: Any  # (B, T) int32


def window_starts(seed: int, step: int, n_tokens: int, T: int, B: int, sampling: str = "epoch") -> Starts:
    """First token of each window of one step, (B,); arguments as in `chunk_starts`."""
    return chunk_starts(seed, int(step), int(step) + 1, n_tokens, T, B, sampling)[0]


def chunk_starts(
    seed: int, begin: int, end: int, parts: int | Sequence[Part], T: int, B: int, sampling: str = "epoch"
) -> Starts:
    """First token of each window of steps `begin` to `end` - 1, (end - begin, B). A window is T inputs and the token
    after them.

    Each block of MIX windows is assigned to the parts of a mixture in a keyed order. With sampling "epoch",
    the j-th window of a part is window j of a run on that part alone.

    Args:
      parts: the parts of a mixture, in the order of their tokens; or the number of tokens of a plain corpus.
      sampling: "epoch": every window once per epoch, in a keyed order. Each epoch cuts the tokens into
        n_windows(n_tokens, T) disjoint windows at its own offset, so that boundaries move between epochs.
        "random": each start uniform over all n_tokens - T, with replacement, as in nanoGPT; "estimate": another stream.

    Raises:
      ValueError: a part has fewer than T + 1 tokens, T is below 1, another number is negative, or sampling is unknown.
    """
    begin, end, T, B = int(begin), int(end), int(T), int(B)  # an array of 32 bits would overflow
    parts = parts if isinstance(parts, Sequence) else [Part(int(parts), 1.0)]
    for n_tokens, _ in parts:
        _require_window(n_tokens, T)
    if min(seed, begin, B) < 0:
        raise ValueError(f"seed is {seed}, the step {begin} and B {B}, expected no negative number")
    if sampling not in ("epoch", *STREAMS):
        raise ValueError(f"sampling is {sampling!r}, expected 'epoch' or 'random'")
    windows = np.arange(begin * B, end * B)
    part, index = _parts_of(seed, windows, [share for _, share in parts])
    starts, first = np.empty_like(windows), 0
    raw = None
    if sampling != "epoch":
        raw = np.concatenate([_raw(seed, STREAMS[sampling], step, B) for step in range(begin, end)])
    for i, (n_tokens, _) in enumerate(parts):
        mine = part == i
        within = _epoch_starts(seed, index[mine], n_tokens, T) if raw is None else raw[mine] % (n_tokens - T)
        starts[mine] = first + within
        first += n_tokens
    return starts.reshape(end - begin, B)


def config_starts(config: Config, parts: int | Sequence[Part], begin: int, end: int) -> Starts:
    """`chunk_starts` with the settings of a run."""
    train = config.train
    return chunk_starts(train.seed, begin, end, parts, config.model.block_size, train.batch_size, train.sampling)


def _require_window(n_tokens: int, T: int) -> None:
    if not 1 <= T < n_tokens:
        raise ValueError(f"{n_tokens} tokens hold no window of {T} inputs and a target")


def _parts_of(seed: int, windows: Starts, shares: Sequence[float]) -> tuple[Starts, Starts]:
    """The part of each window (n,), and the window's index within that part (n,)."""
    if len(shares) == 1:
        return np.zeros_like(windows), windows
    # Differences of rounded cumulative shares add up to MIX. Fractions of the decimals as written round a half up, so
    # that a share of 0.001 is one window.
    weights = [Fraction(str(share)) for share in shares]
    ends = np.array([int(MIX * total / sum(weights) + Fraction(1, 2)) for total in accumulate(weights)])
    part, index = np.empty_like(windows), np.empty_like(windows)
    blocks, positions = np.divmod(windows, MIX)
    for block in np.unique(blocks):
        order = np.searchsorted(ends, permute(np.arange(MIX), MIX, seed, int(block), MIXTURE), side="right")
        in_block = blocks == block
        part[in_block] = order[positions[in_block]]
        for i, count in enumerate(np.diff(ends, prepend=0)):
            earlier = np.cumsum(order == i) - (order == i)
            mine = in_block & (part == i)
            index[mine] = block * count + earlier[positions[mine]]
    return part, index


def _epoch_starts(seed: int, index: Starts, n_tokens: int, T: int) -> Starts:
    """The starts (n,) of the windows `index` (n,), which count through all epochs."""
    n = n_windows(n_tokens, T)
    epochs, positions = np.divmod(index, n)
    starts = np.empty_like(positions)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        offset = _raw(seed, OFFSET, int(epoch), 1) % (n_tokens - n * T)
        starts[mine] = offset + T * permute(positions[mine], n, seed, int(epoch))
    return starts


def evaluation_windows(N: int, T: int) -> tuple[Starts, Starts]:
    """(starts, skip) of windows that cover N tokens, both (n_windows,). The last window overlaps the one before it by
    its first `skip` predictions; the others have skip 0.

    Raises:
      ValueError: fewer than T + 1 tokens.
    """
    _require_window(N, T)
    starts = np.arange(0, N - 1, T)
    skip = np.maximum(starts - (N - 1 - T), 0)
    return starts - skip, skip


def n_windows(n_tokens: int, T: int) -> int:
    """Windows in an epoch: one fewer than fit, so that the offset has at least T possible values."""
    return max(1, int(n_tokens // T) - 1)


def permute(index: Starts, n: int, seed: int, epoch: int, purpose: int = PERMUTATION) -> Starts:
    """A keyed permutation of range(n), evaluated at each index, (any,) -> (any,), without a table of n entries.

    A four-round Feistel network on the smallest even number of bits that holds n, applied until the image is below n
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    For n from 5 to 12, four rounds are too few to be uniform: over many keys, how often an index has an image, or two
    indices are neighbours, differs from the mean by up to a third (standard deviations: 4 to 8%, 8 to 15%). More rounds
    would change the batches of existing runs.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _raw(seed, purpose, epoch, 4).astype(np.uint64)

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << np.uint64(half)) | right

    image = network(index.astype(np.uint64))
    while (outside := image >= n).any():
        image[outside] = network(image[outside])
    return image.astype(np.int64)


def take(tokens: Any, starts: Any, T: int) -> Batch:
    """The windows of `tokens` (N,) at `starts` (B,), as inputs and targets (B, T) int32.

    `tokens` may be a memory map, or a device array inside or outside `jit`.
    """
    return inputs_and_targets(gather(tokens, starts, T))


def inputs_and_targets(windows: Any) -> Batch:
    """Windows (..., T + 1) of ids -> inputs and targets, (..., T) int32."""
    windows = windows.astype(np.int32)
    return Batch(windows[..., :-1], windows[..., 1:])


def gather(tokens: Array, starts: Any, T: int) -> Array:
    """The windows of `tokens` (N,) at `starts` (...): (..., T + 1) ids, in the dtype of `tokens`."""
    return tokens[starts[..., None] + np.arange(T + 1).reshape((1,) * starts.ndim + (-1,))]


def chunks(config: Config, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of each scan from `step` on. Scans end at multiples of scan_steps and after the last step."""
    K = config.train.scan_steps
    while step < config.train.steps:
        end = min((step // K + 1) * K, config.train.steps)
        yield step, end
        step = end


def loader(
    config: Config, tokens: Ids, mesh: "Mesh", parts: Sequence[Part] | None = None, pool: Executor | None = None
) -> Loader:
    """Serve the training tokens: from the device, or from disk if there are more than DEVICE_TOKENS.

    From disk, each process reads the windows of its own devices only. The loader is thread-safe: threads that ask for
    the same chunk share one read.

    Args:
      parts: the parts of a mixture; None for a plain corpus.
      pool: reads the next chunk from disk while the device computes; None: no reading ahead.
    """
    import jax

    from jaxgpt.sharding import replicated, window_sharding

    lock, pending, T = Lock(), dict[tuple[int, int], Future[Any]](), config.model.block_size
    starts_of = partial(config_starts, config, parts or len(tokens))

    def put(x: NDArray[Any]) -> Any:
        return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])

    def read(begin: int, end: int) -> tuple[None, Any]:
        starts = starts_of(begin, end)

        @cache  # devices along `tensor` and `context` have the same windows
        def sequences(first: int | None, last: int | None) -> Ids:
            return gather(tokens, starts[:, first:last], T)

        def shard(index: Any) -> Ids:
            return sequences(index[1].start, index[1].stop)

        return None, jax.make_array_from_callback((*starts.shape, T + 1), window_sharding(mesh), shard)

    def read_ahead(pool: Executor, begin: int, end: int) -> Any:
        with lock:  # two threads ask for a new run's first chunk: one to compile the step, one to train
            wanted = [(begin, end), *islice(chunks(config, end), 1)]
            kept = {chunk: pending.get(chunk) or pool.submit(read, *chunk) for chunk in wanted}
            pending.clear()
            pending.update(kept)
        return kept[begin, end].result()

    if len(tokens) > DEVICE_TOKENS:
        return partial(read_ahead, pool) if pool else read
    on_device = put(np.asarray(tokens))
    return lambda begin, end: (on_device, put(starts_of(begin, end).astype(np.int32)))


def _raw(seed: int, purpose: int, counter: int, n: int) -> NDArray[np.int64]:
    """`n` uniform integers below 2**63; modulo m they are uniform to within m / 2**63."""
    generator = np.random.Philox(key=[seed, purpose], counter=[0, counter, 0, 0])
    return (generator.random_raw(n) >> np.uint64(1)).astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective 64-bit hash: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
