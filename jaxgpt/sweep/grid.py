"""The grid of a sweep: axes of values, and a config for every combination. Does not import jax."""

import itertools
import math
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import config as configs
from jaxgpt.config import Config, ConfigError, ModelConfig, OptimizerConfig, TrainConfig, UsageError, replaced

MAX_MEMBERS = 10_000
"""A larger sweep is taken for a typo."""


class Member(NamedTuple):
    """One run of a sweep."""

    config: Config
    setting: dict[str, Any]  # its value on each axis, without the seed


def parse(text: str) -> tuple[str, list[Any]]:
    """(name, values) of an axis: a list such as "n_embd=64,128", or a range LOW:HIGH:HOW-MANY such as "lr=3e-4:3e-2:6",
    spaced geometrically, or evenly if LOW is 0.

    >>> parse("lr=1e-3:1e-1:3"), parse("dropout=0:0.2:3")
    (('learning_rate', [0.001, 0.01, 0.1]), ('dropout', [0.0, 0.1, 0.2]))

    Raises:
      UsageError: malformed, or a setting that a sweep cannot vary.
    """
    given, _, value = text.partition("=")
    name, kinds = "learning_rate" if given == "lr" else given.replace("-", "_"), _kinds()
    if name not in kinds:
        why = f"a sweep varies the model and training, and knows no setting {name!r}"
        raise UsageError(f"{text}: {why}{configs.did_you_mean(name, kinds)}")
    kind = kinds[name]
    try:
        values = _range(kind, *value.split(":")) if ":" in value else [_read(kind, each) for each in value.split(",")]
    except (ValueError, KeyError, TypeError) as error:
        choices = ("true", "false") if kind is bool else typing.get_args(kind)
        more = f" or {given}=LOW:HIGH:HOW-MANY, values of type {kind.__name__}, 0 <= LOW < HIGH and at least 2 of them"
        wanted = f", values among {', '.join(choices)}" if choices else more
        raise UsageError(f"{text}: expected {given}=VALUE,VALUE{wanted}") from error
    if len(set(values)) < len(values):
        raise UsageError(f"{text}: {name} has the same value twice: {', '.join(map(str, values))}")
    return name, values


def members(base: Config, axes: Sequence[tuple[str, list[Any]]], seeds: int) -> list[Member]:
    """Every combination of values with `seeds` seeds, counted from the seed of `base`; seeds vary fastest.

    Raises:
      UsageError: a setting has two axes, there are too many members, or a combination, which is named, cannot run.
    """
    names = [name for name, _ in axes]
    if double := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"{', '.join(sorted(double))}: given twice, expected one list of values")
    n = seeds * math.prod(len(values) for _, values in axes)
    if not 1 <= n <= MAX_MEMBERS:
        raise UsageError(f"--seeds is {seeds}: the sweep would have {n:,} members, expected 1 to {MAX_MEMBERS:,}")
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        setting = dict(zip(names, values, strict=True))
        for seed in range(base.train.seed, base.train.seed + seeds):
            try:
                found.append(Member(configs.check(replaced(base, **setting, seed=seed), new=True), setting))
            except ConfigError as error:
                raise ConfigError(f"with {describe(setting)}: {error}" if setting else str(error)) from error
    return found


def describe(setting: dict[str, Any]) -> str:
    """A setting as text.

    >>> describe({"learning_rate": 0.003, "n_embd": 64})
    'learning_rate 0.003, n_embd 64'
    """
    return ", ".join(f"{name} {cell(value)}" for name, value in setting.items()) or "the only setting"


def cell(value: Any) -> str:
    """A value as text, with all of its digits: the text identifies a setting."""
    return str(value).removesuffix(".0")


def _kinds() -> dict[str, Any]:
    """The type of each setting that a sweep can vary. It cannot vary the data and vocabulary (losses on different texts
    are not comparable), the seed (an option of its own), or checkpoints and loss estimates (it makes none)."""
    model, optimizer, train = map(typing.get_type_hints, (ModelConfig, OptimizerConfig, TrainConfig))
    kinds = model | optimizer | train | {"min_learning_rate": float}  # None is only its default
    fixed = ("vocab_size", "seed", "eval_batches", "keep", "keep_every", "on_save_error")
    return {name: kind for name, kind in kinds.items() if name not in fixed}


def _read(kind: Any, value: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[value.lower()]
    return kind(value) if kind in (int, float) else value  # a Literal is checked with the whole config


def _range(kind: Any, low: str, high: str, n: str) -> list[Any]:
    first, last, steps = float(_read(kind, low)), float(_read(kind, high)), int(n) - 1
    if not 0 <= first < last < math.inf or not 1 <= steps < MAX_MEMBERS or kind is bool:
        raise ValueError
    between = (np.geomspace if first else np.linspace)(first, last, steps + 1)[1:-1]
    return [kind(round(x) if kind is int else x) for x in (first, *(float(f"{x:.4g}") for x in between), last)]
