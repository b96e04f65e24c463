"""Which members of a sweep train together: those with the same program and length, as many as fit in memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxgpt.cli import memory
from jaxgpt.config import Config, replaced
from jaxgpt.optimizer import Hyperparameters

MAPPED = Hyperparameters._fields
"""Settings that one program takes as arrays, float32 except the seed."""
OFF = ("learning_rate", "warmup_steps", "grad_clip", "dropout")
"""Of these, those whose 0 switches something off: members with 0 run another program."""
AT_ONCE_ON_CPU = 8
"""Members that a CPU trains together, at most: enough for its cores, and few enough that an interrupt loses little."""
SHARE = 0.3
"""The share of an accelerator's free memory that members may take by estimate; a compiled step of *tiny* takes over
twice the estimate."""


class Chunk(NamedTuple):
    """Members that train together."""

    base: Config  # of one of them, with the settings that they share
    names: tuple[str, ...]  # of the settings that are mapped
    members: tuple[int, ...]  # their indices in the list of all
    devices: int  # how many they use: no more than there are members

    @property
    def size(self) -> int:
        """The number of members, padded to a multiple of the devices."""
        return -(-len(self.members) // self.devices) * self.devices


def split(
    configs: Sequence[Config], devices: int, at_once: int = 0, finished: frozenset[int] = frozenset()
) -> list[Chunk]:
    """The chunks of a sweep: members with the same program and length, as many together as fit.

    Args:
      at_once: members of a chunk, at most; 0: as many as the memory holds.
      finished: members to leave out. A setting in which only they differ is mapped all the same: a constant would be
        rounded differently.

    Raises:
      OutOfMemoryError: not even one fits.
    """
    programs: dict[Config, list[int]] = {}
    for i, config in enumerate(configs):
        programs.setdefault(program_of(config), []).append(i)
    found = []
    for members in programs.values():
        names = tuple(name for name in MAPPED if len({setting(configs[i], name) for i in members}) > 1)
        for steps in dict.fromkeys(configs[i].train.steps for i in members):
            alike = [i for i in members if configs[i].train.steps == steps and i not in finished]
            if alike:
                over = min(devices, len(alike), at_once or devices)
                n = -(-len(alike) // most(configs[alike[0]], over, at_once))
                size = -(-len(alike) // n // over) * over
                each = range(0, len(alike), size)
                found += [Chunk(configs[alike[0]], names, tuple(alike[i : i + size]), over) for i in each]
    return found


def most(config: Config, devices: int, at_once: int = 0) -> int:
    """How many members train at once, a multiple of `devices`. Raises OutOfMemoryError: not one for each device."""
    cpu = jax.default_backend() == "cpu"
    try:
        memory.require(config, shards=memory.Shards(per_host=devices if cpu else 1))
    except memory.OutOfMemoryError as error:
        if devices == 1:
            raise
        raise memory.OutOfMemoryError(f"{error}; or fewer members at once: --at-once {devices // 2}") from error
    free, need = memory.available(), memory.needed(config, 0, recomputed=not cpu).total
    fit = AT_ONCE_ON_CPU if free is None else int((1 if cpu else SHARE * devices) * free / max(1, need))
    return max(1, (at_once or (min(AT_ONCE_ON_CPU, fit) if cpu else fit)) // devices) * devices


def program_of(config: Config) -> Config:
    """What members of one program have in common: the config without what is mapped, and without its length."""
    common = {name: 1 for name in MAPPED if not (name in OFF and setting(config, name) == 0)}
    return replaced(config, **common, min_lr_ratio=1, steps=1)


def setting(config: Config, name: str) -> Any:
    """The value of a field of any section; the minimum of the schedule as a number where it follows the peak."""
    if name == "min_learning_rate":
        return config.optimizer.final_learning_rate
    return next(vars(section)[name] for section in vars(config).values() if name in vars(section))
