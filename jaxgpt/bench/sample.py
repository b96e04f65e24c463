"""Sampling speed: tokens per second of jaxgpt, of the twin, which has no cache, and of transformers, which has one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.facts import WHAT_PRECISIONS_MEAN, facts
from jaxgpt.bench.ruler import Contest, Rates
from jaxgpt.bench.shapes import ABOUT, PRECISIONS, config_of
from jaxgpt.bench.table import Report
from jaxgpt.config import UsageError, to_tree

CASES = {
    "cpu": ("tiny:1:512", "tiny:64:512", "baby:1:512", "baby:64:64"),
    "gpu": ("tiny:1:512", "tiny:64:512", "baby:1:512", "baby:64:512"),
}
"""SHAPE:BATCH:TOKENS. Without a cache baby:64:512 takes a quarter of an hour on two cores."""

DRAW = {"temperature": 0.8, "top_k": 40}
"""The same on every side; 40 is below the vocabulary, so that everyone has to find the largest."""

NOTES = (
    "A token is a character of these models. Random weights, a prompt of one token, temperature 0.8, top-k 40.",
    "jaxgpt: `generate`, the prompt read at once, then a compiled loop with a cache; its first call compiles and "
    "counts apart; beyond block_size the last half of it is read again. "
    "torch: nanoGPT's generate in the project's twin, the whole window through the model for each token (nanoGPT has "
    "no cache), under inference_mode. transformers: GPT2LMHeadModel.generate with its cache; bfloat16 is a cast of the "
    "weights.",
    "GPT-2 in transformers cannot go beyond its n_positions, while jaxgpt and nanoGPT go on: so "
    "transformers is compared in rows of its own, in which everyone stops at block_size - 1 new tokens.",
    "Rates are of rounds in turn, median (least to greatest), ratios round by round; above 1 jaxgpt is faster.",
    *WHAT_PRECISIONS_MEAN,
)


def measure(
    device: str = "cpu",
    cases: Sequence[str] | None = None,
    rounds: int = 3,
    seconds: float = 2.0,
    ways: Sequence[str] = ("float32", "bfloat16"),
    until: float = float("inf"),
    patience: int = 0,
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on `cases`; in each round a contestant generates once, and again until `seconds` have gone by."""
    report: Report = {"mode": "sample", "facts": facts(device), "failed": {}, "cases": {}}
    ratios: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    asked = [parse(case) for case in cases or CASES[device]]
    report["notes"] = [f"{shape}: {ABOUT[shape]}" for shape in dict.fromkeys(shape for shape, _, _ in asked)]
    report["notes"] += NOTES
    for shape, batch_size, n_tokens in asked:
        if time.monotonic() > until:
            report["failed"][f"{shape}, batch {batch_size}"] = ruler.TOO_LATE
            continue
        within = config_of(shape, device).model.block_size - 1
        for n, library in ((n_tokens, "torch"), (min(n_tokens, within), "transformers")):
            case = f"{shape}, batch {batch_size}, {n} tokens" + (" within block_size" if library != "torch" else "")
            with Contest(device, lambda line, case=case: tell(f"{case}: {line}")) as contest:  # type: ignore[misc]
                for name, spec in contestants(shape, device, batch_size, n, library, ways):
                    contest.enter(name, spec)
                rates = contest.measure(rounds, seconds, until, patience)
            about = {name: worker.about for name, worker in contest.workers.items()}
            report["facts"]["device"] = contest.device_name
            ratios += ratio_rows(case, rates, library)
            rows += [
                {
                    "case": case,
                    "variant": name,
                    "tokens/s": ruler.series(found),
                    "first call, s": about[name]["first_seconds"] if name.startswith("jaxgpt") else None,
                    "peak memory, MB": contest.peak_bytes[name] / 1e6,
                }
                for name, found in rates.items()
            ]
            report["cases"][case] = {"rates": rates, "about": about}
            report["notes"].append(f"{case}: {contest.quiet()}")
            report["failed"] |= {f"{case}, {name}": why for name, why in contest.failed.items()}
    report["tables"] = [
        {"title": "Tokens per second, jaxgpt / others", "rows": ratios},
        {"title": "Each", "rows": rows},
    ]
    return report


def parse(case: str) -> tuple[str, int, int]:
    """SHAPE:BATCH:TOKENS, or SHAPE:BATCH for 512 tokens.

    Raises:
      UsageError: it is not that.
    """
    shape, *numbers = case.split(":")
    if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UsageError(f"case {case!r}, expected SHAPE:BATCH:TOKENS such as tiny:64:512")
    batch_size, n_tokens = [*map(int, numbers), 512][:2]
    config_of(shape, "cpu")
    return shape, batch_size, n_tokens


def contestants(
    shape: str, device: str, batch_size: int, n_tokens: int, library: str, ways: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """(name, worker's spec): ours in each precision, then `library` (torch or transformers) in each way."""
    config = config_of(shape, device)
    common: dict[str, Any] = {"batch_size": batch_size, "n_tokens": n_tokens, **DRAW}
    ours = []
    for precision in PRECISIONS:
        tree = to_tree(replace(config, model=config_of(shape, device, precision).model))
        ours.append((f"jaxgpt {precision}", {"task": "sample-jaxgpt", "config": tree, **common}))
    theirs = {"task": f"sample-{library}", "config": to_tree(config), "device": device, **common}
    return ours + [(f"{library} {way}", {**theirs, "way": way}) for way in ways]


def ratio_rows(case: str, rates: Rates, library: str) -> list[dict[str, Any]]:
    """Each of ours against the fastest of `library`'s."""
    other = ruler.best(rates, [name for name in rates if name.startswith(library)])
    return [
        {"case": case, "variant": name, "ratio": ruler.ratio(rates[name], rates[other]), "against": other}
        for name in rates
        if name.startswith("jaxgpt") and other
    ]
