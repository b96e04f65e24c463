"""What a run writes down and tells while it trains: every step's numbers, evaluations, speed."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.training.evaluate import Evaluation
from jaxgpt.training.run import Run, RunError
from jaxgpt.training.step import Metrics


@dataclass(frozen=True)
class Evaluated:
    """The whole validation split was scored after `step` steps."""

    step: int
    evaluation: Evaluation


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` are done."""

    step: int
    steps: int
    loss: float
    """The last step's, in nats per token."""
    tokens_per_second: float | None
    """Over the last chunk; None for the first one, whose time is mostly compilation."""
    seconds_left: float | None
    """Of training, at that speed."""


Event = Evaluated | Progress


class DivergedError(RuntimeError):
    """A loss or a gradient is no longer a number."""


class Journal:
    """metrics.jsonl of a run, continued behind the lines of `step`, and the events that `watch` is told.

    metrics.jsonl holds no time, so runs of one config are equal byte for byte. Numbers of a chunk are read when the
    next chunk has been dispatched: the device never waits for the disk. `sync` goes before every save, so the lines
    up to a checkpoint are never lost, and lines beyond it are dropped here and written again by the resumed run.
    """

    def __init__(self, run: Run, step: int, watch: Callable[[Event], None]):
        self._config, self._watch = run.config, watch
        self._unread: tuple[int, Metrics] | None = None
        self._mark: float | None = None
        self._tokens = self._seconds = 0.0
        lines = _lines_up_to(run.metrics_file, step)
        reached = json.loads(lines[-1])["step"] if lines else 0
        if reached != step:
            raise RunError(
                f"{run.metrics_file} ends at step {reached}, but step {step} is saved in {run.checkpoints}: "
                "put the file back as it was, or start a new run"
            )
        _replace_lines(run.metrics_file, lines)
        self._file = run.metrics_file.open("a", encoding="utf-8")
        self.scores = [evaluated for line in lines if (evaluated := _evaluated(json.loads(line)))]

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def trained(self, begin: int, metrics: Metrics) -> None:
        """Note the steps from `begin` on, whose `metrics` (each (K,)) the device may still be working on."""
        self.flush()
        self._unread = begin, metrics

    def evaluated(self, step: int, evaluation: Evaluation, estimates: dict[str, float]) -> None:
        """Write an evaluation after `step` steps, all of them flushed, and nanoGPT-style estimates beside it."""
        values = {f"val_{name}": value for name, value in dataclasses.asdict(evaluation).items()}
        self._write(step=step, **values, **estimates)
        self.scores.append(Evaluated(step, evaluation))
        self._watch(self.scores[-1])
        self._mark = time.perf_counter()  # evaluating is not training

    def flush(self) -> None:
        """Write the steps noted by `trained`, waiting for the device if need be.

        Raises:
          DivergedError: one of them came to no number; it goes before every save, so no such state is ever saved.
        """
        if self._unread is None:
            return
        (begin, metrics), self._unread = self._unread, None
        metrics = jax.device_get(metrics)
        for i in range(len(metrics.loss)):
            self._write(step=begin + i + 1, **{name: _shortest(x[i]) for name, x in metrics._asdict().items()})
        finite = np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm)
        if not finite.all():
            self._file.flush()
            i = int(finite.argmin())
            raise DivergedError(
                f"step {begin + i + 1}: loss {metrics.loss[i]}, gradient norm {metrics.grad_norm[i]}; the run ends at "
                "its last save. Start another with a smaller --learning-rate or --grad-clip"
            )
        self._watch(self._progress(begin, metrics))

    def sync(self) -> None:
        """Return once every line so far is on disk."""
        self.flush()
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def tokens_per_second(self) -> float | None:
        """Of training, compilation, evaluation and saving apart; None before the second chunk."""
        return self._tokens / self._seconds if self._seconds else None

    def _progress(self, begin: int, metrics: Metrics) -> Progress:
        train = self._config.train
        now, last, steps = time.perf_counter(), self._mark, len(metrics.loss)
        speed = left = None
        if last is not None:
            step_tokens = train.batch_size * self._config.model.block_size
            self._tokens, self._seconds = self._tokens + steps * step_tokens, self._seconds + now - last
            speed = steps * step_tokens / (now - last)
            left = (train.steps - begin - steps) * step_tokens / speed
        self._mark = now
        return Progress(begin + steps, train.steps, float(metrics.loss[-1]), speed, left)

    def _write(self, **values: Any) -> None:
        """One line of JSON, which has no word for nan or infinity: null stands for both."""
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        self._file.write(json.dumps(finite) + "\n")


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of a metrics file up to `step`; a line torn by a kill is beyond the last save."""
    lines: list[str] = []
    if path.exists():
        for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), 1):
            try:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{path}, line {number} is no line of metrics: {line.strip()[:60]!r}") from error
            lines.append(line)
    return lines


def _replace_lines(path: Path, lines: list[str]) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text("".join(lines), "utf-8")
    partial.replace(path)


def _evaluated(line: dict[str, Any]) -> Evaluated | None:
    """The evaluation that a line of metrics.jsonl holds, if it does."""
    if "val_loss" not in line:
        return None
    names = [field.name for field in dataclasses.fields(Evaluation)]
    values: dict[str, Any] = {name: math.nan if line[f"val_{name}"] is None else line[f"val_{name}"] for name in names}
    return Evaluated(line["step"], Evaluation(**values))


def _shortest(x: Any) -> float:
    """A float32 as the shortest decimal that gives it back."""
    return float(str(x))
