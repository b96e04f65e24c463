"""Check that a run which is killed and resumed equals one that is not, with processes that are really killed."""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.cli.runs import start
from jaxgpt.config import Config, UsageError, check, replaced
from jaxgpt.run import Run
from jaxgpt.sharding import one_device
from jaxgpt.step import abstract_state


class Kill(NamedTuple):
    """A SIGKILL of a training process."""

    at: int  # the last step in metrics.jsonl
    back_to: int  # the checkpoint that the next process resumes from; 0 if there is none

    @property
    def counts(self) -> bool:
        """Whether there is a checkpoint to resume from, and steps after it to compute again."""
        return 0 < self.back_to < self.at


class Verdict(NamedTuple):
    """The comparison of the two runs."""

    kills: list[Kill]  # those that count
    lines: int  # of metrics.jsonl in each run
    checkpoints: int  # steps saved in both runs, whose arrays were compared
    arrays: int
    difference: str | None  # the first; None if every bit is equal


def scaled_down(config: Config) -> Config:
    """The first six scans of `config` on its whole schedule, saved and evaluated after every second one: a kill counts
    only between a line of metrics and the next checkpoint."""
    end = config.optimizer.decay_steps or config.train.steps
    scan = max(1, min(config.train.scan_steps, config.train.steps // 6))
    return replaced(config, decay_steps=end, steps=6 * scan, scan_steps=scan, eval_every=2 * scan)


def verify_resume(
    config: Config, folder: Path, data_dir: Path, kills: int, seed: int, report: Callable[[str], None]
) -> Verdict:
    """Train `config` in one process, and again in processes that are killed `kills` times and resumed; compare.

    A kill after which no step is computed again does not count and is repeated. If the run ends first, the verdict
    has fewer than `kills`.

    Args:
      folder: for the two runs, "straight" and "killed".
      seed: of the random steps at which processes are killed.
      report: called with a line of text after each event.

    Raises:
      UsageError: the config cannot run, or has no checkpoint before its last step.
      RuntimeError: a process failed by itself.
    """
    steps, every = check(config).train.steps, config.train.eval_every
    if not 0 < every < steps:
        raise UsageError(
            f"eval_every is {every}, expected 1 to {steps - 1}, below the {steps} steps: without an earlier "
            "checkpoint, a killed run starts again from step 0 and nothing is resumed"
        )
    straight, killed = (start(config, name, folder, data_dir)[0] for name in ("straight", "killed"))
    with train(straight, data_dir) as process:
        wait_for(1, straight, process, 1)
        began = time.perf_counter()
        wait_for(steps, straight, process, 1)
        chunk_seconds = (time.perf_counter() - began) * config.train.scan_steps / steps
        process.wait()
    report(f"straight: {steps:,} steps")
    dice, died = random.Random(seed), list[Kill]()
    targets = sorted(dice.choices(range(every + 1, steps + 1), k=kills))
    while (counted := sum(kill.counts for kill in died)) < kills and len(died) < 5 * kills:
        with train(killed, data_dir) as process:
            wait_for(targets[counted], killed, process, len(died) + 1)
            time.sleep(dice.uniform(0, min(1.0, chunk_seconds)))
            process.kill()
            process.wait()
        if process.returncode == 0:  # it ended before the kill
            break
        died.append(kill := Kill(max(0, last_step(killed)), Checkpoints(killed.checkpoints).latest or 0))
        report(
            f"killed at step {kill.at:,}; back to step {kill.back_to:,}"
            + ("" if kill.counts else ": no step is computed again, this one does not count")
        )
    with train(killed, data_dir) as process:
        process.wait()
    resumed = zip(died, starts(killed)[1:], strict=False)  # the step that the run itself recorded
    proven = [kill for was, step in resumed if (kill := was._replace(back_to=step)).counts]
    return compare(straight, killed, proven)


def wait_for(step: int, run: Run, process: "subprocess.Popen[bytes]", number: int) -> None:
    """Wait until `process`, the `number`-th to train `run`, has recorded a step of its own and `step` is reached; or
    until it ends."""
    before = written(run)
    while process.poll() is None:
        began = starts(run)
        # Lines after the checkpoint of a killed process remain until the next process removes them.
        if len(began) == number and written(run) != before and last_step(run) >= max(step, began[-1] + 1):
            return
        time.sleep(0.01)


def starts(run: Run) -> list[int]:
    """The step at which each process that trained `run` began."""
    return [event["step"] for event in run.events() if event["event"] == "start"]


def written(run: Run) -> int:
    """The modification time of metrics.jsonl in ns; 0 if there is none."""
    return run.metrics_file.stat().st_mtime_ns if run.metrics_file.exists() else 0


@contextmanager
def train(run: Run, data_dir: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that resumes `run`; it is killed at the end of the block.

    Raises:
      RuntimeError: it failed by itself; with its output.
    """
    words = ["-m", "jaxgpt", "train", "--run", run.path.name, "--resume", "--runs-dir", str(run.path.parent)]
    command = [sys.executable, *words, "--data-dir", str(data_dir)]
    with tempfile.TemporaryFile() as output:  # not a pipe, which would fill up
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
        if process.returncode > 0:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise RuntimeError(f"jaxgpt train failed with exit code {process.returncode}:\n{text}")


def last_step(run: Run) -> int:
    """The step of the last whole line of metrics.jsonl; -1 if there is none."""
    lines = run.metrics() if run.metrics_file.exists() else []
    return lines[-1]["step"] if lines else -1


def compare(a: Run, b: Run, kills: list[Kill] | None = None) -> Verdict:
    """Compare the metrics of two runs of one config, line by line, and their checkpoints, bit by bit."""
    steps = sorted(set(Checkpoints(a.checkpoints).steps) & set(Checkpoints(b.checkpoints).steps))
    lines = a.metrics_file.read_bytes().splitlines(), b.metrics_file.read_bytes().splitlines()
    like = abstract_state(a.config, one_device())
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
