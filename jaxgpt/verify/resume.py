"""Proof that a run which is killed and resumed is the run that was not: with processes that really die."""

import dataclasses
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.checkpoint import Checkpoints, abstract
from jaxgpt.cli.runs import start
from jaxgpt.config import Config, UsageError, check, replaced
from jaxgpt.run import Run
from jaxgpt.step import init_state


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of a process that trained."""

    at: int
    """The last step that this process had written to metrics.jsonl."""
    back_to: int
    """The step of the checkpoint that the next process resumes from; 0 if there is none."""
    saving: bool
    """Whether a save was under way."""

    @property
    def counts(self) -> bool:
        """Whether there was something to prove: a checkpoint to resume from, and steps beyond it to compute again."""
        return 0 < self.back_to < self.at


@dataclass(frozen=True)
class Verdict:
    """How the two runs compare."""

    kills: list[Kill]
    """Those that count."""
    lines: int
    """Of metrics.jsonl in each run."""
    checkpoints: int
    """Steps saved in both runs, each of whose arrays was compared."""
    arrays: int
    difference: str | None
    """The first thing that differs, None if every bit is the same."""


def scaled_down(config: Config) -> Config:
    """The first six scans of `config`, saved and scored after every second one, on the schedule of the whole.

    A kill counts only between a line of metrics and the checkpoint that covers it, so not every scan is saved.
    """
    end = config.optimizer.decay_steps or config.train.steps
    scan = max(1, min(config.train.scan_steps, config.train.steps // 6))
    return replaced(config, decay_steps=end, steps=6 * scan, scan_steps=scan, eval_every=2 * scan)


def verify_resume(
    config: Config, folder: Path, data_dir: Path, kills: int, seed: int, tell: Callable[[str], None]
) -> Verdict:
    """Train `config` in one process, then again in one that is killed at `kills` random moments and resumed; compare.

    A kill after which no step is computed again is repeated. If the run ends first, the verdict holds fewer than
    `kills`.

    Args:
      folder: where the two runs are made, "straight" and "killed".
      seed: of the moments.

    Raises:
      UsageError: the config cannot run, or has no checkpoint before its last step.
      RuntimeError: a process failed by itself.
    """
    steps, every = check(config).train.steps, config.train.eval_every
    if not 0 < every < steps:
        raise UsageError(
            f"eval_every is {every}, expected 1 to {steps - 1}, below the {steps} steps: without a checkpoint on the "
            "way, a killed run starts again from step 0 and a resume is never tested"
        )
    straight, killed = (start(config, name, folder, data_dir)[0] for name in ("straight", "killed"))
    with train(straight, data_dir) as process:
        wait_for(1, straight, process, 1)
        began = time.perf_counter()
        wait_for(steps, straight, process, 1)
        chunk_seconds = (time.perf_counter() - began) * config.train.scan_steps / steps
        process.wait()
    tell(f"straight: {steps:,} steps")
    dice, died = random.Random(seed), list[Kill]()
    targets = sorted(dice.choices(range(every + 1, steps + 1), k=kills))
    while (counted := sum(kill.counts for kill in died)) < kills and len(died) < 5 * kills:
        with train(killed, data_dir) as process:
            wait_for(targets[counted], killed, process, len(died) + 1)
            time.sleep(dice.uniform(0, min(1.0, chunk_seconds)))
            process.kill()
            process.wait()
        if process.returncode == 0:  # it was done before
            break
        died.append(kill := state_of(killed))
        tell(
            f"killed at step {kill.at:,}{', in a save' * kill.saving}; back to step {kill.back_to:,}"
            + ("" if kill.counts else ": no step is computed again, this one does not count")
        )
    with train(killed, data_dir) as process:
        process.wait()
    resumed = zip(died, starts(killed)[1:], strict=False)  # what the run itself recorded has the last word
    proven = [kill for was, step in resumed if (kill := dataclasses.replace(was, back_to=step)).counts]
    return compare(straight, killed, proven)


def wait_for(step: int, run: Run, process: "subprocess.Popen[bytes]", number: int) -> None:
    """Wait until `process`, the `number`-th to train `run`, has computed and recorded a step, and `step` is reached; or
    until it ends."""
    before = written(run)
    while process.poll() is None:
        began = starts(run)
        # The lines that a killed process left beyond its checkpoint stand there until the next one has dropped them.
        if len(began) == number and written(run) != before and last_step(run) >= max(step, began[-1] + 1):
            return
        time.sleep(0.01)


def starts(run: Run) -> list[int]:
    """The step that each process which trained `run` began at."""
    return [event["step"] for event in run.events() if event["event"] == "start"]


def written(run: Run) -> int:
    """When metrics.jsonl was last changed, in ns; 0 before there is one."""
    return run.metrics_file.stat().st_mtime_ns if run.metrics_file.exists() else 0


@contextmanager
def train(run: Run, data_dir: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that trains `run` from its newest step to its end; it does not outlive the block.

    Raises:
      RuntimeError: it failed by itself; with what it printed.
    """
    words = ["-m", "jaxgpt", "train", "--run", run.path.name, "--resume", "--runs-dir", str(run.path.parent)]
    command = [sys.executable, *words, "--data-dir", str(data_dir)]
    with tempfile.TemporaryFile() as said:  # not a pipe, which would fill up unread
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
        if process.returncode > 0:
            said.seek(0)
            out = said.read().decode(errors="replace")
            raise RuntimeError(f"jaxgpt train ended with {process.returncode} by itself:\n{out}")


def last_step(run: Run) -> int:
    """The step of the last whole line of metrics.jsonl, -1 before the first."""
    lines = run.metrics() if run.metrics_file.exists() else []
    return lines[-1]["step"] if lines else -1


def state_of(run: Run) -> Kill:
    """How a kill left `run`."""
    saving = any(run.checkpoints.glob(".*.part*"))
    return Kill(max(0, last_step(run)), Checkpoints(run.checkpoints).latest or 0, saving)


def compare(a: Run, b: Run, kills: list[Kill] | None = None) -> Verdict:
    """Whether two runs of one config hold the same lines and, at each step that both have saved, the same bits."""
    steps = sorted(set(Checkpoints(a.checkpoints).steps) & set(Checkpoints(b.checkpoints).steps))
    lines = a.metrics_file.read_bytes().splitlines(), b.metrics_file.read_bytes().splitlines()
    like = abstract(jax.eval_shape(init_state, a.config))
    difference = next(_differences(a, b, lines, steps, like), None)
    return Verdict(kills or [], len(lines[0]), len(steps), len(jax.tree.leaves(like)), difference)


def _differences(a: Run, b: Run, lines: tuple[list[bytes], list[bytes]], steps: list[int], like: Any) -> Iterator[str]:
    names = a.path.name, b.path.name
    for number, (line, other_line) in enumerate(zip_longest(*lines, fillvalue=b"nothing"), 1):
        if line != other_line:
            yield f"metrics.jsonl, line {number}: {line.decode()} in {names[0]}, {other_line.decode()} in {names[1]}"
    trained = [line["step"] for line in a.metrics() if "loss" in line]
    if trained != list(range(1, a.config.train.steps + 1)):
        yield f"metrics.jsonl does not hold each step from 1 to {a.config.train.steps} once"
    if not steps or steps[-1] != a.config.train.steps:
        yield f"step {a.config.train.steps} is not saved in both runs"
    for step in steps:
        state, other = (Checkpoints(run.checkpoints).restore(step, like) for run in (a, b))
        pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True)
        for (path, x), y in pairs:
            x, y = np.asarray(x), np.asarray(y)
            if x.tobytes() != y.tobytes():
                places = [i for i in np.ndindex(x.shape) if x[i].tobytes() != y[i].tobytes()]
                leaf, i = jax.tree_util.keystr(path, simple=True, separator="/"), places[0]
                yield (
                    f"step {step}, {leaf}{list(i)}: {x[i]} in {names[0]}, {y[i]} in {names[1]}; "
                    f"{len(places)} of its {x.size} numbers differ"
                )
