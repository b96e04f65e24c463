"""One run in many processes: who writes, and how all agree.

Every process runs the same program on its own devices. Process 0 alone writes files, but for its share of the arrays,
which Orbax has each process write. What only process 0 can know, it tells the others. JAX is imported at first use: a
run's folder is also looked at without it.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from jaxgpt.config import UsageError

T = TypeVar("T")


class ProcessError(UsageError):
    """Another process of the run has failed; it says why."""


def first() -> bool:
    """Whether this is process 0, or the only one."""
    import jax

    return jax.process_index() == 0


def alone() -> bool:
    """Whether the run has one process."""
    import jax

    return jax.process_count() == 1


def told(value: int) -> int:
    """`value` as process 0 has it."""
    if alone():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def most(value: int) -> int:
    """The greatest `value` of all processes."""
    if alone():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


def by_first(action: Callable[[], T]) -> T | None:
    """What `action` gives, which process 0 alone calls while the others wait; None for these.

    Raises:
      ProcessError: in the others, where it raised in process 0.
    """
    if alone():
        return action()
    result, error = None, None
    if first():
        try:
            result = action()
        except Exception as raised:
            error = raised
    failed = told(error is not None)
    if error:
        raise error
    if failed:
        raise ProcessError("this process ends with process 0, which says why")
    return result
