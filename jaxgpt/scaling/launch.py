"""Processes of one run: how one joins the others, and how a group of them is started on one machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from jaxgpt.config import UsageError
from jaxgpt.training import processes
from jaxgpt.training.interrupt import SIGNALS

GRACE = 10.0
"""Seconds that processes have to end by themselves once one of them has died: most wait for it in vain."""


class LaunchError(UsageError):
    """Processes cannot find each other."""


def join(coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Become one of the processes of a run, before JAX is used: as SLURM, Open MPI, Kubernetes or Cloud TPU say, or by
    the address of process 0.

    Raises:
      LaunchError: nobody says, what is said cannot be, or the others were not found.
    """
    import jax

    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal()):
        raise LaunchError(f"--coordinator is {coordinator!r}, expected HOST:PORT, as in 10.0.0.1:1234")
    if coordinator and not 0 <= process_id < num_processes:
        raise LaunchError(f"--process-id is {process_id}, expected 0 to {num_processes - 1}: there are {num_processes}")
    # Its notifier would swallow a SIGTERM that comes before training, where the loop hears signals by itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        else:
            jax.distributed.initialize()
        processes.most(0)  # the first collective waits half a minute for the others, later ones as long as it takes
    except (ValueError, RuntimeError) as error:
        raise LaunchError(
            f"this process does not find the others: {str(error).splitlines()[0]}; say where process 0 is, "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from error


def group(words: Sequence[str], n: int) -> int:
    """Run `jaxgpt *words` in `n` processes on this machine; the exit code of the first to end with another than 0.

    SIGINT, SIGTERM and SIGHUP go to all of them. When one dies, the others are told to end, and killed if they have not
    after GRACE seconds: without it they would wait for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = [sys.executable, "-m", "jaxgpt", *words, "--coordinator", address, "--num-processes", str(n)]
    members: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for member in members:
            if member.poll() is None:
                member.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        for i in range(n):
            members.append(subprocess.Popen([*shared, "--process-id", str(i)], start_new_session=True, env=os.environ))
        code, ends = 0, float("inf")
        while True:
            codes = [member.poll() for member in members]
            code = code or next(filter(None, codes), 0)
            if None not in codes:
                return 128 - code if code < 0 else code
            if code and ends == float("inf"):
                ends = time.monotonic() + GRACE
                forward(signal.SIGTERM, None)
            if time.monotonic() > ends:
                forward(signal.SIGKILL, None)
            time.sleep(0.05)
    finally:
        for member in members:
            if member.poll() is None:
                member.kill()
            member.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
