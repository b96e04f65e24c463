"""One run in several processes (`jax.distributed`): how all of them agree.

Every process runs the same program on its own devices. Process 0 alone writes files, except for checkpoints, of whose
arrays Orbax lets each process write its own shards. JAX is imported at first use, because run directories are also read
without it.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from jaxgpt.config import UsageError

T = TypeVar("T")


class ProcessError(UsageError):
    """The processes of a run cannot connect, or another one has failed."""


def is_primary() -> bool:
    """Whether this is process 0, or the only one."""
    import jax

    return jax.process_index() == 0


def single_process() -> bool:
    """Whether the run has one process."""
    import jax

    return jax.process_count() == 1


def any_process(value: int) -> int:
    """The largest `value` of any process: of flags, whether it is set anywhere."""
    if single_process():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


def broadcast(value: int) -> int:
    """The `value` of process 0, in every process."""
    return any_process(value if is_primary() else np.iinfo(np.int32).min)


def raise_in_all(error: BaseException | None) -> None:
    """Raise `error`, if there is one, or a ProcessError if another process has one. All processes must call this."""
    if any_process(error is not None):
        raise error or ProcessError("another process failed, and this process ends with it; see its output")


def on_primary(action: Callable[[], T]) -> T | None:
    """The result of `action()`, called in process 0 only while the others wait; they return None.

    Raises:
      ProcessError: in the other processes, if `action` raised in process 0.
    """
    result, error = None, None
    try:
        result = action() if is_primary() else None
    except Exception as raised:
        error = raised
    raise_in_all(error)
    return result
