"""Check that a run that is killed and resumed equals one that is not, with real processes and SIGKILL."""

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
from jaxgpt.cli.runs import start_run
from jaxgpt.config import Config, UsageError, check, replaced
from jaxgpt.run import Run
from jaxgpt.sharding import one_device
from jaxgpt.step import abstract_state


class Verdict(NamedTuple):
    """The comparison of two runs."""

    lines: int  # of metrics.jsonl in each run
    checkpoints: int  # steps saved in both runs, whose arrays were compared
    arrays: int  # in each checkpoint
    difference: str | None  # the first; None if every bit is equal
    kills: int = 0  # that count


def counts(killed_at: int, resumed_at: int) -> bool:
    """Whether a kill tests anything: the next process resumed from a checkpoint and computed steps again."""
    return 0 < resumed_at < killed_at


def scaled_down(config: Config) -> Config:
    """The first six scans of `config` under its full schedule, with a checkpoint after every second one: a kill counts
    only if metrics were written after the last checkpoint."""
    end = config.optimizer.decay_steps or config.train.steps
    scan = max(1, min(config.train.scan_steps, config.train.steps // 6))
    return replaced(config, decay_steps=end, steps=6 * scan, scan_steps=scan, eval_every=2 * scan)


def kill_steps(config: Config) -> range:
    """The steps to kill after: those beyond the first save but not in the last scan, whose save could finish before the
    kill; if there are none, all beyond the first save."""
    steps, K, every = config.train.steps, config.train.scan_steps, config.train.eval_every
    last = (steps - 1) // K * K
    return range(every + 1, (last if last > every else steps) + 1)


def verify_resume(
    config: Config, folder: Path, data_dir: Path, kills: int, seed: int, report: Callable[[str], None]
) -> Verdict:
    """Train `config` in one process, and again in processes that are killed `kills` times and resumed; compare.

    A kill after which no step is computed again does not count and is repeated. If the run ends first, the verdict
    has fewer than `kills`.

    Args:
      folder: holds the two runs, "straight" and "killed".
      seed: fixes the random steps at which processes are killed.
      report: called with a line of text after each event.

    Raises:
      UsageError: the config cannot run, or has no checkpoint before its last step.
      RuntimeError: a training process failed.
    """
    steps, every = check(config).train.steps, config.train.eval_every
    if not 0 < every < steps:
        raise UsageError(
            f"eval_every is {every}, expected 1 or more, and fewer than --steps ({steps}): without an earlier "
            "checkpoint, a killed run starts again from step 0 and nothing is resumed; give more --steps, or smaller "
            "--scan-steps and --eval-every"
        )
    straight, killed = (start_run(config, name, folder, data_dir)[0] for name in ("straight", "killed"))
    with train(straight, data_dir) as process:
        wait_for(1, straight, process, 1)
        began = time.perf_counter()
        wait_for(steps, straight, process, 1)
        chunk_seconds = (time.perf_counter() - began) * config.train.scan_steps / steps
        process.wait()
    report(f"straight: {steps:,} steps")
    rng, killed_at, counted = random.Random(seed), list[int](), 0
    targets = sorted(rng.choices(kill_steps(config), k=kills))
    while counted < kills and len(killed_at) < 5 * kills:
        with train(killed, data_dir) as process:
            wait_for(targets[counted], killed, process, len(killed_at) + 1)
            time.sleep(rng.uniform(0, min(1.0, chunk_seconds)))
        if process.returncode == 0:  # the run ended before the kill
            break
        at, saved = last_step(killed), Checkpoints(killed.checkpoints).latest or 0
        killed_at.append(at)
        counted += counts(at, saved)
        ignored = "" if counts(at, saved) else ": no step is computed again, so this kill does not count"
        report(f"killed at step {at:,}; back to step {saved:,}{ignored}")
    with train(killed, data_dir) as process:
        process.wait()
    resumed_at = starts(killed)[1:]  # as the run recorded it
    proven = sum(map(counts, killed_at, resumed_at))
    return compare(straight, killed)._replace(kills=proven)


def wait_for(step: int, run: Run, process: "subprocess.Popen[bytes]", number: int) -> None:
    """Wait until `process`, the `number`-th to train `run`, has reached `step` and recorded a step of its own, or has
    ended."""
    before = written(run)
    while process.poll() is None:
        began = starts(run)
        # What a killed process wrote after its last checkpoint remains until the next process removes it.
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
      RuntimeError: it failed, or a signal from elsewhere ended it, with its output.
    """
    command = [sys.executable, "-m", "jaxgpt", "train", "--run", run.path.name, "--resume"]
    command += ["--runs-dir", str(run.path.parent), "--data-dir", str(data_dir)]
    with tempfile.TemporaryFile() as output:  # not a pipe, which would fill up
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            failed = process.poll()
            process.kill()
            process.wait()
        if failed:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise RuntimeError(f"jaxgpt train failed with exit code {process.returncode}:\n{text}")


def last_step(run: Run) -> int:
    """The step of the last whole line of metrics.jsonl; 0 if there is none."""
    return max((line["step"] for line in run.metrics()), default=0)


def compare(a: Run, b: Run) -> Verdict:
    """Compare the metrics of two runs of one config, line by line, and their checkpoints, bit by bit."""
    steps = sorted(set(Checkpoints(a.checkpoints).steps) & set(Checkpoints(b.checkpoints).steps))
    like = abstract_state(a.config, one_device())
    n_lines = len(a.metrics_file.read_bytes().splitlines())
    return Verdict(n_lines, len(steps), len(jax.tree.leaves(like)), next(_differences(a, b, steps, like), None))


def _differences(a: Run, b: Run, steps: list[int], like: Any) -> Iterator[str]:
    names = a.path.name, b.path.name
    lines = (run.metrics_file.read_bytes().splitlines() for run in (a, b))
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
        for (path, x), y in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            if x.tobytes() != y.tobytes():
                differing = [i for i in np.ndindex(x.shape) if x[i].tobytes() != y[i].tobytes()]
                leaf, i = jax.tree_util.keystr(path, simple=True, separator="/"), differing[0]
                yield (
                    f"step {step}, {leaf}{list(i)}: {x[i]} in {names[0]}, {y[i]} in {names[1]}; "
                    f"{len(differing)} of its {x.size} numbers differ"
                )
