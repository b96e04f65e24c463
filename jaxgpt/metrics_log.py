"""metrics.jsonl of a run in training, and the events that `fit` reports while it trains."""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxgpt import files, processes
from jaxgpt.data import Starts
from jaxgpt.evaluation import Evaluation
from jaxgpt.run import Run
from jaxgpt.step import Metrics


@dataclass(frozen=True)
class Evaluated:
    """The whole validation split was evaluated after `step` steps."""

    step: int
    evaluation: Evaluation

    @property
    def rank(self) -> tuple[bool, float]:
        """A sort key, least for the best: the loss, NaN last."""
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
    """The best evaluation so far, those before a resume included."""
    losses: tuple[float, ...] = ()
    """Of each step of the last chunk."""


@dataclass(frozen=True)
class Notice:
    """A warning; it is in events.jsonl too."""

    kind: str
    """skip, spike, save-failed, damage, version or log-failed."""
    step: int
    text: str


@dataclass(frozen=True)
class Sampled:
    """A sample of the model after `step` steps; it is not kept."""

    step: int
    text: str


Event = Evaluated | Progress | Notice | Sampled


class DivergedError(RuntimeError):
    """Too many steps in a row were not finite."""


def notify(run: Run, on_event: Callable[[Event], None], kind: str, step: int, text: str) -> None:
    """Report a warning to `on_event` and record it in events.jsonl."""
    run.event(kind, step=step, text=text)
    on_event(Notice(kind, step, text))


class MetricsLog:
    """metrics.jsonl, continued after its first `n_bytes`; what follows them is dropped, and computed again.

    It holds no times, so runs of one config are equal byte for byte. The metrics of a chunk are read after the next
    chunk was dispatched: the device never waits for the disk. A save calls `sync` first, so no line up to a checkpoint
    is lost. Lines that a full disk refuses are kept here and written with later ones. Of several processes all keep
    the log, and process 0 writes it. If the block ends with an error, that is recorded in events.jsonl.

    Args:
      window_starts: step (0-based) to the starts (B,) of its windows, recorded where the step was skipped.
    """

    def __init__(
        self, run: Run, n_bytes: int, window_starts: Callable[[int], Starts], on_event: Callable[[Event], None]
    ):
        self._run, self._window_starts, self.on_event = run, window_starts, on_event
        self.step = 0
        """Of the last line."""
        self.scores: list[Evaluated] = []
        self.losses: dict[int, float] = {}
        """Validation loss by step."""
        self.trained = 0, 0.0
        """Tokens and seconds of training in this process, without compilation, evaluation and saving."""
        self._clock: float | None = None
        self._skipped = 0
        self._unread: tuple[int, Metrics] | None = None
        kept = run.metrics_file.read_bytes()[:n_bytes] if n_bytes else b""
        self._file = run.metrics_file.open("ab", buffering=0) if processes.is_primary() else None
        if self._file:
            self._file.truncate(n_bytes)
            files.sync(run.path)  # a new file's name must last, too
        self._unwritten, self._n_bytes, self._hash = b"", n_bytes, hashlib.sha256(kept)
        for line in map(json.loads, kept.splitlines()):
            self._count(line)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            text = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            self._run.event("broken-off", step=self.step, text=text)
        if self._file:
            self._file.close()

    def add(self, begin: int, metrics: Metrics) -> None:
        """Log the steps from `begin` on, whose `metrics` (each (K,)) the device may still be computing."""
        self.flush()
        self._unread = begin, metrics

    def add_evaluation(self, step: int, evaluation: Evaluation, estimates: dict[str, float]) -> None:
        """Log an evaluation after `step` steps, and nanoGPT-style estimates beside it."""
        self.flush()
        values = {f"val_{name}": value for name, value in dataclasses.asdict(evaluation).items()}
        self._write(step=step, **values, **estimates)
        self._drain()
        self.on_event(self.scores[-1])
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last chunk from the speed: it was not training."""
        if self._clock is not None:  # else the first chunk, with its compilation, is still to come
            self._clock = time.perf_counter()

    def flush(self) -> None:
        """Write the metrics given to `add`, waiting for the device if need be.

        Raises:
          DivergedError: with them, max_skipped steps in a row were not finite.
        """
        if self._unread is None:
            return
        (begin, metrics), self._unread = self._unread, None
        metrics = jax.device_get(metrics)
        for i in range(len(metrics.loss)):
            self._add_step(begin + i + 1, *(x[i] for x in metrics))
        self._drain()
        self.on_event(self._progress(metrics))

    def sync(self) -> None:
        """Return once every line so far is on disk.

        Raises:
          OSError: the disk does not take them.
          DivergedError: as `flush`.
        """
        self.flush()
        if error := self._drain():
            raise error
        if self._file:
            os.fsync(self._file.fileno())

    @property
    def position(self) -> tuple[int, str]:
        """Length in bytes and SHA-256 of all lines so far."""
        return self._n_bytes, self._hash.hexdigest()

    @property
    def tokens_per_second(self) -> float | None:
        """The average of this process; None before the second chunk."""
        tokens, seconds = self.trained
        return tokens / seconds if seconds else None

    def _progress(self, metrics: Metrics) -> Progress:
        config, now, speed, left = self._run.config, time.perf_counter(), None, None
        tokens_per_step = config.train.batch_size * config.model.block_size
        if self._clock is not None:
            tokens, seconds = len(metrics.loss) * tokens_per_step, now - self._clock
            self.trained = self.trained[0] + tokens, self.trained[1] + seconds
            speed = tokens / seconds
            left = (config.train.steps - self.step) * tokens_per_step / speed
        self._clock = now
        loss, grad_norm, learning_rate = (float(x[-1]) for x in metrics[:3])
        best = min(self.scores, key=lambda scored: scored.rank, default=None)
        losses = tuple(map(float, metrics.loss))
        return Progress(self.step, config.train.steps, loss, speed, left, grad_norm, learning_rate, best, losses)

    def _add_step(self, step: int, loss: Any, grad_norm: Any, learning_rate: Any, applied: Any) -> None:
        values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        line: dict[str, Any] = {"step": step}  # the shortest decimals that give the float32s back
        line |= {name: float(str(value)) for name, value in values.items()}
        if applied:
            self._write(**line)
            return
        self._write(**line, skipped=True, window_starts=self._window_starts(step - 1).tolist())
        found = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        notify(self._run, self.on_event, "skip", step, f"{found.partition(': ')[2]}: this step was skipped")
        if self._skipped >= self._run.config.train.max_skipped:
            self._drain()
            raise DivergedError(
                f"{found}; {self._skipped} steps in a row were skipped, and the run ends at its last save. "
                "--resume --debug-nans names the operation, --resume --max-skipped allows more; a new run with a "
                "smaller --learning-rate or --grad-clip may fare better"
            )

    def _write(self, **values: Any) -> None:
        """Add a line of JSON, with null for NaN and infinities."""
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        line = json.dumps(finite).encode() + b"\n"
        self._unwritten += line
        self._n_bytes += len(line)
        self._hash.update(line)
        self._count(finite)

    def _count(self, line: dict[str, Any]) -> None:
        """Keep what later lines need of a line, a new one or one from before a resume."""
        self.step = line["step"]
        if "val_loss" not in line:
            self._skipped = self._skipped + 1 if line.get("skipped") else 0
            return
        names = [field.name for field in dataclasses.fields(Evaluation)]
        values: dict[str, Any] = {n: math.nan if line[f"val_{n}"] is None else line[f"val_{n}"] for n in names}
        self.scores.append(Evaluated(self.step, Evaluation(**values)))
        self.losses[self.step] = values["loss"]

    def _drain(self) -> OSError | None:
        """Write what the disk takes; the error if that is not all."""
        try:
            while self._file and self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            return error
        if not self._file:
            self._unwritten = b""
        return None
