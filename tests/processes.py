"""Runs that train in processes of their own."""

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
