"""What a sweep is asked for: axes of values, and the configs that are their product. Imports no jax."""

import dataclasses
import difflib
import itertools
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt import config as configs
from jaxgpt.config import Config, ConfigError, UsageError, replaced

SHORT = {"lr": "learning_rate"}
MOST = 10_000
"""Members of a sweep; more are a slip of the keyboard."""


@dataclass(frozen=True)
class Axis:
    """One setting and the values that it takes."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    config: Config
    setting: dict[str, Any]
    """The value on each axis, the seed left out: members that differ in their seed alone are of one setting."""


def parse(text: str) -> Axis:
    """ "n_embd=64,128", or a range "lr=3e-4:3e-2:6": low, high and how many, in equal ratios where low is above 0
    and in equal steps where it is 0.

    >>> parse("lr=1e-3:1e-1:3").values, parse("dropout=0:0.2:3").values
    ((0.001, 0.01, 0.1), (0.0, 0.1, 0.2))

    Raises:
      UsageError: it is none of these, or no setting that a sweep can vary.
    """
    name, equals, said = text.partition("=")
    name = SHORT.get(name, name.replace("-", "_"))
    if not equals or not said:
        raise UsageError(f"--set {text}: expected NAME=VALUE,VALUE or NAME=LOW:HIGH:HOW-MANY, as in n_embd=64,128")
    kinds = _kinds()
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"--set {text}: no setting {name!r}; {hint}a sweep varies those of the model and of training")
    if name == "seed":
        raise UsageError(f"--set {text}: seeds are counted from --seed on: --seeds 8")
    kind = kinds[name]
    values = _range(text, said, kind) if ":" in said else tuple(_read(text, kind, each) for each in said.split(","))
    if len(set(values)) < len(values):
        raise UsageError(f"--set {text}: {name} has the same value twice: {', '.join(map(str, values))}")
    return Axis(name, values)


def members(base: Config, axes: Sequence[Axis], seeds: int) -> list[Member]:
    """Every combination of values, each with `seeds` seeds from that of `base` on, seeds running fastest.

    Raises:
      UsageError: a setting has two axes, or there are too many members.
      ConfigError: a combination cannot run; it is named.
    """
    names = [axis.name for axis in axes]
    if double := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"{', '.join(sorted(double))}: two lists of values, expected one")
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}, expected at least 1")
    n = seeds * math.prod(len(axis.values) for axis in axes)
    if n > MOST:
        raise UsageError(f"the sweep would have {n:,} members, expected at most {MOST:,}: fewer values, or --seeds")
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        setting = dict(zip(names, values, strict=True))
        for seed in range(base.train.seed, base.train.seed + seeds):
            found.append(Member(_checked(replaced(base, **setting, seed=seed), setting), setting))
    return found


def told(setting: dict[str, Any]) -> str:
    """A setting for a person.

    >>> told({"learning_rate": 0.003, "n_embd": 64})
    'learning_rate 0.003, n_embd 64'
    """
    return ", ".join(
        f"{name} {value:g}" if type(value) is float else f"{name} {value}" for name, value in setting.items()
    )


def _checked(config: Config, setting: dict[str, Any]) -> Config:
    try:
        return configs.check(configs.from_tree(configs.to_tree(config)), new=True)  # a list has any values
    except ConfigError as error:
        raise ConfigError(f"with {told(setting)}: {error}" if setting else str(error)) from error


def _kinds() -> dict[str, Any]:
    """The type of every setting but those of the data and the vocabulary, which is the text's (losses on different
    texts cannot be compared), and those of checkpoints and estimates, of which a sweep makes none."""
    sections = [field.type for field in dataclasses.fields(Config) if field.name != "data"]
    kinds = {name: kind for section in sections for name, kind in typing.get_type_hints(section).items()}
    kinds["min_learning_rate"] = float  # None is its default alone
    for name in ("vocab_size", "eval_batches", "keep", "keep_every", "on_save_error"):
        del kinds[name]
    return kinds


def _read(text: str, kind: Any, said: str) -> Any:
    if kind is bool:
        if said.lower() in ("true", "false"):
            return said.lower() == "true"
        raise UsageError(f"--set {text}: expected true or false, found {said!r}")
    if kind not in (int, float):
        return said  # one of a few words, checked with the whole config
    try:
        return kind(said)
    except ValueError:
        raise UsageError(f"--set {text}: expected a number ({kind.__name__}), found {said!r}") from None


def _range(text: str, said: str, kind: Any) -> tuple[Any, ...]:
    parts = said.split(":")
    if kind not in (int, float) or len(parts) != 3:
        raise UsageError(f"--set {text}: expected LOW:HIGH:HOW-MANY of a number, as in lr=3e-4:3e-2:6")
    low, high, n = float(_read(text, kind, parts[0])), float(_read(text, kind, parts[1])), _read(text, int, parts[2])
    if not 0 <= low < high < math.inf or not 2 <= n <= MOST:
        raise UsageError(f"--set {text}: expected 0 <= LOW < HIGH and at least 2 values")
    shares = [i / (n - 1) for i in range(n)]
    between = [low * (high / low) ** share if low else high * share for share in shares[1:-1]]
    short = [float(f"{x:.4g}") for x in between]  # as a person would write it
    return tuple(kind(round(x) if kind is int else x) for x in [low, *short, high])
