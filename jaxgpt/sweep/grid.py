"""The grid of a sweep: axes of values, and a config for every combination. Does not import jax."""

import dataclasses
import difflib
import itertools
import math
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt import config as configs
from jaxgpt.config import Config, ConfigError, UsageError, replaced

SHORT = {"lr": "learning_rate"}
MAX_MEMBERS = 10_000
"""More are taken for a typo."""


class Axis(NamedTuple):
    """A setting and its values."""

    name: str
    values: tuple[Any, ...]


class Member(NamedTuple):
    """One run of a sweep."""

    config: Config
    setting: dict[str, Any]  # the value on each axis, without the seed: runs that differ only in it share a setting


def parse(text: str) -> Axis:
    """Parse "n_embd=64,128", or a range "lr=3e-4:3e-2:6" of low, high and how many: spaced geometrically, or evenly if
    low is 0.

    >>> parse("lr=1e-3:1e-1:3").values, parse("dropout=0:0.2:3").values
    ((0.001, 0.01, 0.1), (0.0, 0.1, 0.2))

    Raises:
      UsageError: the form is wrong, or a sweep cannot vary the setting.
    """
    name, equals, value = text.partition("=")
    name = SHORT.get(name, name.replace("-", "_"))
    if not equals or not value:
        raise UsageError(f"--set {text}: expected NAME=VALUE,VALUE or NAME=LOW:HIGH:HOW-MANY, as in n_embd=64,128")
    kinds = _kinds()
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"--set {text}: no setting {name!r}; {hint}a sweep varies the model and training")
    if name == "seed":
        raise UsageError(f"--set {text}: give the number of seeds: --seeds 8")
    kind = kinds[name]
    values = _range(text, value, kind) if ":" in value else tuple(_read(text, kind, each) for each in value.split(","))
    if len(set(values)) < len(values):
        raise UsageError(f"--set {text}: {name} has the same value twice: {', '.join(map(str, values))}")
    return Axis(name, values)


def members(base: Config, axes: Sequence[Axis], seeds: int) -> list[Member]:
    """Every combination of values with `seeds` seeds, beginning with that of `base`; seeds vary fastest.

    Raises:
      UsageError: a setting has two axes, or there are too many members.
      ConfigError: names a combination that cannot run.
    """
    names = [axis.name for axis in axes]
    if double := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"{', '.join(sorted(double))}: given twice, expected one list of values")
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}, expected at least 1")
    n = seeds * math.prod(len(axis.values) for axis in axes)
    if n > MAX_MEMBERS:
        raise UsageError(f"the sweep would have {n:,} members, expected at most {MAX_MEMBERS:,}: fewer --seeds?")
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        setting = dict(zip(names, values, strict=True))
        for seed in range(base.train.seed, base.train.seed + seeds):
            tree = configs.to_tree(replaced(base, **setting, seed=seed))
            try:
                found.append(Member(configs.check(configs.from_tree(tree), new=True), setting))  # checks types too
            except ConfigError as error:
                raise ConfigError(f"with {describe(setting)}: {error}" if setting else str(error)) from error
    return found


def describe(setting: dict[str, Any]) -> str:
    """A setting as text.

    >>> describe({"learning_rate": 0.003, "n_embd": 64})
    'learning_rate 0.003, n_embd 64'
    """
    return ", ".join(
        f"{name} {value:g}" if type(value) is float else f"{name} {value}" for name, value in setting.items()
    )


def _kinds() -> dict[str, Any]:
    """The type of every setting that a sweep varies: not of the data and vocabulary (losses on different texts cannot
    be compared), nor of checkpoints and loss estimates, which it does not make."""
    sections = [field.type for field in dataclasses.fields(Config) if field.name != "data"]
    kinds = {name: kind for section in sections for name, kind in typing.get_type_hints(section).items()}
    kinds["min_learning_rate"] = float  # None is only its default
    fixed = ("vocab_size", "eval_batches", "keep", "keep_every", "on_save_error")
    return {name: kind for name, kind in kinds.items() if name not in fixed}


def _read(text: str, kind: Any, value: str) -> Any:
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UsageError(f"--set {text}: expected true or false, found {value!r}")
    if kind not in (int, float):
        return value  # a Literal, checked with the whole config
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"--set {text}: expected a number ({kind.__name__}), found {value!r}") from None


def _range(text: str, value: str, kind: Any) -> tuple[Any, ...]:
    parts = value.split(":")
    if kind not in (int, float) or len(parts) != 3:
        raise UsageError(f"--set {text}: expected LOW:HIGH:HOW-MANY of a number, as in lr=3e-4:3e-2:6")
    low, high, n = float(_read(text, kind, parts[0])), float(_read(text, kind, parts[1])), _read(text, int, parts[2])
    if not 0 <= low < high < math.inf or not 2 <= n <= MAX_MEMBERS:
        raise UsageError(f"--set {text}: expected 0 <= LOW < HIGH and at least 2 values")
    shares = [i / (n - 1) for i in range(n)]
    between = [low * (high / low) ** share if low else high * share for share in shares[1:-1]]
    short = [float(f"{x:.4g}") for x in between]
    return tuple(kind(round(x) if kind is int else x) for x in [low, *short, high])
