"""Tokens per second of jaxgpt and of PyTorch, in turn on the same shapes: training and sampling."""

import importlib.util
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jaxgpt.config import Config, UsageError, check, replaced
from jaxgpt.monitor.chips import utilization
from jaxgpt.profile.report import Report
from jaxgpt.profile.timing import Rates, ratio, series
from scripts.benchmarks.contest import Entrants, compare
from scripts.benchmarks.machine import disturbance, facts
from scripts.benchmarks.shapes import Device, Precision, Way, config_of

WAYS: dict[str, tuple[Way, ...]] = {
    "cpu": ("float32", "float32+compile", "bfloat16", "bfloat16+compile"),
    "gpu": ("float32", "tf32", "tf32+compile", "bfloat16", "bfloat16+compile"),
}
CASES = {
    "cpu": ("tiny:1:512", "tiny:64:512", "baby:1:512", "baby:64:64"),
    "gpu": ("tiny:1:512", "tiny:64:512", "baby:1:512", "baby:64:512"),
}
"""SHAPE:BATCH:TOKENS. Without a KV cache, baby:64:512 takes a quarter of an hour on two cores."""
HOW = (
    "Rates: median (minimum to maximum) of rounds in turn, after compiling and warming up. Ratios are taken round by "
    "round; above 1 jaxgpt is faster. Peak memory: of the process on a CPU, of the device's arrays on a GPU.",
    "float32: true float32, on a GPU too; tf32: TF32 matmuls; bfloat16: bf16 matmuls, with parameters and AdamW in "
    "float32 (transformers: weights cast).",
)
TRAIN_NOTE = (
    "Both sides do nanoGPT's whole step: random windows, forward, backward, clipping, AdamW. MFU: matmul FLOPs as a "
    "share of the device's published bfloat16 rate. Initial state: to compile and compute it."
)
SAMPLE_NOTE = (
    "Random weights, a prompt of one token. jaxgpt and transformers have a KV cache; the twin has none, as nanoGPT. "
    "transformers stops at block_size, so it is compared in rows of its own."
)
Cases = dict[str, tuple[Config, Entrants]]


def train(
    device: Device = "cpu",
    shapes: tuple[str, ...] = ("tiny",),
    rounds: int = 5,
    seconds: float = 4.0,
    dropout: float = 0.0,
    batch_size: int = 0,
    precisions: tuple[Precision, ...] = ("float32", "bfloat16"),
    ways: tuple[Way, ...] = (),
) -> Report:
    """Training speed against the PyTorch twin.

    Args:
      device: where both sides compute
      shapes: models, by name
      rounds: measurements of each contestant, in turn
      seconds: least duration of a round of one contestant
      dropout: on both sides
      batch_size: sequences of a step; 0 for those of the shape
      precisions: of jaxgpt
      ways: of PyTorch; by default all of the device
    """
    require("torch")
    cases: Cases = {}
    changes = {"dropout": dropout} | ({"batch_size": batch_size} if batch_size else {})
    for shape in shapes:
        config = check(config_of(shape, device, **changes))
        sides = entrants("train", "torch", config, device, precisions, ways or WAYS[device])
        cases[f"{shape}, batch {config.train.batch_size}"] = config, sides
    return measure("train", device, cases, rounds, seconds, TRAIN_NOTE)


def sample(
    device: Device = "cpu",
    cases: tuple[str, ...] = (),
    rounds: int = 3,
    seconds: float = 2.0,
    precisions: tuple[Precision, ...] = ("float32", "bfloat16"),
    ways: tuple[Way, ...] = ("float32", "bfloat16"),
) -> Report:
    """Sampling speed against the twin and transformers.

    Args:
      device: where all compute
      cases: SHAPE:BATCH:TOKENS, such as tiny:64:512
      rounds: measurements of each contestant, in turn
      seconds: least duration of a round of one contestant, of at least one generation
      precisions: of jaxgpt
      ways: of PyTorch
    """
    asked = [parse_case(case) for case in cases or CASES[device]]
    require("torch", "transformers")
    compared: Cases = {}
    for shape, batch_size, n_tokens in asked:
        config = config_of(shape, device)
        within = min(n_tokens, config.model.block_size - 1)
        for n, library, where in ((n_tokens, "torch", ""), (within, "transformers", " within block_size")):
            sizes = {"batch_size": batch_size, "n_tokens": n}
            sides = entrants("sample", library, config, device, precisions, ways, **sizes)
            compared[f"{shape}, batch {batch_size}, {n} tokens{where}"] = config, sides
    return measure("sample", device, compared, rounds, seconds, SAMPLE_NOTE)


def parse_case(case: str) -> tuple[str, int, int]:
    """(shape, batch size, tokens) of SHAPE:BATCH:TOKENS.

    Raises:
      UsageError: it has another form.
    """
    shape, *numbers = case.split(":")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UsageError(f"case {case!r}, expected SHAPE:BATCH:TOKENS such as tiny:64:512")
    config_of(shape, "cpu")
    return shape, int(numbers[0]), int(numbers[1])


def entrants(
    mode: str,
    library: str,
    config: Config,
    device: Device,
    precisions: Sequence[Precision],
    ways: Sequence[Way],
    **sizes: int,
) -> Entrants:
    """jaxgpt in each precision, then `library` (torch or transformers) in each way."""

    def spec(side: str, config: Config, **how: str) -> list[str]:
        tree = {"task": f"{mode} {side}", "config": asdict(config), **how, **sizes}
        return ["-m", "scripts.benchmarks.contestants", json.dumps(tree)]

    found: Entrants = {}
    for precision in precisions:
        ours = spec("jaxgpt", replaced(config, precision=precision))
        if device == "gpu" and precision == "float32":  # XLA uses TF32 by default
            found["jaxgpt tf32"] = ours, {}
            found["jaxgpt float32"] = ours, {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}
        else:
            found[f"jaxgpt {precision}"] = ours, {}
    return found | {f"{library} {way}": (spec(library, config, device=device, way=way), {}) for way in ways}


def measure(mode: str, device: Device, cases: Cases, rounds: int, seconds: float, note: str) -> Report:
    """Compare the entrants of each case, one case after another."""
    report: Report = {"mode": mode, "facts": facts(device), "failed": {}, "notes": [*HOW, note], "rates": {}}
    ratios: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for case, (config, sides) in cases.items():
        found, failed, shares = compare(device, sides, rounds, seconds)
        report["failed"] |= {f"{case}, {name}": why for name, why in failed.items()}
        report["notes"].append(f"{case}: {disturbance(shares)}")
        report["facts"]["device"] = ", ".join({device: 0} | {about["device"]: 0 for about in found.values()})
        report["rates"][case] = rates = {name: about["rates"] for name, about in found.items()}
        ratios += [{"case": case, **row} for row in against_torch(rates)]
        for name, about in found.items():
            speed = series(about["rates"])
            row = {"case": case, "variant": name, "tokens/s": speed, "compiling, s": about.get("compile_seconds")}
            if mode == "train":
                used = utilization(config, about["device"], 1, speed["median"])
                row["ms/step"] = 1e3 * config.train.batch_size * config.model.block_size / speed["median"]
                row["MFU, %"] = None if used is None else 100 * used
                row["initial state, s"] = about.get("init_seconds")
            rows.append(row | {"peak memory, MB": about["peak_bytes"] / 1e6})
    titles = {"Tokens per second, jaxgpt / others": ratios, "Each": rows}
    return report | {"tables": [{"title": title, "rows": each} for title, each in titles.items()]}


def against_torch(rates: Rates) -> list[dict[str, Any]]:
    """Each variant of jaxgpt against the fastest of PyTorch: of all, and in its own precision."""
    rows = []
    for name in rates:
        if name.startswith("jaxgpt "):
            theirs = [other for other in rates if not other.startswith("jaxgpt ")]
            alike = [other for other in theirs if other.split()[1].startswith(name.split()[1])]
            best, same = fastest(rates, theirs), fastest(rates, alike)
            row = {"variant": name, "/ the best": ratio(rates[name], rates[best]) if best else None, "the best": best}
            rows.append(row | {"/ the best of its precision": ratio(rates[name], rates[same]) if same else None})
    return rows


def fastest(rates: Rates, names: Sequence[str]) -> str | None:
    """The one of `names` with the highest median rate; None without any."""
    return max(names, key=lambda name: statistics.median(rates[name]), default=None)


def require(*libraries: str) -> None:
    """
    Raises:
      UsageError: one of the libraries is not installed.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise UsageError(f"this measurement needs {library}, which is not installed: pip install --group bench")
