"""(seed, step) to batches: which windows of the corpus step n trains on, as pure functions.

Nothing here has state. The window starts are exact 64-bit integers drawn from Philox, a counter-based generator:
key and counter are (seed, purpose, step or epoch), so any step's batch can be computed alone, in any process, on any
machine, and a resumed run sees the batches that an unbroken one would have seen.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = TypeVar("Array", bound=Any)
Ids = NDArray[np.integer[Any]]
Starts = NDArray[np.int64]

# What a stream of random numbers is for; part of the key, so that no stream can touch another.
RANDOM, OFFSET, PERMUTATION, ESTIMATE, MIXTURE = range(5)
MIX = 1000
"""Of so many windows in a row each part of a mixture has its share."""


class Part(NamedTuple):
    """A part of a mixture."""

    n_tokens: int
    share: float
    """Of the windows, in any unit."""


class Batch(NamedTuple):
    """What one step learns from: `targets` is `inputs` one token later."""

    inputs: Any  # (B, T) int32
    targets: Any  # (B, T) int32


def window_starts(seed: int, step: int, n_tokens: int, T: int, B: int, sampling: str = "epoch") -> Starts:
    """First token of each window of step `step`, (B,); a window is T inputs and the token after them.

    "epoch": every window once per epoch, in a keyed order; an epoch cuts the tokens into n_windows(n_tokens, T)
    windows that do not overlap, at an offset of its own, so that boundaries move between epochs.
    "random": each start uniform over all n_tokens - T, with replacement, as nanoGPT.

    Raises:
      ValueError: fewer than T + 1 tokens, or an unknown sampling.
    """
    return chunk_starts(seed, step, step + 1, n_tokens, T, B, sampling)[0]


def chunk_starts(seed: int, begin: int, end: int, n_tokens: int, T: int, B: int, sampling: str = "epoch") -> Starts:
    """`window_starts` of the steps from `begin` up to `end`, (end - begin, B)."""
    return mixed_starts(seed, begin, end, [Part(n_tokens, 1.0)], T, B, sampling)


def mixed_starts(
    seed: int, begin: int, end: int, parts: Sequence[Part], T: int, B: int, sampling: str = "epoch"
) -> Starts:
    """`chunk_starts` in several parts, which lie one after another; each has its share of the windows.

    Window n of the run belongs to a part by a keyed order of every MIX windows, of which each part has its share, to
    one; and it is window j of that part, where j of the run's windows before it were, so that an epoch of a part is
    what it is alone.

    Raises:
      ValueError: a part has fewer than T + 1 tokens, or an unknown sampling.
    """
    for n_tokens, _ in parts:
        if n_tokens < T + 1:
            raise ValueError(f"{n_tokens} tokens hold no window of {T} inputs and a target")
    if sampling not in ("epoch", "random"):
        raise ValueError(f"sampling is {sampling!r}, expected 'epoch' or 'random'")
    windows = np.arange(begin * B, end * B)
    of, index = _parts_of(seed, windows, [share for _, share in parts])
    starts, first = np.empty_like(windows), 0
    raw = np.concatenate([_raw(seed, RANDOM, step, B) for step in range(begin, end)]) if sampling == "random" else None
    for i, (n_tokens, _) in enumerate(parts):
        here = of == i
        within = _epoch_starts(seed, index[here], n_tokens, T) if raw is None else raw[here] % (n_tokens - T)
        starts[here] = first + within
        first += n_tokens
    return starts.reshape(end - begin, B)


def _parts_of(
    seed: int, windows: NDArray[np.int64], shares: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The part that each window belongs to, and which of the part's windows it is. Shapes: (n,) to (n,) and (n,)."""
    if len(shares) == 1:
        return np.zeros_like(windows), windows
    # Each part has a run of places; rounding goes to the nearest, so that they add up to MIX. A half goes up, by the
    # decimals that were written: a part with the share of one place then has one.
    weights = [Fraction(str(share)) for share in shares]
    ends = np.array([int(MIX * reach / sum(weights) + Fraction(1, 2)) for reach in accumulate(weights)])
    counts = np.diff(ends, prepend=0)
    of, index = np.empty_like(windows), np.empty_like(windows)
    blocks, places = np.divmod(windows, MIX)
    for block in np.unique(blocks):
        order = np.searchsorted(ends, permute(np.arange(MIX), MIX, seed, int(block), MIXTURE), side="right")
        mine = blocks == block
        of[mine] = order[places[mine]]
        for i, count in enumerate(counts):
            earlier = np.cumsum(order == i) - (order == i)
            here = mine & (of == i)
            index[here] = block * count + earlier[places[here]]
    return of, index


def _epoch_starts(seed: int, index: NDArray[np.int64], n_tokens: int, T: int) -> NDArray[np.int64]:
    """The starts of the windows `index` (n,) of all epochs, one epoch after another."""
    n = n_windows(n_tokens, T)
    epochs, positions = np.divmod(index, n)
    starts = np.empty_like(positions)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        offset = _raw(seed, OFFSET, int(epoch), 1) % (n_tokens - n * T)
        starts[mine] = offset + T * permute(positions[mine], n, seed, int(epoch))
    return starts


def windows(N: int, T: int) -> tuple[Starts, Starts]:
    """Where windows start that cover N tokens, and how many predictions of each another has counted, (n_windows,) both.

    Raises:
      ValueError: fewer than T + 1 tokens.
    """
    if N < T + 1:
        raise ValueError(f"{N} tokens hold no window of {T} inputs and a target")
    starts = np.arange(0, N - 1, T)
    skip = np.maximum(starts - (N - 1 - T), 0)
    return starts - skip, skip


def estimate_starts(seed: int, step: int, n_tokens: int, T: int, n: int) -> Starts:
    """Uniform window starts for a noisy estimate at `step`, (n,): a stream apart, so that looking changes nothing."""
    return _raw(seed, ESTIMATE, step, n) % (n_tokens - T)


def n_windows(n_tokens: int, T: int) -> int:
    """Windows in an epoch: one fewer than fit, so that the offset has at least T values to choose from."""
    return max(1, n_tokens // T - 1)


def permute(index: NDArray[np.int64], n: int, seed: int, epoch: int, purpose: int = PERMUTATION) -> NDArray[np.int64]:
    """The image of each index under a keyed permutation of range(n), without a table of n entries.

    A four-round Feistel network on the smallest even number of bits that holds n, walked until the image is below n
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Shapes: (any,) to (any,).
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


def take(tokens: Array, starts: Any, T: int) -> Batch:
    """The windows at `starts` (B,) of `tokens` (N,), as inputs and targets (B, T) int32.

    `tokens` may be a memory map, or a device array inside or outside `jit`: the same code serves both.
    """
    return cut(tokens[_places(starts, T)])


def cut(windows: Any) -> Batch:
    """Windows (..., T + 1) of ids as inputs and targets, (..., T) int32."""
    windows = windows.astype(np.int32)
    return Batch(windows[..., :-1], windows[..., 1:])


def gather(tokens: Ids, starts: Starts, T: int) -> Ids:
    """The windows at `starts` (any shape), (..., T + 1), read from a corpus that is too large for the device."""
    return np.ascontiguousarray(tokens[_places(starts, T)])


def _places(starts: Any, T: int) -> Any:
    """The T + 1 places of each window, (..., T + 1)."""
    return starts[..., None] + np.arange(T + 1).reshape((1,) * starts.ndim + (-1,))


def _raw(seed: int, purpose: int, counter: int, n: int) -> NDArray[np.int64]:
    """`n` uniform integers below 2**63; a remainder by m is then uniform to within m / 2**63."""
    generator = np.random.Philox(
        key=np.array([seed, purpose], np.uint64), counter=np.array([0, counter, 0, 0], np.uint64)
    )
    return (generator.random_raw(n) >> np.uint64(1)).astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective scramble of 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
