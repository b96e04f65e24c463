"""Runs in one and in several processes, killed and resumed in another number of processes; used by `scripts/faults` and
by tests/test_processes.py."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.faults.trials import Count

LAUNCHER = str(Path(__file__).parents[1] / "processes.py")

BOUND = 2e-5
"""Largest difference of losses, in nats: over 120 steps, float32 sums in another order."""
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 8, "dropout": 0.1}
TIMES = {"steps": 120, "scan_steps": 10, "eval_every": 20, "eval_batches": 2, "warmup_steps": 5}


def train(folder: Path, args: list[str], processes: int = 1, devices: int = 1) -> subprocess.Popen[str]:
    """Start `jaxgpt train *args` in `folder`, in `processes` processes with `devices` devices each."""
    start = ["-m", "jaxgpt"] if processes == 1 else [LAUNCHER, str(processes)]
    command = [sys.executable, *start, "train", *args]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def new_run_args(folder: Path, name: str) -> list[str]:
    """Arguments of `jaxgpt train` that start a run on a small text in `folder`."""
    (folder / "verse.txt").write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in (SIZES | TIMES).items()]
    return ["shakespeare-cpu", "--corpus", "verse.txt", "--tokenizer", "char", *options, "--run", name]


def resume_args(folder: Path, name: str) -> list[str]:
    """Arguments of `jaxgpt train` that resume a run, or start it if it was killed before it was created."""
    if (folder / "runs" / name / "config.json").exists():
        return ["--run", name, "--resume"]
    return new_run_args(folder, name)


def wait(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait until a process exits, or end it after five minutes: its exit code and output."""
    try:
        out = process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        for _ in range(3):  # the third signal kills a group
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        process.kill()
        out = f"still running after five minutes:\n{process.communicate()[0]}"
    return process.returncode, out


def curve(folder: Path, name: str) -> np.ndarray:
    """All training and validation losses that a run has logged; empty if it has not started."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    if not metrics.exists():
        return np.zeros(0)
    lines = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return np.array([line.get("loss", line.get("val_loss")) for line in lines])


def wait_for_lines(folder: Path, name: str, n: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged more than `n` lines, or its processes have ended."""
    while len(curve(folder, name)) <= n and process.poll() is None:
        time.sleep(0.02)


def members(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a launched group, or the id of a single process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children] or [process.pid]


def group_kills(folder: Path, trials: int, seed: int) -> Count:
    """Kill runs of 2 processes and of 1, in turn, at random moments; resume them with the other number of processes.

    A trial passes if all losses, from before and after the kill, are within BOUND of those of an uninterrupted run in
    one process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, rng = Count(), random.Random(seed)
    code, out = wait(train(folder, new_run_args(folder, "uninterrupted")))
    count.require(code == 0, f"the uninterrupted run exited with {code}: {out}")
    uninterrupted = curve(folder, "uninterrupted")
    tried = 0
    for number in itertools.count():
        if tried == trials:
            break
        name, (first, then) = f"killed-{number}", ((2, 1), (1, 2))[tried % 2]
        process = train(folder, new_run_args(folder, name), first, devices=2 if first == 1 else 1)
        lines = rng.randrange(-1, len(uninterrupted) - 10)
        if lines < 0:  # kill during startup
            time.sleep(rng.uniform(0, 6))
        else:
            wait_for_lines(folder, name, lines, process)
            time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            os.kill(rng.choice(members(process)), signal.SIGKILL)
        killed, _ = wait(process)
        if not killed:  # the run had finished
            continue
        tried += 1
        before = len(curve(folder, name))
        code, out = wait(train(folder, resume_args(folder, name), then, devices=2))
        found = curve(folder, name)
        problem = f"the resumed run exited with {code}: {out}" if code else None
        if not problem and found.shape != uninterrupted.shape:
            problem = f"{len(found)} lines, expected {len(uninterrupted)}"
        if not problem and (apart := float(np.abs(found - uninterrupted).max())) > BOUND:
            problem = f"losses differ by {apart:.2g} nats"
        count.expect(problem is None, f"{name}, {first} processes, exit code {killed} at line {before}: {problem}")
    count.notes.append("half of them resumed from 2 processes in 1, half from 1 in 2")
    return count
