"""What `scripts/bench` can be asked for."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.bench import table
from jaxgpt.bench.shapes import PRECISIONS, SHAPES
from jaxgpt.bench.table import Report
from jaxgpt.config import MissingExtraError

WAYS = ("float32", "float32+compile", "tf32", "tf32+compile", "bfloat16", "bfloat16+compile")
"""The names of `twin.WAYS`, known without PyTorch."""

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "device": ("--device", {"choices": ["cpu", "gpu"], "default": "cpu", "help": "where both sides compute"}),
    "shapes": ("--shapes", {"choices": SHAPES, "nargs": "+", "help": "models, by name"}),
    "shape": ("--shape", {"choices": SHAPES, "help": "the model to start from"}),
    "cases": ("--cases", {"nargs": "+", "metavar": "SHAPE:BATCH:TOKENS", "help": "such as tiny:64:512"}),
    "rounds": ("--rounds", {"type": int, "help": "how often everyone is asked"}),
    "seconds": ("--seconds", {"type": float, "help": "how long everyone works in a round, at least"}),
    "patience": ("--patience", {"type": int, "help": "repeat a turn so often, at most, if the machine was not quiet"}),
    "dropout": ("--dropout", {"type": float, "help": "on both sides; 0 by default"}),
    "ways": ("--ways", {"choices": WAYS, "nargs": "+", "help": "of PyTorch; autocast is bfloat16"}),
    "way": ("--way", {"choices": WAYS, "help": "of PyTorch; float32 by default, bfloat16+compile on a GPU"}),
    "precision": ("--precision", {"choices": PRECISIONS, "help": "of jaxgpt"}),
    "corpus": ("--corpus", {"help": "the text: a file, or a named corpus"}),
    "text": ("--corpus", {"default": "shakespeare", "help": "the text: a file, or a named corpus"}),
    "recipes": ("--recipes", {"nargs": "+", "help": "of jaxgpt, to be run against the twin"}),
    "recipe": ("--recipe", {"help": "of jaxgpt"}),
    "twin_recipe": ("--twin-recipe", {"help": "whose settings the twin has; shakespeare-cpu or -gpu by default"}),
    "repeats": ("--repeats", {"type": int, "help": "processes of each kind, each with a seed of its own"}),
    "seed": ("--seed", {"type": int, "help": "the first seed"}),
    "seeds": ("--seeds", {"type": int, "help": "how many; 8 by default"}),
    "bound": ("--bound", {"type": float, "help": "the loss to reach, 1.88 by default"}),
    "steps": ("--steps", {"type": int, "help": "fewer than the recipe's, to try this out"}),
    "twin_steps": ("--twin-steps", {"type": int, "help": "fewer than nanoGPT's, to try this out"}),
}
"""Flags by the name of what they set; those not given are left to the mode's own defaults."""


@dataclass(frozen=True)
class Mode:
    """`run` yields reports as they are done."""

    about: str
    options: tuple[str, ...]
    run: Callable[..., Iterator[Report]]


def require(*libraries: str) -> None:
    """Check that what we are measured against is there, without importing it.

    Raises:
      MissingExtraError: it is not.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError("this measurement", library, "torch")


def train(**given: Any) -> Iterator[Report]:
    from jaxgpt.bench import train

    require("torch")
    yield train.measure(**given)


def speedrun(text: str, **given: Any) -> Iterator[Report]:
    from jaxgpt.bench import speedrun

    require("torch")
    yield speedrun.measure(text, **given)


def sample(**given: Any) -> Iterator[Report]:
    from jaxgpt.bench import sample

    require("torch", "transformers")
    yield sample.measure(**given)


def sweep(text: str, **given: Any) -> Iterator[Report]:
    from jaxgpt.bench import sweep

    yield sweep.measure(text, **given)


def startup(**given: Any) -> Iterator[Report]:
    from jaxgpt.bench import startup

    yield startup.measure(**given)


def scaling(**given: Any) -> Iterator[Report]:
    from jaxgpt.bench import scaling

    yield scaling.measure(**given)


def meshes(**given: Any) -> Iterator[Report]:
    from jaxgpt.bench import meshes

    yield meshes.measure(**given)


def memory(**given: Any) -> Iterator[Report]:
    from jaxgpt.bench import memory

    yield memory.measure(**given)


def everything(device: str, until: float, corpus: str | None = None) -> Iterator[Report]:
    """One mode after another for as long as there is time; on a GPU nine minutes, if nothing else was said.

    Args:
      corpus: a text, for the speedrun, which is left out without one.
    """
    rest: list[Callable[[], Iterator[Report]]]
    if device == "gpu":
        until = until if until < float("inf") else time.monotonic() + 9 * 60
        given: dict[str, Any] = {"device": device, "until": until}
        baby, small = ("float32", "tf32", "bfloat16", "bfloat16+compile"), ("tf32", "bfloat16", "bfloat16+compile")
        rest = [
            lambda: train(shapes=("baby",), ways=baby, rounds=3, seconds=2.0, **given),
            lambda: train(shapes=("small",), ways=small, rounds=3, seconds=3.0, **given),
            lambda: sample(cases=("baby:64:512", "baby:1:512"), rounds=2, seconds=1.0, **given),
            lambda: memory(**given),
        ]
    else:
        given = {"device": device, "until": until}
        modes = (train, sample, scaling, memory, startup)
        rest = [lambda mode=mode: mode(**given) for mode in modes]  # type: ignore[misc]
    if corpus:
        rest.append(lambda: speedrun(corpus, repeats=1 if device == "gpu" else 5, **given))
    for mode in rest:
        if time.monotonic() < until:
            yield from mode()


MODES = {
    "train": Mode(
        "Training speed against the PyTorch twin.",
        ("device", "shapes", "rounds", "seconds", "patience", "dropout", "ways"),
        train,
    ),
    "speedrun": Mode(
        "Whole processes, from their start to a trained model, against the twin's.",
        ("device", "text", "recipes", "repeats", "seed", "bound", "way", "twin_recipe", "steps", "twin_steps"),
        speedrun,
    ),
    "sample": Mode(
        "Sampling speed against the twin and transformers.",
        ("device", "cases", "rounds", "seconds", "patience", "ways"),
        sample,
    ),
    "startup": Mode(
        "How long the help and the first step take to come.", ("device", "corpus", "recipe", "repeats"), startup
    ),
    "sweep": Mode(
        "Seeds by one sweep against as many runs one after another, whole processes.",
        ("device", "text", "recipe", "seeds", "repeats", "steps"),
        sweep,
    ),
    "scaling": Mode(
        "The time of a step when one size doubles.",
        ("device", "shape", "precision", "rounds", "seconds", "patience"),
        scaling,
    ),
    "meshes": Mode(
        "What splitting a step over a mesh costs, on virtual devices of this CPU.",
        ("shape", "rounds", "seconds", "patience"),
        meshes,
    ),
    "memory": Mode("The memory of a step: paper, compiler, measured.", ("device", "shapes"), memory),
    "all": Mode(
        "All of these but meshes, the speedrun with --corpus only; with --device gpu, what fits into ten minutes.",
        ("device", "corpus"),
        everything,
    ),
}


def leave(reports: list[Report], path: Path) -> None:
    """Print the newest report and write all of them, so that what is done stays if the next one is cut off."""
    print(table.markdown(reports[-1]), flush=True)
    whole = reports[0] if len(reports) == 1 else {"mode": "all", "reports": reports}
    table.save(whole, path)
