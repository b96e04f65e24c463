"""Agreement between the processes of one run (`jax.distributed`).

Every process runs the same program on its own devices. Only process 0 writes files, except the arrays of checkpoints:
there, each process writes its own shards. JAX is imported at first use, because run directories are read without it.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from jaxgpt.config import UsageError

T = TypeVar("T")


class ProcessError(UsageError):
    """The processes of a run cannot connect, or another process failed."""


def is_primary() -> bool:
    """Whether this is process 0."""
    import jax

    return jax.process_index() == 0


def single_process() -> bool:
    """Whether the run has one process."""
    import jax

    return jax.process_count() == 1


def any_process(value: int) -> int:
    """The largest `value` of all processes: for a flag, whether any process has set it."""
    if single_process():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


def broadcast(value: int) -> int:
    """The `value` of process 0."""
    return any_process(value if is_primary() else np.iinfo(np.int32).min)


def raise_in_all(error: BaseException | None) -> None:
    """Raise `error` if given, or a ProcessError if another process has one. All processes must call this."""
    if any_process(error is not None):
        raise error or ProcessError("another process failed, and this process ends with it; see its output")


def on_primary(action: Callable[[], T]) -> T | None:
    """The result of `action()` in process 0; the others wait and return None, or raise a ProcessError if it failed."""
    result, error = None, None
    try:
        result = action() if is_primary() else None
    except Exception as raised:
        error = raised
    raise_in_all(error)
    return result
