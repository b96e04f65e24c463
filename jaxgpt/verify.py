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

from jaxgpt.config import Config, check
from jaxgpt.training.checkpoint import Checkpoints, abstract
from jaxgpt.training.run import Run
from jaxgpt.training.start import start
from jaxgpt.training.step import init_state


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of the broken run."""

    at: int
    """The last step that had been written to metrics.jsonl."""
    back_to: int
    """The newest step that was saved: where the next process goes on."""
    saving: bool
    """Whether a save was under way."""


@dataclass(frozen=True)
class Verdict:
    """What came of it."""

    kills: list[Kill]
    lines: int
    """Of metrics.jsonl in each run."""
    checkpoints: int
    """Steps saved in both runs, each of whose arrays was compared."""
    arrays: int
    difference: str | None
    """The first thing that differs, None if every bit is the same."""


def scaled_down(config: Config, steps: int, every: int) -> Config:
    """The first `steps` steps of `config`, saved and scored each `every`, on the schedule of the whole."""
    end = config.optimizer.decay_steps or config.train.steps
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, decay_steps=end),
        train=dataclasses.replace(config.train, steps=steps, eval_every=every),
    )


def verify_resume(
    config: Config, folder: Path, data_dir: Path, kills: int, seed: int, tell: Callable[[str], None]
) -> Verdict:
    """Train `config` in one process, then again in one that is killed at `kills` random moments and resumed; compare.

    Args:
      folder: where the two runs are made, "straight" and "killed".
      seed: of the moments.

    Raises:
      UsageError: the config cannot run.
      RuntimeError: a process failed by itself.
    """
    check(config)
    straight, killed = (start(config, name, folder, data_dir)[0] for name in ("straight", "killed"))
    began = time.perf_counter()
    with train(straight, data_dir) as process:
        process.wait()
    chunk_seconds = (time.perf_counter() - began) * config.train.scan_steps / config.train.steps
    tell(f"straight: {config.train.steps:,} steps")
    dice, done = random.Random(seed), list[Kill]()
    for target in sorted(dice.sample(range(config.train.steps), min(kills, config.train.steps))):
        with train(killed, data_dir) as process:
            while process.poll() is None and last_step(killed) < target:
                time.sleep(0.01)
            time.sleep(dice.uniform(0, min(1.0, chunk_seconds)))
            process.kill()
            process.wait()
        if process.returncode == 0:  # it was done before
            break
        done.append(state_of(killed))
        tell(f"killed at step {done[-1].at:,}{', in a save' * done[-1].saving}; back to step {done[-1].back_to:,}")
    with train(killed, data_dir) as process:
        process.wait()
    return compare(straight, killed, done)


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
