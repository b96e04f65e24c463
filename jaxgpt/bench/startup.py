"""How long a person waits: for the help, and for the first step of training, with and without a compile cache."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.facts import facts
from jaxgpt.bench.processes import Place, Timed, corpus_options
from jaxgpt.bench.table import Report

NOTES = (
    "help: a `jaxgpt --help` process, start to end. first step: from the start of a `jaxgpt train` process until the "
    "line of its first step stands in metrics.jsonl; with --scan-steps 1 that is when the second step is under way. It "
    "includes the imports, the text prepared, the untrained model scored on the whole validation split, and compiling.",
    "cold: nothing is in the compile cache. warm: the same command before it has left its programs there. A corpora "
    "folder of its own each time: the text is prepared each time. After the first round files are in the page cache.",
)


def measure(
    corpus: str | None = None,
    device: str = "cpu",
    recipe: str = "gpt-demo",
    repeats: int = 5,
    until: float = float("inf"),
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on `repeats` processes of each kind, in turn.

    Args:
      corpus: in place of the recipe's own.
      recipe: of the shape tiny, by default on the text that every Python carries.
      until: a time.monotonic() after which no further round begins.
    """
    turns: dict[str, int] = {}
    shares: list[float] = []

    def run(name: str) -> float:
        turn = turns[name] = turns.get(name, -1) + 1
        if name == "help":
            timed = Timed(["jaxgpt", "--help"], device, {}).run()
        else:
            timed = first_step(Place(Path(root) / str(turn)), name.split()[-1], recipe, corpus, device)
        shares.append(timed.others or 0.0)
        tell(f"{name}: {timed.seconds:.2f} s")
        return timed.seconds

    report: Report = {"mode": "startup", "facts": facts(device), "notes": [*NOTES, f"recipe: {recipe}"]}
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as root:
        found, report["failed"] = ruler.alternate(["help", "first step cold", "first step warm"], repeats, run, until)
    report["notes"].append(ruler.disturbance(shares))
    rows: list[dict[str, Any]] = [{"what": name, "seconds": ruler.series(times)} for name, times in found.items()]
    report["tables"] = [{"title": "Seconds from process start", "rows": rows}]
    return report | {"seconds": found}


def first_step(place: Place, name: str, recipe: str, corpus: str | None, device: str) -> Timed:
    """Timed until the first step's line is there; that process is ended then, and has saved what it compiled."""
    words = ["jaxgpt", "train", recipe, *corpus_options(corpus), *place.options(name)]
    words += ["--scan-steps", "1", "--eval-every", "0", "--eval-batches", "0"]
    metrics = place.folder / "runs" / name / "metrics.jsonl"
    return Timed(words, device, place.env).run(lambda: metrics.exists() and b'"grad_norm"' in metrics.read_bytes())
