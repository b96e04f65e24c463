"""Runs that train, or are served, in processes of their own. As a script: N COMMAND ..., a run in N processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

GRACE = 10.0
"""Seconds that the other processes have to end once one of them has failed."""


def launch(words, n):
    """Run `jaxgpt *words` in `n` processes, as the launcher of a cluster does; the exit code of the first that failed.

    SIGINT and SIGTERM are forwarded, and a third one kills. Of several that ended between two polls, the code is that
    of a killed one: the others lost their connections.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = [sys.executable, "-m", "jaxgpt", *words, "--coordinator", address, "--num-processes", str(n)]
    processes, received = [], []

    def send(number):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def forward(number, frame):
        received.append(number)
        send(number if len(received) < 3 else signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    processes += [subprocess.Popen([*shared, "--process-id", str(i)], start_new_session=True) for i in range(n)]
    code, deadline = 0, float("inf")
    while None in (codes := [process.poll() for process in processes]):
        code = code or min(filter(None, codes), default=0)  # negative: by a signal
        if code and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
            send(signal.SIGTERM)
        if time.monotonic() > deadline:
            send(signal.SIGKILL)
        time.sleep(0.05)
    code = code or min(filter(None, codes), default=0)
    return 128 - code if code < 0 else code


def resume(run, *flags):
    """A process that types `jaxgpt train --run NAME --resume FLAGS` in the folder above the runs."""
    words = ["train", "--run", run.path.name, "--resume", *map(str, flags)]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxgpt", *words],
        cwd=run.path.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=120):
    """Return once `condition` holds, while `process` lives."""
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, f"it ended early:\n{process.stdout.read()}"
        assert time.monotonic() - began < seconds, "nothing happened"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(*words):
    """A `jaxgpt serve WORDS` on a port that was free: its process and its address. It must be ended by a signal."""
    command = [sys.executable, "-m", "jaxgpt", "serve", *map(str, words), "--port", "0"]
    hasty = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what it would win in running, it loses in compiling
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=hasty)
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
