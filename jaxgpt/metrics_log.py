"""metrics.jsonl of a run in training, and the events that `fit` reports while it trains."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
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
    loss: float  # of the last step, in nats per token
    tokens_per_second: float | None  # over the last chunk; None for the first one, whose time is mostly compilation
    seconds_left: float | None  # of training, at that speed
    grad_norm: float = math.nan  # of the last step, before clipping
    learning_rate: float = math.nan  # of the last step
    best: Evaluated | None = None  # so far, those before a resume included
    losses: tuple[float, ...] = ()  # of each step of the last chunk


@dataclass(frozen=True)
class Notice:
    """A warning; it is in events.jsonl too."""

    kind: str  # skip, spike, save-failed, damage, version or log-failed
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
    the log, and process 0 writes it. The end of the block is recorded in events.jsonl, with its error.

    Args:
      window_starts: step (0-based) to the starts (B,) of its windows, recorded where the step was skipped.
    """

    def __init__(
        self, run: Run, n_bytes: int, window_starts: Callable[[int], Starts], on_event: Callable[[Event], None]
    ):
        self._run, self._window_starts, self.on_event = run, window_starts, on_event
        self.step, self.scores = 0, list[Evaluated]()
        self._skipped = 0  # steps in a row
        self._trained = 0, 0.0  # tokens and seconds in this process, without compilation, evaluation and saving
        self._began, self._clock = time.perf_counter(), float("nan")  # the clock is NaN in the first chunk
        self._unread: tuple[int, Metrics] | None = None
        kept = run.metrics_file.read_bytes()[:n_bytes] if n_bytes else b""
        self._n_bytes, self._sha256, self._unwritten = len(kept), hashlib.sha256(kept), b""
        for line in kept.splitlines():
            self._count(json.loads(line))
        self._file = run.metrics_file.open("ab", buffering=0) if processes.is_primary() else None
        if self._file:
            self._file.truncate(n_bytes)
            files.sync(run.path)  # a new file's name must last, too

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._run.event("end", step=self.step, seconds=time.perf_counter() - self._began)
        else:
            text = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            self._run.event("broken-off", step=self.step, text=text)
        if self._file:
            self._file.close()

    @property
    def speed(self) -> dict[str, Any]:
        """Of this process, from its second chunk on, as a save records it."""
        tokens, seconds = self._trained
        rate = tokens / seconds if seconds else None
        return {"tokens_per_second": rate, "trained_tokens": tokens, "trained_seconds": seconds}

    @property
    def digest(self) -> dict[str, Any]:
        """Size and SHA-256 of what is written, as a checkpoint records it. Of process 0."""
        return {"bytes": self._n_bytes, "sha256": self._sha256.hexdigest()}

    def add(self, begin: int, metrics: Metrics) -> None:
        """Log the steps from `begin` on, whose `metrics` (each (K,)) the device may still be computing."""
        self.flush()
        self._unread = begin, metrics

    def add_evaluation(self, step: int, evaluation: Evaluation, estimates: dict[str, float]) -> None:
        """Log an evaluation after `step` steps, and nanoGPT-style estimates beside it."""
        self.flush()
        self._write(step=step, **{f"val_{name}": value for name, value in asdict(evaluation).items()}, **estimates)
        self._drain()
        self.on_event(self.scores[-1])
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last chunk from the speed: it was not training."""
        self._clock += time.perf_counter() - self._clock

    def flush(self) -> None:
        """Write the metrics given to `add`, waiting for the device if need be.

        Raises:
          DivergedError: with them, max_skipped steps in a row were not finite.
        """
        if self._unread is None:
            return
        (begin, metrics), self._unread = self._unread, None
        metrics = jax.device_get(metrics)
        for step, values in enumerate(zip(*metrics, strict=True), begin + 1):
            self._add_step(step, *values)
        self._drain()
        self.on_event(self._progress(metrics))

    def sync(self) -> None:
        """Return once every line so far is on disk, in all processes together.

        Raises:
          OSError: the disk does not take them; a ProcessError where it is that of process 0.
          DivergedError: as `flush`.
        """
        self.flush()
        error = self._drain()
        if self._file and not error:
            os.fsync(self._file.fileno())
        processes.raise_in_all(error)

    def _progress(self, metrics: Metrics) -> Progress:
        config, losses = self._run.config, tuple(map(float, metrics.loss))
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        speed, left = None, None
        if not math.isnan(seconds):
            tokens = len(losses) * config.train.batch_size * config.model.block_size
            self._trained = self._trained[0] + tokens, self._trained[1] + seconds
            speed, left = tokens / seconds, (config.train.steps - self.step) * seconds / len(losses)
        loss, grad_norm, learning_rate = (float(x[-1]) for x in metrics[:3])
        best = min(self.scores, key=lambda scored: scored.rank, default=None)
        return Progress(self.step, config.train.steps, loss, speed, left, grad_norm, learning_rate, best, losses)

    def _add_step(self, step: int, loss: Any, grad_norm: Any, learning_rate: Any, applied: Any) -> None:
        values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        line = {name: float(str(value)) for name, value in values.items()}  # the float32's shortest decimals
        if applied:
            self._write(step=step, **line)
            return
        self._write(step=step, **line, skipped=True, window_starts=self._window_starts(step - 1).tolist())
        found = f"loss {loss}, gradient norm {grad_norm}"
        notify(self._run, self.on_event, "skip", step, f"{found}: this step was skipped")
        if self._skipped >= self._run.config.train.max_skipped:
            self._drain()
            raise DivergedError(
                f"step {step}: {found}; {self._skipped} steps in a row were skipped, and the run ends at its last "
                "save. --resume --debug-nans names the operation, --resume --max-skipped allows more; a new run with a "
                "smaller --learning-rate or --grad-clip may fare better"
            )

    def _write(self, **values: Any) -> None:
        """Add a line of JSON, with null for NaN and infinities."""
        line = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        self._unwritten += json.dumps(line).encode() + b"\n"
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        """Keep what later lines need of a line, a new one or one from before a resume."""
        self.step = line["step"]
        if "val_loss" not in line:
            self._skipped = self._skipped + 1 if line.get("skipped") else 0
            return
        found = {field.name: line[f"val_{field.name}"] for field in fields(Evaluation)}
        values: dict[str, Any] = {name: math.nan if value is None else value for name, value in found.items()}
        self.scores.append(Evaluated(self.step, Evaluation(**values)))

    def _drain(self) -> OSError | None:
        """Write what the disk takes; the error if that is not all."""
        try:
            while self._file and self._unwritten:
                n = self._file.write(self._unwritten)
                self._sha256.update(self._unwritten[:n])
                self._n_bytes, self._unwritten = self._n_bytes + n, self._unwritten[n:]
        except OSError as error:
            return error
        self._unwritten = b""
        return None
