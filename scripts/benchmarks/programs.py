"""Whole programs, from the start of their process to its end: the time that a user waits."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.profile import timing
from jaxgpt.profile.report import Report
from jaxgpt.recipes import RECIPES
from jaxgpt.recipes import recipe as recipe_of
from jaxgpt.run import Run
from scripts.benchmarks import contest, load
from scripts.benchmarks.machine import facts
from scripts.benchmarks.rates import Way, require
from scripts.benchmarks.shapes import Device

DEFAULTS = {"cpu": ("speedrun-cpu",), "gpu": ("shakespeare-gpu",)}
TWINS: dict[str, tuple[str, Way]] = {
    "cpu": ("shakespeare-cpu", "float32"),
    "gpu": ("shakespeare-gpu", "bfloat16+compile"),
}
"""The recipe with nanoGPT's settings, and the way in which nanoGPT computes by default."""
SPEEDRUN_NOTES = (
    "jaxgpt: seconds from the start of a `jaxgpt train` process to its end: imports, the text prepared, compiling, "
    "training, evaluation, saves. Loss: the last over the whole validation split, in windows of the recipe's own "
    "block_size. cold: with an empty compile cache. warm: the same command again, with the cache that the first left. "
    "pause: for which an evaluation and the save before it keep training waiting, the median without the first, which "
    "compiles.",
    "torch: the project's twin of nanoGPT, from the start of its process to its weights on disk, without any "
    "evaluation; its loss is computed after that, over the whole validation split in windows of its block_size.",
    "Processes run one at a time and in turn, each seed a round; ratios are the twin's seconds divided by ours, round "
    "by round: above 1 jaxgpt is faster.",
)
STARTUP_NOTES = (
    "help: a `jaxgpt --help` process. first step: from the start of a `jaxgpt train` process until the line of its "
    "first step is in metrics.jsonl (with --scan-steps 1, when the second step runs). It includes imports, preparing "
    "the text, scoring the untrained model on the whole validation split, and compiling.",
    "cold: with an empty compile cache. warm: the same command again, with the cache that the first left.",
)


@dataclass(frozen=True)
class Place:
    """A folder for all that a `jaxgpt` process reads and writes: compile cache, corpora, runs."""

    folder: Path
    device: Device

    def run(self, words: Sequence[str], until: Callable[[], bool] | None = None) -> tuple[float, float]:
        """Run `python -m WORDS` to its end or, with `until`, until that holds: (seconds, share of others).

        Raises:
          WorkerError: it failed; with the last line that it printed.
        """
        caches = {"XDG_CACHE_HOME": "cache", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        env = contest.environment(self.device) | {name: str(self.folder / below) for name, below in caches.items()}
        before, own, began = load.machine_seconds(), _children_seconds(), time.monotonic()
        words = [word.replace("{began}", repr(began)) for word in words]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen([sys.executable, "-m", *words], env=env, stdout=output, stderr=output)
            try:
                met = False
                while until and not met and process.poll() is None:
                    time.sleep(0.005)
                    met = until()
                seconds = time.monotonic() - began
                if met:
                    process.terminate()
                process.wait()
                seconds = seconds if met else time.monotonic() - began
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:] or [""]
        if not met and (until or process.returncode):
            raise contest.WorkerError(f"{' '.join(words)}: exit code {process.returncode}: {last[0][:300]}")
        return seconds, load.others(before, load.machine_seconds(), _children_seconds() - own)

    def train(self, name: str, words: Sequence[str], until: Callable[[], bool] | None = None) -> tuple[float, float]:
        """`jaxgpt train WORDS` as run `name`, with a corpora folder of its own, so that each prepares its text."""
        folders = ["--runs-dir", str(self.folder / "runs"), "--data-dir", str(self.folder / f"data-{name}")]
        return self.run(["jaxgpt", "train", *words, "--run", name, *folders], until)

    def opened(self, name: str) -> Run:
        return Run(self.folder / "runs" / name)

    def scores(self, name: str) -> list[float]:
        """The losses of a run over the whole validation split so far, the untrained model's first; infinite if not
        finite."""
        metrics = self.opened(name).metrics_file
        complete = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        losses = [json.loads(line)["val_loss"] for line in complete if '"val_loss"' in line]
        return [math.inf if loss is None else loss for loss in losses]

    def pause(self, name: str) -> float | None:
        """The median time for which evaluations of a run, without the first, kept training waiting; None if unknown."""
        found = [event["paused"] for event in self.opened(name).events() if event["event"] == "evaluate"][1:]
        return statistics.median(found) if found else None


def _children_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _corpus(corpus: str | None) -> list[str]:
    """The option that names a corpus, as an absolute path if it is a file."""
    return ["--corpus", os.path.abspath(corpus) if os.path.exists(corpus) else corpus] if corpus else []


def speedrun(
    corpus: str = "shakespeare",
    device: Device = "cpu",
    recipes: tuple[str, ...] = (),
    repeats: int = 5,
    seed: int = 1337,
    bound: float = 1.88,
    stop: bool = False,
    twin: bool = True,
    steps: int = 0,
    twin_steps: int = 0,
) -> Report:
    """Whole processes, from their start to a trained model, against the twin's.

    Args:
      corpus: the text: a file, or a named corpus
      device: where both sides compute
      recipes: of jaxgpt; the twin has nanoGPT's settings
      repeats: number of seeds, the same on both sides
      seed: the first seed
      bound: the loss to reach
      stop: end a run of jaxgpt at its first evaluation that reaches the bound, and count the seconds until then
      twin: run the twin, too
      steps: instead of the recipe's, for a quick test; 0 for the recipe's
      twin_steps: instead of nanoGPT's, for a quick test; 0 for nanoGPT's
    """
    recipes = recipes or tuple(name for name in DEFAULTS[device] if name in RECIPES)
    for name in recipes:
        recipe_of(name)
    if twin:
        require("torch")
    machine = facts(device)
    runs: dict[str, list[dict[str, Any]]] = {}
    names = ["torch"] * twin + [f"{name} {cache}" for name in recipes for cache in ("cold", "warm")]

    def run(name: str) -> float:
        """The seconds of the next seed of "torch", "RECIPE cold" or "RECIPE warm"."""
        turn = len(runs.setdefault(name, []))
        if name == "torch":
            done = run_twin(corpus, Place(Path(root) / f"torch-{turn}", device), seed + turn, twin_steps)
        else:
            cold, cache = name.replace(" warm", " cold"), name.split()[1]
            if cache == "warm" and len(runs.get(cold, [])) <= turn:
                raise contest.WorkerError("the cold run before it failed, and left no cache")
            place = Place(Path(root) / f"{name.split()[0]}-{turn}", device)
            done = run_ours(corpus, place, name.split()[0], cache, seed + turn, steps, bound if stop else None)
        runs[name].append(done)
        _log(f"{name}, seed {seed + turn}: {done['seconds']:.1f} s, loss {done['loss']:.4f}")
        return float(done["seconds"])

    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as root:
        times, failed = contest.alternate(names, repeats, run)
    shares = [done["others"] for each in runs.values() for done in each]
    theirs = times.get("torch", [])
    rows = [speedrun_row(name, found, theirs, runs[name], bound) for name, found in times.items()]
    notes = [*SPEEDRUN_NOTES, load.disturbance(shares)]
    end = f"a loss of {bound}" if stop else "process end"
    tables = [{"title": f"From process start to {end}, {repeats} seeds", "rows": rows}]
    return _report("speedrun", machine, tables, notes, failed) | {"runs": runs}


def run_ours(
    corpus: str, place: Place, name: str, cache: str, seed: int, steps: int, bound: float | None
) -> dict[str, Any]:
    """One `jaxgpt train`, to its end or until its loss reaches the bound. A cold run is the first in its place, and
    leaves its caches to the warm run after it."""
    words = [name, *_corpus(corpus), "--seed", str(seed), *(["--steps", str(steps)] if steps else [])]

    def over() -> bool:
        return min(place.scores(cache), default=math.inf) <= bound or bool(place.opened(cache).last_event("end"))

    seconds, others = place.train(cache, words, None if bound is None else over)
    losses, pause = place.scores(cache), place.pause(cache)
    if cache == "warm":
        shutil.rmtree(place.folder)
    loss = losses[-1] if bound is None else min(losses)
    return {"seed": seed, "seconds": seconds, "loss": loss, "pause": pause, "others": others}


def run_twin(corpus: str, place: Place, seed: int, steps: int) -> dict[str, Any]:
    """One run of the twin's program, which notes the time at which its weights are saved."""
    recipe, way = TWINS[place.device]
    place.folder.mkdir(parents=True)
    out = place.folder / "twin.json"
    words = ["scripts.benchmarks.twin", "--data", corpus, "--out", str(out), "--recipe", recipe, "--way", way]
    words += ["--device", "cuda" if place.device == "gpu" else "cpu", "--seed", str(seed), "--began", "{began}"]
    _, others = place.run(words + (["--steps", str(steps)] if steps else []))
    return json.loads(out.read_text()) | {"others": others}


def speedrun_row(
    name: str, seconds: list[float], theirs: list[float], runs: list[dict[str, Any]], bound: float
) -> dict[str, Any]:
    losses = [each["loss"] for each in runs]
    n, pauses = min(len(seconds), len(theirs)), [each["pause"] for each in runs if each.get("pause")]
    return {
        "run": name,
        "torch / this": timing.ratio(theirs[:n], seconds[:n]) if n else None,
        "seconds": timing.series(seconds),
        "within torch's time": all(a <= b for a, b in zip(seconds, theirs, strict=False)) if n else None,
        "mean loss": f"{sum(losses) / len(losses):.4f}",
        f"reached {bound}": f"{sum(loss <= bound for loss in losses)} of {len(losses)}",
        "losses": ", ".join(f"{loss:.4f}" for loss in losses),
        "pause, s": timing.series(pauses) if pauses else None,
    }


def startup(
    corpus: str = "", tokenizer: str = "", device: Device = "cpu", recipe: str = "gpt-demo", repeats: int = 5
) -> Report:
    """How long the help and the first training step take.

    Args:
      corpus: the text, instead of the recipe's
      tokenizer: instead of the recipe's; that of GPT-2 must be downloaded
      device: where to train
      recipe: any; shakespeare-cpu has the shape tiny
      repeats: processes of each kind
    """
    machine = facts(device)
    turns: dict[str, int] = {}
    shares: list[float] = []

    def run(name: str) -> float:
        turn = turns[name] = turns.get(name, -1) + 1
        place, cache = Place(Path(root) / str(turn), device), name.split()[-1]
        if name == "help":
            seconds, others = place.run(["jaxgpt", "--help"])
        else:
            metrics = place.opened(cache).metrics_file
            words = [recipe, *_corpus(corpus), "--scan-steps", "1", "--eval-every", "0", "--eval-batches", "0"]
            words += ["--tokenizer", tokenizer] if tokenizer else []
            seconds, others = place.train(
                cache, words, lambda: metrics.exists() and b'"grad_norm"' in metrics.read_bytes()
            )
        shares.append(others)
        _log(f"{name}: {seconds:.2f} s")
        return seconds

    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as root:
        names = ["help", "first step cold", "first step warm"]
        times, failed = contest.alternate(names, repeats, run)
    rows = [{"what": name, "seconds": timing.series(found)} for name, found in times.items()]
    notes = [*STARTUP_NOTES, f"recipe: {recipe}", load.disturbance(shares)]
    return _report("startup", machine, [{"title": "Seconds from process start", "rows": rows}], notes, failed)


def _report(mode: str, machine: dict[str, Any], tables: list[Any], notes: list[str], failed: dict[str, str]) -> Report:
    return {"mode": mode, "facts": machine, "tables": tables, "notes": notes, "failed": failed}


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
