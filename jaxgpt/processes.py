"""One run in several processes (`jax.distributed`): how a process joins, and how all of them agree.

Every process runs the same program on its own devices. Process 0 alone writes files, except for checkpoints, of whose
arrays Orbax lets each process write its own shards. JAX is imported at first use, because run directories are also read
without it.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from jaxgpt.config import UsageError

T = TypeVar("T")

CONNECT_SECONDS = 240.0
"""How long a process tries to connect to process 0. JAX would stop after 300, and abort without a Python exception."""
NOTICE_SECONDS = 10.0
"""Seconds of waiting after which a process prints that it waits."""
COLLECTIVE_SECONDS = 7 * 24 * 3600
"""Timeout of collectives on CPUs. XLA's default, half an hour, may be less than process 0 takes to prepare a corpus."""


class ProcessError(UsageError):
    """The processes of a run cannot connect, or process 0 has failed."""


def is_primary() -> bool:
    """Whether this is process 0, or the only one."""
    import jax

    return jax.process_index() == 0


def single_process() -> bool:
    """Whether the run has one process."""
    import jax

    return jax.process_count() == 1


def broadcast(value: int) -> int:
    """The `value` of process 0, in every process."""
    if single_process():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(value: int) -> int:
    """The largest `value` of any process: of flags, whether it is set anywhere."""
    if single_process():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


def on_primary(action: Callable[[], T]) -> T | None:
    """The result of `action()`, called in process 0 only while the others wait; they return None.

    Raises:
      ProcessError: in the other processes, if `action` raised in process 0.
    """
    if single_process():
        return action()
    result, error = None, None
    if is_primary():
        try:
            result = action()
        except Exception as raised:
            error = raised
    failed = broadcast(error is not None)
    if error:
        raise error
    if failed:
        raise ProcessError("process 0 failed, and this process ends with it; see the output of process 0")
    return result


def join(coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Initialise `jax.distributed`, before any other use of JAX.

    Args:
      coordinator: HOST:PORT of process 0; empty where SLURM, Open MPI, Kubernetes or Cloud TPU provide all three.

    Raises:
      ProcessError: invalid arguments, no cluster environment, or no connection to the other processes.
    """
    import jax

    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ProcessError(f"--coordinator is {coordinator!r}, expected HOST:PORT, as in 10.0.0.1:1234")
    if coordinator and not 0 <= process_id < num_processes:
        raise ProcessError(f"--process-id is {process_id}, expected 0 to {num_processes - 1}")
    # JAX's preemption service would swallow a SIGTERM that comes before training; fit() handles signals itself.
    jax.config.update("jax_enable_preemption_service", False)
    ours, users = f"--xla_cpu_collective_timeout_seconds={COLLECTIVE_SECONDS}", os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{ours} {users}"  # XLA takes the last value of a flag: the user's
    notice = "waiting for the other processes"
    if coordinator:
        notice = f"process {process_id} of {num_processes} waits for the others at {coordinator}"
    timer = threading.Timer(NOTICE_SECONDS, print, [f"jaxgpt: {notice}"], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        if coordinator:
            if process_id:
                _wait_for_port(host.strip("[]"), int(port))
            jax.distributed.initialize(coordinator, num_processes, process_id)
        else:
            jax.distributed.initialize()
        any_process(0)  # the first collective waits half a minute for the others, whatever the timeout of later ones
    except (ValueError, RuntimeError, OSError) as error:
        raise ProcessError(
            f"this process cannot connect to the others: {str(error).splitlines()[0]}; give the address of process 0, "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from error
    finally:
        timer.cancel()


def _wait_for_port(host: str, port: int) -> None:
    """Wait until the port accepts connections. Name lookup is retried too: a starting host may have no DNS entry yet.

    Raises:
      OSError: no connection within CONNECT_SECONDS.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"no process 0 at {host}:{port} for {CONNECT_SECONDS:.0f} s ({error})") from error
        time.sleep(0.2)
