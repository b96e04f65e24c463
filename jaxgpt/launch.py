"""Processes of one run: how one joins the others, and how a group of them is started on one machine."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from jaxgpt import processes
from jaxgpt.config import UsageError
from jaxgpt.signals import handlers

GRACE = 10.0
"""Seconds that processes have to end by themselves once one of them has died, as most wait for it in vain, or once they
were asked a second time."""

PATIENCE = 240.0
"""Seconds that a process looks for process 0. JAX would after 300, and then end it without a word to the run."""
SILENCE = 10.0
"""Seconds before a process says that it waits for the others."""

COLLECTIVE_SECONDS = 7 * 24 * 3600
"""How long CPUs wait for each other. XLA's half an hour may be less than process 0 takes to prepare a text."""


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
    if coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise LaunchError(f"--coordinator is {coordinator!r}, expected HOST:PORT, as in 10.0.0.1:1234")
    if coordinator and not 0 <= process_id < num_processes:
        raise LaunchError(f"--process-id is {process_id}, expected 0 to {num_processes - 1}: there are {num_processes}")
    # Its notifier would swallow a SIGTERM that comes before training, where the loop hears signals by itself.
    jax.config.update("jax_enable_preemption_service", False)
    patience, flags = f"--xla_cpu_collective_timeout_seconds={COLLECTIVE_SECONDS}", os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{patience} {flags}"  # the last word on a flag is the user's
    where = f"process {process_id} of {num_processes} waits for the others at {coordinator}"
    told = [f"jaxgpt: {where if coordinator else 'waiting for the other processes'}"]
    waiting = threading.Timer(SILENCE, print, told, {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        if coordinator:
            if process_id:
                _find(host.strip("[]"), int(port))
            jax.distributed.initialize(coordinator, num_processes, process_id)
        else:
            jax.distributed.initialize()
        processes.most(0)  # whatever the patience of later ones, the first waits half a minute for the others
    except (ValueError, RuntimeError, OSError) as error:
        raise LaunchError(
            f"this process does not find the others: {str(error).splitlines()[0]}; say where process 0 is, "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from error
    finally:
        waiting.cancel()


def _find(host: str, port: int) -> None:
    """Wait until somebody listens there; the name of a host that is just being started may not be known yet.

    Raises:
      OSError: nobody did for PATIENCE seconds.
    """
    ends = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > ends:
                raise OSError(f"no process 0 at {host}:{port} for {PATIENCE:.0f} s ({error})") from error
        time.sleep(0.2)


def group(words: Sequence[str], n: int) -> int:
    """Run `jaxgpt *words` in `n` processes on this machine; the exit code of the first to end with another than 0.

    Of several that ended since the last look, it is that of one which was killed: the others lost their connections.
    SIGINT, SIGTERM and SIGHUP go to all of them, but for those ignored from the start; after a second signal they have
    GRACE seconds, and one that fails in that haste ended by the signal; a third kills them. When one dies, the others
    are told to end, and killed if they have not after GRACE seconds: without it they would wait for it. When this
    process dies, they end as by SIGTERM (on Linux). Each takes the GPU of its number, where there are some.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = [sys.executable, "-m", "jaxgpt", *words, "--coordinator", address, "--num-processes", str(n)]
    members: list[subprocess.Popen[bytes]] = []
    asked, last, ends = 0, 0, float("inf")

    def tell(number: int) -> None:
        for member in members:
            if member.poll() is None:
                member.send_signal(number)

    def forward(number: int, frame: object) -> None:
        nonlocal asked, last, ends
        asked, last = asked + 1, number
        if asked == 2:
            ends = min(ends, time.monotonic() + GRACE)
        tell(number if asked < 3 else signal.SIGKILL)

    before = handlers()
    for number in before:
        signal.signal(number, forward)
    try:
        for i in range(n):
            env = {**os.environ, "JAX_LOCAL_DEVICE_IDS": str(i)}  # jax.distributed reads it, and heeds it on GPUs
            command = [*shared, "--process-id", str(i)]
            members.append(subprocess.Popen(command, start_new_session=True, env=env, preexec_fn=_end_with_parent()))
        code = 0
        while True:
            codes = [member.poll() for member in members]
            code = code or min(filter(None, codes), default=0)  # below 0: by a signal
            if None not in codes:
                if asked > 1 and code > 0:
                    return 128 + last
                return 128 - code if code < 0 else code
            if code and ends == float("inf"):
                ends = time.monotonic() + GRACE
                tell(signal.SIGTERM)
            if time.monotonic() > ends:
                tell(signal.SIGKILL)
            time.sleep(0.05)
    finally:
        for member in members:
            if member.poll() is None:
                member.kill()
            member.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> Callable[[], None] | None:
    """What makes a new process get a SIGTERM when this one dies, even by SIGKILL; None where only Linux would."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has died already
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
