"""Many seeds: by one `jaxgpt sweep`, and by as many `jaxgpt train` one after another, whole processes."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.facts import facts
from jaxgpt.bench.processes import Place, Timed, corpus_options
from jaxgpt.bench.table import Report
from jaxgpt.recipes import recipe as named

NOTES = (
    "Seconds from the start of the first process to the end of the last: imports, the text prepared, compiling, "
    "training, evaluation. runs: each process finds what those before it have left in the compile cache; it also saves "
    "its weights, and makes nanoGPT-style estimates beside the exact score, which a sweep does not. Both begin with an "
    "empty cache.",
    "apart: the greatest difference of a seed's last loss over the whole validation split.",
)


def measure(
    corpus: str,
    device: str = "cpu",
    recipe: str = "shakespeare-cpu",
    seeds: int = 8,
    repeats: int = 1,
    steps: int | None = None,
    until: float = float("inf"),
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on a sweep of so many seeds and on the runs, in turn.

    Args:
      steps: fewer than the recipe's, to try this out; warm-up is as much shorter.
      until: a time.monotonic() after which no further round begins.
    """
    config, turns, shares = named(recipe).config, dict[str, int](), list[float]()
    losses: dict[str, list[dict[int, float]]] = {"sweep": [], "runs": []}
    processor: dict[str, list[float]] = {"sweep": [], "runs": []}
    words = [recipe, *corpus_options(corpus)]
    if steps:
        warmup = config.optimizer.warmup_steps * steps // config.train.steps
        words += ["--steps", str(steps), "--warmup-steps", str(warmup)]
        words += ["--scan-steps", str(min(config.train.scan_steps, steps)), "--eval-every", "0"]
    first = config.train.seed

    def run(name: str) -> float:
        turn = turns[name] = turns.get(name, -1) + 1
        place, before = Place(Path(root) / f"{name}-{turn}"), os.times()
        timed, found = (
            sweep(place, words, seeds, device) if name == "sweep" else runs(place, words, first, seeds, device)
        )
        losses[name].append(found)
        shares.extend(each.others for each in timed if each.others is not None)
        seconds = sum(each.seconds for each in timed)
        after = os.times()
        user, system = (after[i] - before[i] for i in (2, 3))  # of the processes that have ended
        processor[name].append(user + system)
        tell(f"{name}: {seconds:.1f} s, of the processor {user + system:.1f} s")
        return seconds

    report: Report = {"mode": "sweep", "facts": facts(device), "notes": [f"{recipe}, {seeds} seeds", *NOTES]}
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as root:
        found, report["failed"] = ruler.alternate(["sweep", "runs"], repeats, run, until)
    report["notes"].append(ruler.disturbance(shares))
    rows: list[dict[str, Any]] = [
        {"what": name, "seconds": ruler.series(times), "of the processor": ruler.series(processor[name])}
        for name, times in found.items()
    ]
    if len(found) == 2:
        rows[0]["runs / this"] = ruler.ratio(found["runs"], found["sweep"])
        pairs = zip(losses["runs"], losses["sweep"], strict=False)
        rows[0]["apart, nats"] = f"{max(abs(a[seed] - b[seed]) for a, b in pairs for seed in a):.1e}"
    report["tables"] = [{"title": f"{seeds} seeds of {recipe}, {steps or config.train.steps} steps", "rows": rows}]
    return report | {"seconds": found, "processor_seconds": processor, "losses": losses}


def sweep(place: Place, words: list[str], seeds: int, device: str) -> tuple[list[Timed], dict[int, float]]:
    """One process; the last loss of each seed."""
    folders = ["--sweeps-dir", str(place.folder / "sweeps"), "--data-dir", str(place.folder / "data")]
    line = ["jaxgpt", "sweep", *words, "--name", "all", "--seeds", str(seeds), *folders]
    timed = Timed(line, device, place.env).run()
    lines = map(json.loads, (place.folder / "sweeps" / "all" / "results.jsonl").read_text().splitlines())
    return [timed], {line["seed"]: line["val_loss"] for line in lines if line["done"]}


def runs(place: Place, words: list[str], first: int, seeds: int, device: str) -> tuple[list[Timed], dict[int, float]]:
    """As many processes as seeds; the last loss of each."""
    timed, losses = [], {}
    for seed in range(first, first + seeds):
        line = ["jaxgpt", "train", *words, "--seed", str(seed), *place.options(str(seed))]
        timed.append(Timed(line, device, place.env).run())
        losses[seed] = place.scores(str(seed))[-1]
    return timed, losses
