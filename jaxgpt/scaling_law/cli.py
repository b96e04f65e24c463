"""`jaxgpt scaling-fit`: train a family of sizes and fit a scaling law."""

from dataclasses import dataclass, field
from pathlib import Path

from jaxgpt import files
from jaxgpt.cli.options import DataDir, parse
from jaxgpt.config import DataConfig, UsageError, replaced
from jaxgpt.display import charts
from jaxgpt.sweep.cli import SweepsDir, show_plots, train


@dataclass(frozen=True)
class ScalingFit:
    name: str = "scaling"
    """Name of the sweep, a folder in the sweeps folder. The same command again resumes it."""
    sizes: tuple[str, ...] = ("2x16", "2x32", "3x48", "4x64", "4x96", "5x128")
    """LAYERSxCHANNELS of each model."""
    tokens: tuple[int, ...] = (125_000, 250_000, 500_000, 1_000_000)
    """Tokens to train on; each amount is a run with its own schedule."""
    seeds: int = 1
    """Runs per size and amount."""
    at_once: int = 0
    """Runs to train together, at most; 0: as many as the memory holds."""
    flops: tuple[float, ...] = (1e12, 1e13, 1e14, 1e15)
    """FLOP budgets to print the best size and amount for."""
    data: DataConfig = field(default_factory=DataConfig)
    sweeps_dir: SweepsDir = Path("sweeps")
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    given = parse(ScalingFit, args, "scaling-fit")
    if min(given.seeds, *given.tokens, *given.flops) <= 0:
        raise UsageError("--seeds, --tokens and --flops: expected numbers above 0")
    from jaxgpt.scaling_law import family, view
    from jaxgpt.scaling_law.law import fit

    base = replaced(family.BASE, **vars(given.data))
    members = family.family(base, [family.parse_size(text) for text in given.sizes], given.tokens, given.seeds)
    sizes, amounts = set(given.sizes), sorted({family.tokens_seen(member.config) for member in members})
    alike = len(sizes) < len(given.sizes) or len(amounts) < len(given.tokens)
    if alike or min(len(sizes), len(amounts)) < 3:
        raise UsageError(
            f"{len(sizes)} --sizes and {len(amounts)} amounts of --tokens ({', '.join(map(str, amounts))}, in whole "
            "scans of steps): a fit needs at least 3 of each, all different"
        )
    asked = {"program": "jaxgpt scaling-fit 1", "sizes": given.sizes, "amounts": given.tokens, "seeds": given.seeds}
    members, lines = train(given, base, members, asked)
    points = family.points(members, lines)
    if lost := len(members) - len(points):
        print(f"{lost} of {len(members)} runs diverged and are left out of the fit")
    found, path = fit(points), given.sweeps_dir / given.name
    for line in view.lines(found, points, given.flops):
        print(line)
    files.write_atomically(path / "law.json", found.to_json(points).encode())

    def draw() -> list[Path]:
        charts.save(view.law_chart(found, points), path / "law.png")
        return [path / "law.png"]

    show_plots(draw)
    return 0
