"""Start `jaxgpt` in subprocesses. As a script, `processes.py N COMMAND ...` runs a command in N processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

# Imported before the fork, so that a process starts in half the time.
import jaxgpt.cli.train
import jaxgpt.train  # noqa: F401
from jaxgpt import cli

PATIENCE, GRACE = 2.0, 10.0
"""Once a process has failed: seconds until the others get SIGTERM, so that each can report its own error, and seconds
after that until they get SIGKILL."""


def launch(args, n):
    """Run `jaxgpt *args` in `n` processes, as the launcher of a cluster does; the exit code of the first that failed.

    SIGINT and SIGTERM are forwarded to all processes; the third signal is forwarded as SIGKILL. If several processes
    end between two polls, the code is that of a killed process, else of an interrupted one: the others failed because
    they lost their connections. Each process first runs the Python code in $BEGIN_WITH, with its id as `process`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = [*args, "--coordinator", address, "--num-processes", str(n)]
    codes, received = {}, []  # codes: the exit code of each pid, None while it runs

    def send(number):
        for pid, code in codes.items():
            if code is None:
                os.kill(pid, number)

    def forward(number, frame):
        received.append(number)
        send(number if len(received) < 3 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    for i in range(n):
        if pid := os.fork():
            codes[pid] = None
            continue
        os.setsid()
        for number, handler in before.items():
            signal.signal(number, handler)
        exec(os.environ.get("BEGIN_WITH", ""), {"process": i})
        cli.main([*shared, "--process-id", str(i)])
    code, failed = 0, float("inf")
    pending = [(PATIENCE, signal.SIGTERM), (PATIENCE + GRACE, signal.SIGKILL)]
    while None in codes.values():
        for pid in [pid for pid, code in codes.items() if code is None]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
        # Killed by a signal (negative) before interrupted (130) before others.
        code = code or min(filter(None, codes.values()), key=lambda code: (code > 0, code != 130), default=0)
        failed = min(failed, time.monotonic()) if code else failed
        if pending and time.monotonic() - failed > pending[0][0]:
            send(pending.pop(0)[1])
        time.sleep(0.05)
    return 128 - code if code < 0 else code


def resume(run, *flags):
    """Start `jaxgpt train --run NAME --resume FLAGS` in the folder above the runs."""
    args = ["train", "--run", run.path.name, "--resume", *map(str, flags)]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxgpt", *args],
        cwd=run.path.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=120):
    """Wait until `condition()` is true; fail if `process` ends before or `seconds` pass."""
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, f"the process ended early:\n{process.stdout.read()}"
        assert time.monotonic() - began < seconds, f"the condition is still false after {seconds} s"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(*args):
    """Run `jaxgpt serve ARGS` on a free port, and yield its process and address; kill it at the end."""
    command = [sys.executable, "-m", "jaxgpt", "serve", *map(str, args), "--port", "0"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        assert "The playground: http://" in lines[1], "".join(lines) + process.stdout.read()
        yield process, lines[1].split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    sys.exit(launch(sys.argv[2:], int(sys.argv[1])))
