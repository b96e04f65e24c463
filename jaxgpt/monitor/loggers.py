"""Metrics of a run in training, sent to TensorBoard, Weights & Biases or trackio beside metrics.jsonl."""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

from jaxgpt import files
from jaxgpt.config import MissingExtraError
from jaxgpt.metrics_log import Evaluated, Event, Progress, notify
from jaxgpt.run import Run

Log = Callable[[int, dict[str, float]], Any]
"""(step, metrics by name)."""
Logger = tuple[Log, Callable[[], Any]]
"""A `Log`, and the function that closes it."""


def tensorboard(run: Run) -> Logger:
    """To the run's folder tensorboard; view with: tensorboard --logdir runs."""
    from tensorboard.summary import Writer

    writer = Writer(str(run.path / "tensorboard"))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def wandb(run: Run) -> Logger:
    """To Weights & Biases, as the user configured it. The id in the run's directory survives a resume or a move."""
    import wandb

    id_file, config = run.path / "wandb-id", asdict(run.config)
    if not id_file.exists():
        files.write_atomically(id_file, f"{run.path.name}-{secrets.token_hex(4)}".encode())
    settings = {"config": config, "id": id_file.read_text(), "resume": "allow", "dir": str(run.path)}
    handle = wandb.init(project="jaxgpt", name=run.path.name, **settings)
    return lambda step, values: handle.log(values, step=step), handle.finish


def trackio(run: Run) -> Logger:
    """To trackio, as the user configured it: on this machine by default."""
    import trackio

    trackio.init(project="jaxgpt", name=run.path.name, config=asdict(run.config), resume="allow")
    return lambda step, values: trackio.log(values, step=step), trackio.finish


LOGGERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
"""The values of --log."""


def require(names: Sequence[str]) -> None:
    """Raise MissingExtraError if the library of one of these loggers is not installed."""
    for name in names:
        if not find_spec(name):
            raise MissingExtraError(f"--log {name}", name, "loggers")


@contextmanager
def logged(run: Run, names: Sequence[str], on_event: Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """`on_event`, then the named LOGGERS. A logger that fails is dropped with one warning; the run continues."""
    logs: dict[str, Log] = {}

    def guarded(name: str, step: int, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception as error:
            logs.pop(name, None)
            notify(run, on_event, "log-failed", step, f"--log {name} failed and is dropped: {error!r}")

    def log_too(event: Event) -> None:
        on_event(event)
        if values := metrics(event):
            for name, log in list(logs.items()):
                guarded(name, event.step, partial(log, event.step, values))

    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            if begun := guarded(name, 0, partial(LOGGERS[name], run)):
                logs[name], end = begun
                stack.callback(guarded, name, 0, end)
        yield log_too


def metrics(event: Event) -> dict[str, float]:
    """The finite metrics of an event by name."""
    values: dict[str, float | None] = {}
    if isinstance(event, Progress):
        names = ("loss", "grad_norm", "learning_rate", "tokens_per_second")
        values = {f"train/{name}": getattr(event, name) for name in names}
    elif isinstance(event, Evaluated):
        values = {f"val/{name}": value for name, value in asdict(event.evaluation).items() if name != "n_tokens"}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
