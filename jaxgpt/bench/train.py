"""Training speed: tokens per second of jaxgpt and of the PyTorch twin, in turn, on the same shapes.

Both sides do nanoGPT's whole step: random windows, forward, backward, clipping, AdamW. Both look at the loss after the
same number of steps.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from jaxgpt.bench import peak, ruler
from jaxgpt.bench.facts import WHAT_PRECISIONS_MEAN, facts
from jaxgpt.bench.ruler import Contest, Rates
from jaxgpt.bench.shapes import ABOUT, PRECISIONS, SHAPES, Precision, config_of, flops_per_step
from jaxgpt.bench.table import Report
from jaxgpt.config import Config, to_tree

Variant = tuple[str, dict[str, Any], dict[str, str]]
"""Its name, its worker's spec, and variables for that worker alone."""

WAYS = {
    "cpu": ("float32", "float32+compile", "bfloat16", "bfloat16+compile"),
    "gpu": ("float32", "tf32", "tf32+compile", "bfloat16", "bfloat16+compile"),
}
"""How the twin is run by default."""

NOTES = (
    "jaxgpt: train_steps, the function of `jaxgpt train`: K steps in one compiled program. torch: the project's twin "
    "of nanoGPT with scaled_dot_product_attention and fused AdamW; bfloat16 is autocast, +compile is torch.compile of "
    "the model.",
    "Rates are of rounds in turn (A B C A B C), median (least to greatest); ratios are taken round by round. Above 1 "
    "jaxgpt is faster. Compiling and warming up come before the first round and count apart. split: the same batch in "
    "micro-batches (--accumulate), which may stay in a processor's caches.",
    "use of peak: operations of the products alone (three times nn.cost.flops_per_token) per second, divided by the "
    "peak. Peak memory: of the process on a CPU, libraries included; of the device's arrays on a GPU.",
    *WHAT_PRECISIONS_MEAN,
)


def measure(
    device: str = "cpu",
    shapes: Sequence[str] = ("tiny",),
    rounds: int = 5,
    seconds: float = 4.0,
    dropout: float = 0.0,
    ways: Sequence[str] | None = None,
    until: float = float("inf"),
    patience: int = 0,
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on `shapes`, each of whose contestants works for about `seconds` in each of `rounds` rounds.

    Args:
      ways: of the twin, names of `twin.WAYS`; None for all that make sense on the device.
      patience: as in `Contest.measure`.
      until: a time.monotonic() after which no shape and no further round begins.
    """
    report: Report = {"mode": "train", "facts": facts(device), "failed": {}, "tables": [], "shapes": {}}
    report["notes"] = [f"{shape}: {ABOUT[shape]}; dropout {dropout}" for shape in shapes] + list(NOTES)
    found = peak.measure(device, tell, patience) if device == "cpu" else None
    for shape in shapes:
        if time.monotonic() > until:
            report["failed"][shape] = ruler.TOO_LATE
            continue
        config = config_of(shape, device, dropout=dropout)
        with Contest(device, lambda line, shape=shape: tell(f"{shape}: {line}")) as contest:  # type: ignore[misc]
            for name, spec, env in variants(shape, device, dropout, ways or WAYS[device]):
                contest.enter(name, spec, env)
            rates = contest.measure(rounds, seconds, until, patience)
        about = {name: worker.about for name, worker in contest.workers.items()}
        report["facts"]["device"] = contest.device_name
        top, of = peak.of(device, about, found)
        report["tables"] += [
            {"title": f"{shape}: tokens per second, jaxgpt / torch", "rows": ratio_rows(rates)},
            {"title": f"{shape}: each", "rows": rate_rows(config, rates, about, contest.peak_bytes, top)},
        ]
        report["shapes"][shape] = {"rates": rates, "about": about, "peak_bytes": contest.peak_bytes, "peak_flops": top}
        report["notes"] += [f"{shape}: the peak is {of}", f"{shape}: {contest.quiet()}"]
        report["failed"] |= {f"{shape}, {name}": why for name, why in contest.failed.items()}
    return report


def variants(shape: str, device: str, dropout: float, ways: Sequence[str]) -> list[Variant]:
    """Ours, then theirs."""
    ours: list[Variant] = []
    split, parts_on_cpu = {"": 1}, SHAPES[shape].parts_on_cpu
    if device == "cpu" and parts_on_cpu > 1:
        split[" split"] = parts_on_cpu

    def tree(parts: int, precision: Precision = "float32") -> Any:
        config = config_of(shape, device, precision, dropout)
        return to_tree(replace(config, train=replace(config.train, accumulate=parts)))

    for precision, (name, parts) in product(PRECISIONS, split.items()):
        spec = {"task": "train-jaxgpt", "config": tree(parts, precision)}
        kinds: dict[str, dict[str, str]] = {precision: {}}
        if device == "gpu" and precision == "float32":  # where XLA uses TF32 if nothing is said
            kinds = {"float32": {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}, "tf32": {}}
        ours += [(f"jaxgpt {kind}{name}", spec, env) for kind, env in kinds.items()]
    theirs = {"task": "train-torch", "device": device}
    return ours + [
        (f"torch {way}{name}", {**theirs, "config": tree(parts), "way": way}, {})
        for way, (name, parts) in product(ways, split.items())
    ]


def ratio_rows(rates: Rates) -> list[dict[str, Any]]:
    """Each of ours against the best of theirs: of all, of those in float32, and of those in its own precision."""
    theirs = [name for name in rates if name.startswith("torch ")]

    def against(name: str, precision: str) -> ruler.Series | None:
        other = ruler.best(rates, [each for each in theirs if each.split()[1].split("+")[0].startswith(precision)])
        return ruler.ratio(rates[name], rates[other]) if other else None

    return [
        {
            "jaxgpt": name.removeprefix("jaxgpt "),
            "/ best torch": against(name, ""),
            "/ best float32 torch": against(name, "float32"),
            "/ best torch of its precision": against(name, name.split()[1]),
            "the best torch": (ruler.best(rates, theirs) or "-").removeprefix("torch "),
        }
        for name in rates
        if name.startswith("jaxgpt ")
    ]


def rate_rows(
    config: Config, rates: Rates, about: dict[str, Any], peak_bytes: dict[str, int], top: float | None
) -> list[dict[str, Any]]:
    """Every variant's own figures."""
    tokens = config.train.batch_size * config.model.block_size
    rows = []
    for name, found in rates.items():
        speed = ruler.series(found)
        rows.append(
            {
                "variant": name,
                "tokens/s": speed,
                "ms/step": 1e3 * tokens / speed["median"],
                "use of peak, %": 100 * flops_per_step(config) / tokens * speed["median"] / top if top else None,
                "compiling, s": about[name]["compile_seconds"],
                "peak memory, MB": peak_bytes[name] / 1e6,
            }
        )
    return rows
