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
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.profile.report import Report
from jaxgpt.profile.timing import ratio, series
from jaxgpt.recipes import recipe as recipe_of
from jaxgpt.run import Run
from scripts.benchmarks.contest import WorkerError, alternate, environment, failure, log
from scripts.benchmarks.machine import disturbance, facts, machine_seconds, others
from scripts.benchmarks.rates import require
from scripts.benchmarks.shapes import Device

DEFAULTS = {"cpu": "speedrun-cpu", "gpu": "shakespeare-gpu"}
TWINS = {"cpu": ("shakespeare-cpu", "float32", "cpu"), "gpu": ("shakespeare-gpu", "bfloat16+compile", "cuda")}
"""The recipe with nanoGPT's settings, the way of nanoGPT, and PyTorch's name of the device."""
CACHES = {"XDG_CACHE_HOME": "cache", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
SEED = 1337
COLD = "cold: with an empty compile cache. warm: the same command again, with the cache that the first left."
SPEEDRUN_NOTES = (
    "jaxgpt: from the start of a `jaxgpt train` process to its end. torch: from the start of the twin's process to its "
    "weights on disk, without any evaluation. Ratios are taken seed by seed; above 1 jaxgpt is faster.",
    "loss: over the whole validation split, in windows of the recipe's block_size. pause: how long an evaluation and "
    "the save before it keep training waiting, the median without the first, which compiles.",
    COLD,
)
STARTUP_NOTES = (
    "first step: until its line is in metrics.jsonl (with --scan-steps 1, when the second step runs). It includes "
    "imports, preparing the text, scoring the untrained model on the whole validation split, and compiling.",
    COLD,
)


def timed(
    words: Sequence[str], folder: Path, device: Device, until: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """Run `python -m WORDS`, with its caches in `folder`, to its end or, with `until`, until that holds: "seconds", and
    "others", the share of the machine that other programs took.

    Raises:
      WorkerError: it failed; with the last line that it printed.
    """
    env = environment(device) | {name: str(folder / below) for name, below in CACHES.items()}
    met, before, own, began = False, machine_seconds(), children_seconds(), time.monotonic()
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen([sys.executable, "-m", *words], env=env, stdout=output, stderr=output) as process,
    ):
        try:
            while until and not met and process.poll() is None:
                time.sleep(0.005)
                met = until()
            if not until:
                process.wait()
            seconds = time.monotonic() - began
            if met:
                process.terminate()
            process.wait()
        finally:
            process.kill()
        log(f"{' '.join(words[:3])}: {seconds:.2f} s")
        if not met and (until or process.returncode):
            raise WorkerError(f"{' '.join(words)}: {failure(process.returncode, output)}")
    return {"seconds": seconds, "others": others(before, children_seconds() - own)}


def children_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def train(run: Run, device: Device, words: Sequence[str], until: Callable[[], bool] | None = None) -> dict[str, Any]:
    """`jaxgpt train WORDS` as FOLDER/runs/NAME, with a corpora folder of its own, so that each prepares its text."""
    folder, name = run.path.parents[1], run.path.name
    folders = ["--runs-dir", str(run.path.parent), "--data-dir", str(folder / f"data-{name}")]
    return timed(["jaxgpt", "train", *words, "--run", name, *folders], folder, device, until)


def speedrun(
    corpus: str = "shakespeare",
    device: Device = "cpu",
    recipes: tuple[str, ...] = (),
    repeats: int = 5,
    bound: float = 1.88,
    stop: bool = False,
) -> Report:
    """Whole processes, from their start to a trained model, against the twin's.

    Args:
      corpus: the text: a file, or a named corpus
      device: where both sides compute
      recipes: of jaxgpt; the twin has nanoGPT's settings
      repeats: number of seeds, the same on both sides
      bound: the loss to reach
      stop: end a run at its first evaluation that reaches the bound, and count the seconds until then; without the
        twin, which evaluates at its end only
    """
    recipes = recipes or (DEFAULTS[device],)
    for name in recipes:
        recipe_of(name)
    if not stop:
        require("torch")
    report: Report = {"mode": "speedrun", "facts": facts(device)}
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    names = ["torch"] * (not stop) + [f"{name} {cache}" for name in recipes for cache in ("cold", "warm")]

    def run(name: str) -> float:
        """The seconds of the next seed of "torch", "RECIPE cold" or "RECIPE warm"."""
        side, _, cache = name.partition(" ")
        seed = SEED + len(runs[name])
        folder = Path(root, f"{side}-{seed}")
        if side == "torch":
            done = run_twin(corpus, folder, device, seed)
        elif cache == "warm" and len(runs[f"{side} cold"]) == len(runs[name]):
            raise WorkerError("the cold run before it failed, and left no cache")
        else:
            done = run_ours(corpus, Run(folder / "runs" / cache), device, side, seed, bound if stop else None)
        runs[name].append(done)
        log(f"{name}, seed {seed}: loss {done['loss']:.4f}")
        return float(done["seconds"])

    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as root:
        times, failed = alternate(names, repeats, run)
    rows = []
    for name, seconds in times.items():
        losses = [done["loss"] for done in runs[name]]
        pauses = [done["pause"] for done in runs[name] if done.get("pause")]
        rows.append(
            {
                "run": name,
                "torch / this": ratio(times["torch"], seconds) if "torch" in times else None,
                "seconds": series(seconds),
                "mean loss": f"{statistics.mean(losses):.4f}",
                f"reached {bound}": f"{sum(loss <= bound for loss in losses)} of {repeats}",
                "losses": ", ".join(f"{loss:.4f}" for loss in losses),
                "pause, s": series(pauses) if pauses else None,
            }
        )
    end = f"a loss of {bound}" if stop else "process end"
    notes = [*SPEEDRUN_NOTES, disturbance([done["others"] for each in runs.values() for done in each])]
    tables = [{"title": f"From process start to {end}, {repeats} seeds", "rows": rows}]
    return report | {"tables": tables, "notes": notes, "failed": failed, "runs": runs}


def run_ours(corpus: str, run: Run, device: Device, recipe: str, seed: int, bound: float | None) -> dict[str, Any]:
    """One `jaxgpt train`, to its end or until its loss reaches the bound. A cold run is the first in its folder, and
    leaves its caches to the warm run after it."""

    def over(bound: float) -> bool:
        return min(run.val_losses().values(), default=math.inf) <= bound or bool(run.last_event("end"))

    words = [recipe, "--corpus", corpus, "--seed", str(seed)]
    done = train(run, device, words, None if bound is None else partial(over, bound))
    losses = [line["val_loss"] for line in run.metrics() if "val_loss" in line]
    losses = [math.inf if loss is None else loss for loss in losses]
    pauses = [event["paused"] for event in run.events() if event["event"] == "evaluate"][1:]
    if run.path.name == "warm":
        shutil.rmtree(run.path.parents[1])
    loss = losses[-1] if bound is None else min(losses)
    return {"seed": seed, "loss": loss, "pause": statistics.median(pauses) if pauses else None} | done


def run_twin(corpus: str, folder: Path, device: Device, seed: int) -> dict[str, Any]:
    """One run of the twin's program, which notes the time at which its weights are saved."""
    folder.mkdir()
    out, (recipe, way, place) = folder / "twin.json", TWINS[device]
    words = ["scripts.benchmarks.twin", "--data", corpus, "--out", str(out), "--recipe", recipe, "--way", way]
    words += ["--device", place, "--seed", str(seed), "--began", repr(time.monotonic())]
    return timed(words, folder, device) | json.loads(out.read_text())


def startup(tokenizer: str = "", device: Device = "cpu", recipe: str = "gpt-demo", repeats: int = 5) -> Report:
    """How long the help and the first training step take.

    Args:
      tokenizer: instead of the recipe's; that of GPT-2 must be downloaded
      device: where to train
      recipe: any; shakespeare-cpu has the shape tiny
      repeats: processes of each kind
    """
    report: Report = {"mode": "startup", "facts": facts(device)}
    turns: dict[str, int] = defaultdict(int)

    def run(name: str) -> dict[str, Any]:
        folder = Path(root, str(turns[name]))
        turns[name] += 1
        if name == "help":
            return timed(["jaxgpt", "--help"], folder, device)
        words = [recipe, "--scan-steps", "1", "--eval-every", "0", "--eval-batches", "0"]
        words += ["--tokenizer", tokenizer] if tokenizer else []
        run = Run(folder / "runs" / name.split()[-1])
        file = run.metrics_file
        return train(run, device, words, lambda: file.exists() and b'"grad_norm"' in file.read_bytes())

    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as root:
        runs, failed = alternate(["help", "first step cold", "first step warm"], repeats, run)
    rows = [{"what": name, "seconds": series([done["seconds"] for done in each])} for name, each in runs.items()]
    notes = [
        *STARTUP_NOTES,
        f"recipe: {recipe}",
        disturbance([done["others"] for each in runs.values() for done in each]),
    ]
    tables = [{"title": "Seconds from process start", "rows": rows}]
    return report | {"tables": tables, "notes": notes, "failed": failed}
