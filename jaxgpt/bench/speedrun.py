"""From nothing to a loss: real processes, jaxgpt's and the twin's in turn, from their start to their end.

Ours is `jaxgpt train`, with all that it does: it prepares the text, scores the whole validation split, saves. The
twin's clock stops when its weights are saved, and it evaluates nothing before that.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.facts import facts
from jaxgpt.bench.processes import Place, Timed, corpus_options, read_json
from jaxgpt.bench.table import Report
from jaxgpt.config import UsageError
from jaxgpt.recipes import RECIPES, recipe

DEFAULTS = {"cpu": ("speedrun-cpu", "best-cpu"), "gpu": ("shakespeare-gpu",)}
"""Recipes to run, those of them that there are."""

TWINS = {"cpu": ("shakespeare-cpu", "float32"), "gpu": ("shakespeare-gpu", "bfloat16+compile")}
"""nanoGPT's own settings, and the way in which it computes by default."""

NOTES = (
    "jaxgpt: seconds from the start of a `jaxgpt train` process to its end: imports, the text prepared, compiling, "
    "training, evaluation, saves. Loss: the last over the whole validation split, in windows of the recipe's own "
    "block_size. cold: with an empty compile cache. warm: the same command again, with the cache that the first left.",
    "torch: the project's twin of nanoGPT, from the start of its process to its weights on disk, without any "
    "evaluation; its loss is computed after that, over the whole validation split in windows of its block_size.",
    "Processes run one at a time and in turn, each seed a round; ratios are the twin's seconds divided by ours, round "
    "by round: above 1 jaxgpt is faster.",
)


def measure(
    corpus: str,
    device: str = "cpu",
    recipes: Sequence[str] | None = None,
    repeats: int = 5,
    seed: int = 1337,
    bound: float = 1.88,
    way: str | None = None,
    twin_recipe: str | None = None,
    steps: int | None = None,
    twin_steps: int | None = None,
    until: float = float("inf"),
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on each of `recipes`, cold and warm, against the twin with nanoGPT's settings.

    Args:
      repeats: seeds, from `seed` on; the twin has the same ones.
      bound: the loss to reach.
      way, twin_recipe: how the twin computes, and whose settings it has; by default those of `TWINS`.
      steps, twin_steps: fewer than the recipes', to try this out.
      until: a time.monotonic() after which no further seed begins.
    """
    recipes = [name for name in DEFAULTS[device] if name in RECIPES] if recipes is None else recipes
    if not recipes:
        raise UsageError(f"none of {', '.join(DEFAULTS[device])} is a recipe: name others with --recipes")
    twin_recipe, way = twin_recipe or TWINS[device][0], way or TWINS[device][1]
    for name in recipes:
        recipe(name)
    raw: dict[str, list[dict[str, Any]]] = {}

    def run(name: str) -> float:
        """The next seed of "RECIPE cold", "RECIPE warm" or "torch": its seconds."""
        turn = len(raw.setdefault(name, []))
        if name == "torch":
            found = run_twin(corpus, device, Path(root), seed + turn, way, twin_recipe, twin_steps)
        else:
            cold = name.replace(" warm", " cold")
            if cold != name and len(raw.get(cold, [])) <= turn:
                raise ruler.WorkerError("the cold run before it failed, and left no cache")
            found = run_ours(corpus, device, Path(root), name, turn, seed + turn, steps)
        raw[name].append(found)
        tell(f"{name}, seed {seed + turn}: {found['seconds']:.1f} s, loss {found['loss']:.4f}")
        return float(found["seconds"])

    names = ["torch", *(f"{name} {cache}" for name in recipes for cache in ("cold", "warm"))]
    report: Report = {"mode": "speedrun", "facts": facts(device), "notes": list(NOTES), "runs": raw}
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as root:
        times, report["failed"] = ruler.alternate(names, repeats, run, until)
    theirs = times.pop("torch", [])
    shares = [found["others"] for runs in raw.values() for found in runs if found["others"] is not None]
    report["notes"].append(ruler.disturbance(shares))
    rows = [_row(name, found, theirs, raw[name], bound) for name, found in times.items()]
    if theirs:
        rows.append(_row(f"torch {way}", theirs, theirs, raw["torch"], bound))
    report["tables"] = [{"title": f"From process start to process end, {len(theirs)} seeds", "rows": rows}]
    return report


def run_ours(
    corpus: str, device: str, root: Path, name: str, turn: int, seed: int, steps: int | None
) -> dict[str, Any]:
    """One `jaxgpt train`. A cold run is the first of its place, and leaves its caches to the warm run after it."""
    named, cache = name.split()
    place = Place(root / f"{named}-{turn}")
    words = ["jaxgpt", "train", named, *corpus_options(corpus), *place.options(cache), "--seed", str(seed)]
    words += ["--steps", str(steps)] if steps else []
    timed = Timed(words, device, place.env).run()
    scores = place.scores(cache)
    if cache == "warm":
        shutil.rmtree(place.folder)
    return {
        "seed": seed,
        "seconds": timed.seconds,
        "loss": scores[-1],
        "best_loss": min(scores),
        "others": timed.others,
    }


def run_twin(
    corpus: str, device: str, root: Path, seed: int, way: str, twin_recipe: str, steps: int | None
) -> dict[str, Any]:
    """One run of `jaxgpt.bench.twin`, which stamps the time at which its weights are saved."""
    place, out = Place(root / f"torch-{seed}"), root / f"torch-{seed}.json"
    words = ["jaxgpt.bench.twin", "--data", corpus, "--out", str(out), "--recipe", twin_recipe, "--way", way]
    words += ["--device", "cuda" if device == "gpu" else "cpu", "--seed", str(seed), "--began", "{began}"]
    words += ["--steps", str(steps)] if steps else []
    timed = Timed(words, device, place.env).run()
    done: dict[str, Any] = read_json(out)
    return done | {"seconds_with_score": timed.seconds, "others": timed.others}


def _row(
    name: str, seconds: list[float], theirs: list[float], runs: list[dict[str, Any]], bound: float
) -> dict[str, Any]:
    losses = [each["loss"] for each in runs]
    both = min(len(seconds), len(theirs))
    return {
        "run": name,
        "torch / this": ruler.ratio(theirs[:both], seconds[:both]) if both else None,
        "seconds": ruler.series(seconds),
        "within torch's time": all(a <= b for a, b in zip(seconds, theirs, strict=False)) if both else None,
        "mean loss": f"{sum(losses) / len(losses):.4f}",
        f"reached {bound}": f"{sum(loss <= bound for loss in losses)} of {len(losses)}",
        "losses": ", ".join(f"{loss:.4f}" for loss in losses),
    }
