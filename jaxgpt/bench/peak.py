"""What a device can do at most: from a data sheet, or measured by large products of matrices."""

from collections.abc import Callable
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.ruler import Contest
from jaxgpt.monitor import chips

N = 2048
"""Rows and columns of the matrices: 2 N³ operations, and none of them fits into a cache."""
STREAMED = 2**26
"""Numbers in the array that measures how fast memory is: 256 MB, more than most caches."""


def measure(device: str, tell: Callable[[str], None] = ruler.to_stderr, patience: int = 0) -> dict[str, float]:
    """Operations per second of large products: each library and precision to the best of three short rounds."""
    with Contest(device, tell) as contest:
        for dtype in ("float32", "bfloat16"):
            contest.enter(f"jax {dtype} products", {"task": "product-jax", "n": N, "dtype": dtype})
            spec = {"task": "product-torch", "n": N, "dtype": dtype, "device": device}
            contest.enter(f"torch {dtype} products", spec)
        return {name: max(rates) for name, rates in contest.measure(3, 0.5, patience=patience).items()}


def of(device: str, about: dict[str, Any], found: dict[str, float] | None) -> tuple[float | None, str]:
    """(operations per second or None, where the figure comes from) of the device that the contestants are on."""
    if found:
        name = max(found, key=found.__getitem__)
        return found[name], f"{found[name] / 1e9:,.0f} GFLOP/s, measured here: {name} of {N} x {N}, the fastest of all"
    kinds = sorted({each["device"] for each in about.values()})
    known = {chip.flops: chip for chip in map(chips.of_kind, kinds) if chip}
    if len(known) != 1:
        return None, f"not known for {' or '.join(kinds)}"
    (chip,) = known.values()
    return chip.flops, f"{chip.flops / 1e12:,.0f} TFLOP/s of {kinds[0]}, dense bfloat16 by {chip.source}"


def here(dtype: str, n: int = N, streamed: int = STREAMED, seconds: float = 0.4) -> tuple[float, float]:
    """(operations per second of large products of `dtype`, bytes per second from memory and back) of JAX on its first
    device, measured in this process: each the best of three rounds in turn."""
    from jaxgpt.bench import ours, worker

    contestants = ours.Product(n, dtype), ours.Stream(streamed)
    found = [[worker.work(each, seconds) for each in contestants] for _ in range(3)]
    flops, moved = (max(done["units"] / done["seconds"] for done in rounds) for rounds in zip(*found, strict=True))
    return flops, moved
