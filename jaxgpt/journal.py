"""What a run writes down and tells while it trains: every step's numbers, evaluations, speed, what went wrong."""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxgpt import files as disk
from jaxgpt import processes
from jaxgpt.data import Starts
from jaxgpt.evaluation import Evaluation
from jaxgpt.run import Run
from jaxgpt.spikes import Spikes
from jaxgpt.step import Metrics


@dataclass(frozen=True)
class Evaluated:
    """The whole validation split was scored after `step` steps."""

    step: int
    evaluation: Evaluation

    @property
    def rank(self) -> tuple[bool, float]:
        """Least for the best: by loss, and one that is no number comes last."""
        return math.isnan(self.evaluation.loss), self.evaluation.loss


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
    grad_norm: float = math.nan
    """The last step's, before clipping."""
    learning_rate: float = math.nan
    """The last step's."""
    best: Evaluated | None = None
    """The best evaluation so far, those from before a resume among them."""


@dataclass(frozen=True)
class Notice:
    """Something that a person should know; it stands in events.jsonl too."""

    kind: str
    """skip, spike, save-failed, damage or version."""
    step: int
    text: str


@dataclass(frozen=True)
class Sampled:
    """What the model wrote after `step` steps; told to whoever asked for it, and written down nowhere."""

    step: int
    text: str


Event = Evaluated | Progress | Notice | Sampled


class DivergedError(RuntimeError):
    """Too many steps in a row came to no number."""


def notify(run: Run, watch: Callable[[Event], None], kind: str, step: int, text: str) -> None:
    """Put something that a person should know into the diary, and before whoever watches."""
    run.event(kind, step=step, text=text)
    watch(Notice(kind, step, text))


class Journal:
    """metrics.jsonl of a run, continued behind its first `n_bytes`, and the events that `watch` is told.

    metrics.jsonl holds no time, so runs of one config are equal byte for byte. Numbers of a chunk are read when the
    next chunk has been dispatched: the device never waits for the disk. `sync` goes before every save, so the lines
    up to a checkpoint are never lost, and what is beyond it is dropped here and written again by the resumed run.
    What a full disk does not take is kept here, and offered again with the next lines. Of several processes all keep
    the journal, and the first writes it down.

    Args:
      window_starts: step (0-based) to the starts (B,) of its windows, to be written down where it was left out.
    """

    def __init__(self, run: Run, n_bytes: int, window_starts: Callable[[int], Starts], watch: Callable[[Event], None]):
        self._config, self._watch, self._window_starts = run.config, watch, window_starts
        self.notice = partial(notify, run, watch)
        self._unread: tuple[int, Metrics] | None = None
        self._mark: float | None = None
        self.spent = 0, 0.0
        """Tokens and seconds of training in this process, compilation, evaluation and saving apart."""
        self.step = 0
        """Of the last line."""
        self._spikes, self._skipped, self.scores = Spikes(), 0, list[Evaluated]()
        if processes.first():
            self._file = run.metrics_file.open("ab+", buffering=0)
        else:
            self._file = tempfile.TemporaryFile("wb+", buffering=0)  # noqa: SIM115 (closed in __exit__)
            self._file.write(run.metrics_file.read_bytes() if n_bytes else b"")
        self._file.seek(0)
        kept = self._file.read(n_bytes)
        self._file.truncate(n_bytes)
        disk.sync(run.path)  # a new file's name must last, too
        self._unwritten, self._n_bytes, self._hash = b"", n_bytes, hashlib.sha256(kept)
        for line in map(json.loads, kept.splitlines()):
            self._remember(line)

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
        self._watch(self.scores[-1])
        self.rested()

    def sampled(self, step: int, text: str) -> None:
        """Tell what was written after `step` steps."""
        self._watch(Sampled(step, text))
        self.rested()

    def rested(self) -> None:
        """Leave the time since the last chunk out of the speed: what filled it is not training."""
        if self._mark is not None:  # else the first chunk is to come, with what is left of its compilation
            self._mark = time.perf_counter()

    def flush(self) -> None:
        """Write the steps noted by `trained`, waiting for the device if need be.

        Raises:
          DivergedError: with them, max_skipped steps in a row came to no number.
        """
        if self._unread is None:
            return
        (begin, metrics), self._unread = self._unread, None
        metrics = jax.device_get(metrics)
        for i in range(len(metrics.loss)):
            self._trained(begin + i + 1, *(x[i] for x in metrics))
        self._drain()
        self._watch(self._progress(begin, metrics))

    def sync(self) -> None:
        """Return once every line so far is on disk.

        Raises:
          OSError: the disk does not take them.
          DivergedError: as `flush`.
        """
        self.flush()
        if error := self._drain():
            raise error
        os.fsync(self._file.fileno())

    @property
    def position(self) -> tuple[int, str]:
        """Length in bytes and SHA-256 of all that was written."""
        return self._n_bytes, self._hash.hexdigest()

    @property
    def tokens_per_second(self) -> float | None:
        """What `spent` comes to; None before the second chunk."""
        tokens, seconds = self.spent
        return tokens / seconds if seconds else None

    def _progress(self, begin: int, metrics: Metrics) -> Progress:
        train = self._config.train
        now, last, steps = time.perf_counter(), self._mark, len(metrics.loss)
        speed = left = None
        if last is not None:
            step_tokens = train.batch_size * self._config.model.block_size
            self.spent = self.spent[0] + steps * step_tokens, self.spent[1] + now - last
            speed = steps * step_tokens / (now - last)
            left = (train.steps - begin - steps) * step_tokens / speed
        self._mark = now
        loss, grad_norm, learning_rate = (float(x[-1]) for x in metrics[:3])
        best = min(self.scores, key=lambda scored: scored.rank, default=None)
        return Progress(begin + steps, train.steps, loss, speed, left, grad_norm, learning_rate, best)

    def _trained(self, step: int, loss: Any, grad_norm: Any, learning_rate: Any, applied: Any) -> None:
        """Write the line of one step, and tell what is unusual about it."""
        line: dict[str, Any] = dict(
            step=step, loss=_shortest(loss), grad_norm=_shortest(grad_norm), learning_rate=_shortest(learning_rate)
        )
        numbers = f"loss {loss}, gradient norm {grad_norm}"
        if not applied:
            line |= {"skipped": True, "window_starts": self._window_starts(step - 1).tolist()}
        if (usual := self._write(**line)) is not None:
            self.notice("spike", step, f"{numbers}; the loss before was about {usual:.4f}")
        if applied:
            return
        self.notice("skip", step, f"{numbers}: this step was left out")
        if self._skipped >= self._config.train.max_skipped:
            self._drain()
            raise DivergedError(
                f"step {step}: {numbers}; {self._skipped} steps in a row were left out, and the run ends at its last "
                "save. --resume --debug-nans names the operation, --resume --max-skipped lets more pass; a new run "
                "with a smaller --learning-rate or --grad-clip may fare better"
            )

    def _write(self, **values: Any) -> float | None:
        """One line of JSON, which has no word for nan or infinity: null stands for both; then as `_remember`."""
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        line = json.dumps(finite).encode() + b"\n"
        self._unwritten += line
        self._n_bytes += len(line)
        self._hash.update(line)
        return self._remember(finite)

    def _remember(self, line: dict[str, Any]) -> float | None:
        """Keep what later lines are compared with; the usual loss if that of this line leaps out."""
        self.step = line["step"]
        if evaluated := _evaluated(line):
            self.scores.append(evaluated)
            return None
        self._skipped = self._skipped + 1 if line.get("skipped") else 0
        return self._spikes.leap(math.nan if line["loss"] is None else line["loss"])

    def _drain(self) -> OSError | None:
        """Hand to the disk what it takes; what it said if that is not all."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            return error
        return None


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
