"""`jaxgpt scaling-fit`: train a family of sizes and fit a scaling law."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from jaxgpt import files
from jaxgpt.cli.options import DataDir, parse
from jaxgpt.config import DataConfig, UsageError, replaced
from jaxgpt.sweep.cli import SweepsDir, save_charts, train


@dataclass(frozen=True)
class ScalingFit:
    name: str = "scaling"
    """Name of the sweep, a folder in the sweeps folder. The same command again resumes it."""
    sizes: tuple[str, ...] = ("2x16", "2x32", "3x48", "4x64", "4x96", "5x128")
    """LAYERSxCHANNELS of each model."""
    tokens: tuple[int, ...] = (125_000, 250_000, 500_000, 1_000_000)
    """Tokens to train on; each amount is a run with its own schedule."""
    seeds: int = 1
    """Runs per size and amount of tokens."""
    at_once: int = 0
    """Maximum number of runs trained together; 0: as many as fit in memory, at most 8 on a CPU."""
    flops: tuple[float, ...] = (1e12, 1e13, 1e14, 1e15)
    """FLOP budgets for which to print the best size and amount of tokens."""
    data: DataConfig = field(default_factory=DataConfig)
    sweeps_dir: SweepsDir = Path("sweeps")
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    given = parse(ScalingFit, args, "scaling-fit")
    if not all(0 < number < math.inf for number in (given.seeds, *given.tokens, *given.flops)):
        raise UsageError("--seeds, --tokens and --flops: expected finite numbers above 0")
    from jaxgpt.scaling_law import family, view
    from jaxgpt.scaling_law.law import fit

    base, shapes = replaced(family.BASE, **vars(given.data)), [family.parse_size(text) for text in given.sizes]
    members = family.family(base, shapes, given.tokens, given.seeds)
    sizes, amounts = set(shapes), sorted({family.tokens_seen(member.config) for member in members})
    repeated = len(sizes) < len(given.sizes) or len(amounts) < len(given.tokens)
    if repeated or min(len(sizes), len(amounts)) < 3:
        raise UsageError(
            f"{len(sizes)} --sizes and {len(amounts)} amounts of --tokens ({', '.join(map(str, amounts))}, in whole "
            "scans of steps): a fit needs at least 3 of each, all different"
        )
    identity = {"program": "jaxgpt scaling-fit 1", "sizes": given.sizes, "amounts": given.tokens, "seeds": given.seeds}
    members, scores = train(given, base, members, identity)
    points = family.points(members, scores)
    if lost := len(members) - len(points):
        print(f"{lost} of {len(members)} runs diverged: left out of the fit")
    print(f"fitting the law to {len(points)} runs and to resamples of them", flush=True)
    fitted, path = fit(points), given.sweeps_dir / given.name
    for line in view.lines(fitted, points, given.flops):
        print(line)
    files.write_atomically(path / "law.json", fitted.to_json(points).encode())
    save_charts(path, {"law.png": view.law_chart(fitted, points)})
    return 0
