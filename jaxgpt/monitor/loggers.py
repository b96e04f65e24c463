"""The numbers of a run to other programs that show them, while it trains. metrics.jsonl stays the truth."""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

from jaxgpt import config as configs
from jaxgpt import files as disk
from jaxgpt.config import MissingExtraError
from jaxgpt.metrics_log import Evaluated, Event, Progress, notify
from jaxgpt.run import Run

Log = Callable[[int, dict[str, float]], Any]
"""Takes the numbers of a step, by name."""


@contextmanager
def tensorboard(run: Run) -> Iterator[Log]:
    """Into the folder tensorboard of the run: tensorboard --logdir runs."""
    from tensorboard.summary import Writer

    writer = Writer(str(run.path / "tensorboard"))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def wandb(run: Run) -> Iterator[Log]:
    """To Weights & Biases, as its own settings say; a resumed run goes on under its name."""
    import wandb

    config = configs.to_tree(run.config)
    handle = wandb.init(
        project="jaxgpt", name=run.path.name, id=identity(run), resume="allow", config=config, dir=str(run.path)
    )
    try:
        yield lambda step, values: handle.log(values, step=step)
    finally:
        handle.finish()


@contextmanager
def trackio(run: Run) -> Iterator[Log]:
    """To trackio, on this machine unless its own settings say otherwise."""
    import trackio

    trackio.init(project="jaxgpt", name=run.path.name, config=configs.to_tree(run.config), resume="allow")
    try:
        yield lambda step, values: trackio.log(values, step=step)
    finally:
        trackio.finish()


LOGGERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
"""What --log can say."""


def require(names: Sequence[str]) -> None:
    """Check that what they need is installed.

    Raises:
      MissingExtraError: it is not.
    """
    for name in names:
        if not find_spec(name):
            raise MissingExtraError(f"--log {name}", name, name)


@contextmanager
def logged(run: Run, names: Sequence[str], watch: Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """`watch`, and after it each of LOGGERS that is named. One that fails is left alone from then on, which is told
    and put into the diary once: it is no reason to end a run."""
    logs: dict[str, Log] = {}

    def alone(name: str, step: int, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception as error:
            logs.pop(name, None)
            notify(run, watch, "log-failed", step, f"--log {name} is left out from here: {error!r}")

    def told(event: Event) -> None:
        watch(event)
        if values := numbers(event):
            for name, log in list(logs.items()):
                alone(name, event.step, partial(log, event.step, values))

    with ExitStack() as stack:
        for name in names:
            logger = LOGGERS[name](run)
            if log := alone(name, 0, logger.__enter__):
                logs[name] = log
                stack.callback(alone, name, 0, partial(logger.__exit__, None, None, None))
        yield told


def numbers(event: Event) -> dict[str, float]:
    """What an event comes to as numbers by name; those that are none are left out."""
    values: dict[str, float | None] = {}
    if isinstance(event, Progress):
        names = ("loss", "grad_norm", "learning_rate", "tokens_per_second")
        values = {f"train/{name}": getattr(event, name) for name in names}
    elif isinstance(event, Evaluated):
        values = {f"val/{name}": value for name, value in asdict(event.evaluation).items() if name != "n_tokens"}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def identity(run: Run) -> str:
    """A name for this very run, the same after a resume and another for another run of its name: drawn once, and kept
    in its folder, for a file's time or place may change where a run is moved to go on."""
    kept = run.path / "wandb-id"
    if not kept.exists():
        disk.write_atomically(kept, f"{run.path.name}-{secrets.token_hex(4)}".encode())
    return kept.read_text()
