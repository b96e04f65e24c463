"""(seed, step) to batches: which windows of the corpus step n trains on, as pure functions.

Nothing here has state. The window starts are exact 64-bit integers drawn from Philox, a counter-based generator:
key and counter are (seed, purpose, step or epoch), so any step's batch can be computed alone, in any process, on any
machine, and a resumed run sees the batches that an unbroken one would have seen.
"""

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = TypeVar("Array", bound=Any)
Ids = NDArray[np.integer[Any]]
Starts = NDArray[np.int64]

# What a stream of random numbers is for; part of the key, so that no stream can touch another.
RANDOM, OFFSET, PERMUTATION, ESTIMATE = range(4)


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
    if n_tokens < T + 1:
        raise ValueError(f"{n_tokens} tokens hold no window of {T} inputs and a target")
    if sampling == "random":
        return np.stack([_raw(seed, RANDOM, step, B) % (n_tokens - T) for step in range(begin, end)])
    if sampling != "epoch":
        raise ValueError(f"sampling is {sampling!r}, expected 'epoch' or 'random'")
    n = n_windows(n_tokens, T)
    epochs, positions = np.divmod(np.arange(begin * B, end * B), n)
    starts = np.empty_like(positions)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        offset = _raw(seed, OFFSET, int(epoch), 1) % (n_tokens - n * T)
        starts[mine] = offset + T * permute(positions[mine], n, seed, int(epoch))
    return starts.reshape(end - begin, B)


def estimate_starts(seed: int, step: int, n_tokens: int, T: int, n: int) -> Starts:
    """Uniform window starts for a noisy estimate at `step`, (n,): a stream apart, so that looking changes nothing."""
    return _raw(seed, ESTIMATE, step, n) % (n_tokens - T)


def n_windows(n_tokens: int, T: int) -> int:
    """Windows in an epoch: one fewer than fit, so that the offset has at least T values to choose from."""
    return max(1, n_tokens // T - 1)


def permute(index: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The image of each index under a keyed permutation of range(n), without a table of n entries.

    A four-round Feistel network on the smallest even number of bits that holds n, walked until the image is below n
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Shapes: (any,) to (any,).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _raw(seed, PERMUTATION, epoch, 4).astype(np.uint64)

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
    windows = tokens[_places(starts, T)].astype(np.int32)
    return Batch(windows[..., :-1], windows[..., 1:])


def pack(tokens: Ids, starts: Starts, T: int) -> tuple[Ids, Starts]:
    """A corpus of just the windows at `starts` (any shape), and their starts in it.

    `take` finds the same windows in it as in the whole: so a corpus too large for the device is served by the same
    compiled step, a few windows at a time.
    """
    windows = np.ascontiguousarray(tokens[_places(starts, T)])
    return windows.reshape(-1), np.arange(starts.size, dtype=np.int64).reshape(starts.shape) * (T + 1)


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
