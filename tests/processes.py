"""Runs that train, or are served, in processes of their own."""

import contextlib
import os
import subprocess
import sys
import time


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
