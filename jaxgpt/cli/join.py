"""Join the processes that train one run: `jaxgpt train --distributed` and `--coordinator`."""

import os
import socket
import sys
import time

import jax

from jaxgpt.processes import ProcessError, any_process

CONNECT_SECONDS = 240.0
"""Timeout of connecting to process 0. After 300 s, JAX would abort without a Python exception."""
COLLECTIVE_SECONDS = 7 * 24 * 3600
"""Timeout of collectives on CPUs: process 0 may prepare a corpus for longer than XLA's default of half an hour."""


def join(coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Initialize `jax.distributed`, before any other use of JAX.

    Args:
      coordinator: HOST:PORT of process 0; empty where SLURM, Open MPI, Kubernetes or Cloud TPU provide all three.

    Raises:
      ProcessError: an argument is invalid, there is no cluster environment, or no connection to the other processes.
    """
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ProcessError(f"--coordinator is {coordinator!r}, expected HOST:PORT, as in 10.0.0.1:1234")
    if coordinator and not 0 <= process_id < num_processes:
        raise ProcessError(f"--process-id is {process_id}, expected 0 to {num_processes - 1}")
    # JAX's preemption service would swallow a SIGTERM that comes before training; fit() handles signals itself.
    jax.config.update("jax_enable_preemption_service", False)
    ours, users = f"--xla_cpu_collective_timeout_seconds={COLLECTIVE_SECONDS}", os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{ours} {users}"  # XLA takes the last value of a flag: the user's
    where = f" at {coordinator}" if coordinator else ""
    print(f"jaxgpt: process {process_id} of {num_processes} waits for the others{where}", file=sys.stderr, flush=True)
    try:
        if process_id:
            _wait_for_port(host.strip("[]"), int(port))
        jax.distributed.initialize(*((coordinator, num_processes, process_id) if coordinator else ()))
        any_process(0)  # now, because the first collective times out after half a minute, whatever the flag says
    except (ValueError, RuntimeError, OSError) as error:
        raise ProcessError(
            f"this process cannot connect to the others: {str(error).splitlines()[0]}; give the address of process 0, "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from error


def _wait_for_port(host: str, port: int) -> None:
    """Wait until the port accepts connections; raise an OSError after CONNECT_SECONDS."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=10).close()
        except OSError as error:  # also a failed name lookup: a starting host may have no DNS entry yet
            if time.monotonic() > deadline:
                raise OSError(f"no process 0 at {host}:{port} for {CONNECT_SECONDS:.0f} s ({error})") from error
        time.sleep(0.2)
