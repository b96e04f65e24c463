"""Which members of a sweep train together: those with the same program and length, as many as fit in memory."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxgpt.cli import memory
from jaxgpt.config import Config, replaced
from jaxgpt.optimizer import Hyperparameters, hyperparameters

OFF = ("learning_rate", "warmup_steps", "grad_clip", "dropout")
"""Settings that 0 switches off: members with a 0 need another program."""
CPU_MEMBERS = 8
"""Most members that a CPU trains together: enough for its cores, and few enough that an interrupt loses little."""
MEMORY_SHARE = 0.3
"""Share of an accelerator's free memory that the estimate for its members may take: a compiled step of *tiny* takes
more than twice its estimate."""


class Chunk(NamedTuple):
    """Members that train together."""

    base: Config  # of one of them; the others differ in mapped settings only
    names: tuple[str, ...]  # of the mapped settings
    members: tuple[int, ...]  # indices in the list of all members
    devices: int
    size: int  # a multiple of the devices: with the finished members, and with padding


def split(
    configs: Sequence[Config], devices: int, at_once: int = 0, finished: frozenset[int] = frozenset()
) -> list[Chunk]:
    """The chunks of a sweep, with `at_once` members at most, or as many as fit in memory. Raises as `max_members`.

    Args:
      finished: members to leave out. They change neither what is mapped nor the sizes and devices of the chunks, so
        that the others are rounded as without them.
    """
    programs: dict[Config, list[int]] = {}
    for i, config in enumerate(configs):
        programs.setdefault(program_of(config), []).append(i)
    chunks = []
    for members in programs.values():
        hypers = [hyperparameters(configs[i]) for i in members]
        names = tuple(name for name in Hyperparameters._fields if len({getattr(each, name) for each in hypers}) > 1)
        for steps in dict.fromkeys(configs[i].train.steps for i in members):
            alike = [i for i in members if configs[i].train.steps == steps]
            base, used = configs[alike[0]], min(devices, len(alike), at_once or devices)
            n_chunks = -(-len(alike) // max_members(base, used, at_once))
            size = -(-len(alike) // n_chunks // used) * used
            for first in range(0, len(alike), size):
                together = alike[first : first + size]
                if left := tuple(i for i in together if i not in finished):
                    chunks.append(Chunk(base, names, left, used, -(-len(together) // used) * used))
    return chunks


def max_members(config: Config, devices: int, at_once: int = 0) -> int:
    """The most members that train together, a multiple of `devices`.

    Raises:
      OutOfMemoryError: one member per device does not fit.
    """
    cpu = jax.default_backend() == "cpu"
    try:
        memory.require(config, shards=memory.Shards(per_host=devices if cpu else 1))
    except memory.OutOfMemoryError as error:
        if devices == 1:
            raise
        raise memory.OutOfMemoryError(f"{error}; or fewer members at once: --at-once {devices // 2}") from error
    free, need = memory.available(), memory.needed(config, 0, recomputed=not cpu).total
    share = 1 if cpu else MEMORY_SHARE * devices  # the devices of a CPU have one memory
    fit = CPU_MEMBERS if free is None else int(share * free / max(1, need))
    if cpu:
        fit = min(CPU_MEMBERS, fit)
    return max(1, (at_once or fit) // devices) * devices


def program_of(config: Config) -> Config:
    """What members of one program have in common: `config` with 1 for each mapped setting and for the length."""
    mapped = {name: 1 for name, value in hyperparameters(config)._asdict().items() if value != 0 or name not in OFF}
    return replaced(config, **mapped, min_lr_ratio=1, steps=1)
