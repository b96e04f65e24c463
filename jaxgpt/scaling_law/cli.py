"""`jaxgpt scaling-fit`: train a family of sizes and fit a scaling law."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, parse
from jaxgpt.config import DataConfig, UsageError, replaced, to_tree
from jaxgpt.sweep.cli import SweepsDir, require_name, show_plots, use_cores


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
    require_name(given.name)
    for option, valid, what in (
        ("tokens", all(1 <= n < 2**40 for n in given.tokens), "numbers of tokens above 0"),
        ("flops", all(0 < flops < float("inf") for flops in given.flops), "numbers above 0"),
        ("seeds", given.seeds >= 1, "at least 1"),
        ("at-once", given.at_once >= 0, "0 or more"),
        ("sizes", len(set(given.sizes)) == len(given.sizes), "different sizes"),
    ):
        if not valid:
            value = getattr(given, option.replace("-", "_"))
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"--{option} {shown}: expected {what}")
    use_compile_cache()
    use_cores(len(given.sizes) * len(given.tokens) * given.seeds)
    import jax

    from jaxgpt import files
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.scaling_law import family, plots
    from jaxgpt.scaling_law import view as laws
    from jaxgpt.scaling_law.law import fit
    from jaxgpt.sweep.results import SweepFolder, prepare
    from jaxgpt.sweep.view import SweepDisplay

    base = replaced(family.BASE, **vars(given.data))
    members = family.family(base, [family.parse_size(text) for text in given.sizes], given.tokens, given.seeds)
    amounts = sorted({family.tokens_seen(member.config) for member in members})
    if len(amounts) < len(given.tokens) or min(len(given.sizes), len(amounts)) < 3:
        raise UsageError(
            f"{len(given.sizes)} --sizes and {len(amounts)} amounts of --tokens ({', '.join(map(str, amounts))}, in "
            "whole scans of steps): a fit needs at least 3 of each, all different"
        )
    files.require_writable(given.sweeps_dir, "--sweeps-dir")
    members, corpus = prepare(base, members, given.data_dir)
    asked: dict[str, Any] = {"program": "jaxgpt scaling-fit 1", "config": to_tree(base), "seeds": given.seeds}
    asked |= {"sizes": given.sizes, "amounts": given.tokens, "tokens": corpus.meta["sha256"]}
    path, console = given.sweeps_dir / given.name, RunConsole()
    console.print(corpus.summary)
    with SweepFolder.held(path, asked) as folder:
        with SweepDisplay(console, members, folder.lines) as display:
            folder.train(members, corpus, jax.devices(), given.at_once, display)
        trained = family.points(members, folder.lines)
    points = [point for point in trained if math.isfinite(point[2])]
    if lost := len(trained) - len(points):
        console.print(f"{lost} of {len(trained)} runs diverged and are left out of the fit")
    found = fit([N for N, _, _ in points], [D for _, D, _ in points], [loss for _, _, loss in points])
    for line in laws.lines(found, points, given.flops):
        console.print(line)
    files.write_atomically(path / "law.json", found.to_json(points).encode())
    show_plots(console, lambda: plots.draw(found, points, path))
    return 0
