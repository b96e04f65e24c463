"""Tokens per second of jaxgpt and of PyTorch, in turn on the same shapes: training and sampling."""

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from jaxgpt.config import Config, UsageError, check
from jaxgpt.monitor.chips import utilization
from jaxgpt.profile.report import Report
from jaxgpt.profile.timing import Rates, Series, ratio, series
from scripts.benchmarks.contest import Contest, require_round
from scripts.benchmarks.load import disturbance
from scripts.benchmarks.machine import facts
from scripts.benchmarks.shapes import (
    PRECISIONS,
    Device,
    Precision,
    config_of,
    describe,
    flops_per_step,
    tokens_per_step,
)

Way = Literal["float32", "float32+compile", "tf32", "tf32+compile", "bfloat16", "bfloat16+compile"]
"""How the twin runs (`twin.WAYS`)."""
WAYS: dict[str, tuple[Way, ...]] = {
    "cpu": ("float32", "float32+compile", "bfloat16", "bfloat16+compile"),
    "gpu": ("float32", "tf32", "tf32+compile", "bfloat16", "bfloat16+compile"),
}
CASES = {
    "cpu": ("tiny:1:512", "tiny:64:512", "baby:1:512", "baby:64:64"),
    "gpu": ("tiny:1:512", "tiny:64:512", "baby:1:512", "baby:64:512"),
}
"""SHAPE:BATCH:TOKENS. Without a KV cache, baby:64:512 takes a quarter of an hour on two cores."""
DRAW = {"temperature": 0.8, "top_k": 40}
"""On every side; 40 is below the vocabulary sizes, so that each side must select the largest logits."""
HOW = (
    "Rates are of rounds in turn (A B C A B C), median (minimum to maximum); ratios are taken round by round, above 1 "
    "jaxgpt is faster. Compiling and warming up come before the first round.",
    "float32: true float32, not TF32, on a GPU too; tf32: float32 numbers multiplied by TF32 units; bfloat16: bf16 "
    "matmuls with float32 sums, parameters and AdamW in float32 (PyTorch: autocast; transformers: weights cast)",
)
TRAIN_NOTES = (
    "jaxgpt: train_steps, the function of `jaxgpt train`, K steps in one compiled program. torch: the project's twin "
    "of nanoGPT with scaled_dot_product_attention and fused AdamW; +compile is torch.compile of the model. Both do "
    "nanoGPT's whole step: random windows, forward, backward, clipping, AdamW.",
    "GFLOP/s: of the matmuls alone; MFU: as a share of the device's published bfloat16 rate. Initial state: to compile "
    "and compute it, without a compile cache. Peak memory: of the process on a CPU, of the device's arrays on a GPU.",
)
SAMPLE_NOTES = (
    "Random weights, a prompt of one token, temperature 0.8, top-k 40. jaxgpt: `generate` with its KV cache; its first "
    "call compiles and does not count. torch: nanoGPT's generate in the twin, the whole window through the model for "
    "each token, as nanoGPT has no cache. transformers: GPT2LMHeadModel.generate with its KV cache.",
    "GPT-2 in transformers stops at n_positions, so it is compared in rows of its own, within block_size.",
)
Entrants = dict[str, tuple[dict[str, Any], dict[str, str]]]
"""Name -> (arguments of `contestants.build`, variables of its process)."""


def train(
    device: Device = "cpu",
    shapes: tuple[str, ...] = ("tiny",),
    rounds: int = 5,
    seconds: float = 4.0,
    dropout: float = 0.0,
    batch_size: int = 0,
    precisions: tuple[Precision, ...] = PRECISIONS,
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
    configs = {shape: check(config_of(shape, device, dropout=dropout, batch_size=batch_size)) for shape in shapes}
    report: Report = {"mode": "train", "facts": facts(device), "failed": {}, "tables": [], "rates": {}}
    report["notes"] = [describe(shape, config) for shape, config in configs.items()] + [*HOW, *TRAIN_NOTES]
    for shape, config in configs.items():
        contest, rates = compare(
            device, training_entrants(config, device, precisions, ways or WAYS[device]), rounds, seconds
        )
        _add(report, contest, shape)
        report["rates"][shape] = rates
        report["tables"] += [
            {"title": f"{shape}: tokens per second, jaxgpt / torch", "rows": training_ratios(rates)},
            {"title": f"{shape}: each", "rows": training_rows(config, rates, contest)},
        ]
    return report


def training_entrants(config: Config, device: Device, precisions: Sequence[Precision], ways: Sequence[str]) -> Entrants:
    found: Entrants = {}
    for precision in precisions:
        tree = asdict(replace(config, model=replace(config.model, precision=precision)))
        spec = {"task": "train jaxgpt", "config": tree}
        if device == "gpu" and precision == "float32":  # XLA uses TF32 by default
            found["jaxgpt tf32"] = spec, {}
            found["jaxgpt float32"] = spec, {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}
        else:
            found[f"jaxgpt {precision}"] = spec, {}
    theirs = {"task": "train torch", "config": asdict(config), "device": device}
    return found | {f"torch {way}": ({**theirs, "way": way}, {}) for way in ways}


def training_ratios(rates: Rates) -> list[dict[str, Any]]:
    """Each variant of jaxgpt against the fastest of PyTorch: of all, in float32, and in its own precision."""
    theirs = [name for name in rates if name.startswith("torch ")]

    def against(name: str, precision: str) -> Series | None:
        other = best(rates, [each for each in theirs if each.split()[1].startswith(precision)])
        return ratio(rates[name], rates[other]) if other else None

    return [
        {
            "jaxgpt": name.removeprefix("jaxgpt "),
            "/ best torch": against(name, ""),
            "/ best float32 torch": against(name, "float32"),
            "/ best torch of its precision": against(name, name.split()[1]),
            "the best torch": (best(rates, theirs) or "-").removeprefix("torch "),
        }
        for name in rates
        if name.startswith("jaxgpt ")
    ]


def training_rows(config: Config, rates: Rates, contest: Contest) -> list[dict[str, Any]]:
    rows, tokens = [], tokens_per_step(config)
    for name, found in rates.items():
        speed, about = series(found), contest.about[name]
        used = utilization(config, about["device"], 1, speed["median"])
        rows.append(
            {
                "variant": name,
                "tokens/s": speed,
                "ms/step": 1e3 * tokens / speed["median"],
                "GFLOP/s": flops_per_step(config) / tokens * speed["median"] / 1e9,
                "MFU, %": None if used is None else 100 * used,
                "initial state, s": about.get("init_seconds"),
                "compiling, s": about["compile_seconds"],
                "peak memory, MB": contest.peak_bytes[name] / 1e6,
            }
        )
    return rows


def sample(
    device: Device = "cpu",
    cases: tuple[str, ...] = (),
    rounds: int = 3,
    seconds: float = 2.0,
    precisions: tuple[Precision, ...] = PRECISIONS,
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
    ratios: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    report: Report = {"mode": "sample", "facts": facts(device), "failed": {}, "notes": [*HOW, *SAMPLE_NOTES]}
    for shape, batch_size, n_tokens in asked:
        within = config_of(shape, device).model.block_size - 1
        for n, library in ((n_tokens, "torch"), (min(n_tokens, within), "transformers")):
            case = f"{shape}, batch {batch_size}, {n} tokens" + (" within block_size" if library != "torch" else "")
            entrants = sampling_entrants(shape, device, batch_size, n, library, precisions, ways)
            contest, rates = compare(device, entrants, rounds, seconds)
            _add(report, contest, case)
            other = best(rates, [name for name in rates if name.startswith(library)])
            for name, found in rates.items():
                ours, about = name.startswith("jaxgpt"), contest.about[name]
                if ours and other:
                    against = {"ratio": ratio(found, rates[other]), "against": other}
                    ratios.append({"case": case, "variant": name, **against})
                figures = {"tokens/s": series(found), "first call, s": about["first_seconds"] if ours else None}
                memory = {"peak memory, MB": contest.peak_bytes[name] / 1e6}
                rows.append({"case": case, "variant": name} | figures | memory)
    titles = {"Tokens per second, jaxgpt / others": ratios, "Each": rows}
    return report | {"tables": [{"title": title, "rows": each} for title, each in titles.items()]}


def parse_case(case: str) -> tuple[str, int, int]:
    """(shape, batch size, tokens) of SHAPE:BATCH:TOKENS, or SHAPE:BATCH for 512 tokens.

    Raises:
      UsageError: it has another form.
    """
    shape, *numbers = case.split(":")
    if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UsageError(f"case {case!r}, expected SHAPE:BATCH:TOKENS such as tiny:64:512")
    batch_size, n_tokens = [*map(int, numbers), 512][:2]
    config_of(shape, "cpu")
    return shape, batch_size, n_tokens


def sampling_entrants(
    shape: str,
    device: Device,
    batch_size: int,
    n_tokens: int,
    library: str,
    precisions: Sequence[Precision],
    ways: Sequence[str],
) -> Entrants:
    """jaxgpt in each precision, then `library` (torch or transformers) in each way."""
    common: dict[str, Any] = {"batch_size": batch_size, "n_tokens": n_tokens, **DRAW}
    found: Entrants = {}
    for precision in precisions:
        tree = asdict(config_of(shape, device, precision))
        found[f"jaxgpt {precision}"] = {"task": "sample jaxgpt", "config": tree, **common}, {}
    theirs = {"task": f"sample {library}", "config": asdict(config_of(shape, device)), "device": device, **common}
    return found | {f"{library} {way}": ({**theirs, "way": way}, {}) for way in ways}


def compare(device: Device, entrants: Entrants, rounds: int, seconds: float) -> tuple[Contest, Rates]:
    """Start all entrants and measure them in turn."""
    require_round(rounds)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as cache, Contest(device) as contest:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        for name, (spec, env) in entrants.items():
            contest.enter(name, ["-m", "scripts.benchmarks.contestants", json.dumps(spec)], fresh | env)
        return contest, contest.measure(rounds, seconds)


def best(rates: Rates, names: Sequence[str]) -> str | None:
    """The one of `names` with the highest median rate; None if none was measured."""
    measured = [name for name in names if rates.get(name)]
    return max(measured, key=lambda name: statistics.median(rates[name]), default=None)


def require(*libraries: str) -> None:
    """
    Raises:
      UsageError: one of the libraries is not installed.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise UsageError(f"this measurement needs {library}, which is not installed: pip install --group bench")


def _add(report: Report, contest: Contest, case: str) -> None:
    """Device, failures and disturbances of a contest."""
    report["facts"] |= contest.facts()
    report["failed"] |= {f"{case}, {name}": why for name, why in contest.failed.items()}
    report["notes"].append(f"{case}: {disturbance(contest.others)}")
