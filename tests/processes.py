"""Runs that train, or are served, in processes of their own. As a script: N COMMAND ..., a run in N processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

# All that a run needs, imported before the fork: a process then starts in half the time.
import jaxgpt.cli.train
import jaxgpt.train  # noqa: F401
from jaxgpt import cli

PATIENCE, GRACE = 2.0, 10.0
"""Seconds that the other processes have to end by themselves once one has failed, as each is to say why it fails, and
then to end when they are asked to."""


def launch(words, n):
    """Run `jaxgpt *words` in `n` processes, as the launcher of a cluster does; the exit code of the first that failed.

    SIGINT and SIGTERM are forwarded, and a third one kills. Of several that ended between two polls, the code is that
    of a killed or an interrupted one: the others lost their connections. Each process first runs what $BEGIN_WITH
    holds, which knows its number as `process`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = [*words, "--coordinator", address, "--num-processes", str(n)]
    codes, received = {}, []  # of each process its exit code, None while it runs

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
        # Negative: by a signal; 130: interrupted.
        code = code or min(filter(None, codes.values()), key=lambda code: (code > 0, code != 130), default=0)
        failed = min(failed, time.monotonic()) if code else failed
        if pending and time.monotonic() - failed > pending[0][0]:
            send(pending.pop(0)[1])
        time.sleep(0.05)
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
