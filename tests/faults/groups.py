"""Runs of one process and of several, killed and gone on with in another number of processes: `scripts/faults` and the
tests of processes start them alike."""

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
"""How far losses may differ, in nats: float32 sums in another order, over 120 steps."""
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 8, "dropout": 0.1}
TIMES = {"steps": 120, "scan_steps": 10, "eval_every": 20, "eval_batches": 2, "warmup_steps": 5}


def train(folder: Path, words: list[str], processes: int = 1, devices: int = 1) -> subprocess.Popen[str]:
    """`jaxgpt train *words` in `folder`, in so many processes with so many devices each."""
    start = ["-m", "jaxgpt"] if processes == 1 else [LAUNCHER, str(processes)]
    command = [sys.executable, *start, "train", *words]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    pipe, joined = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=joined, text=True)


def new(folder: Path, name: str) -> list[str]:
    """The words that begin a run of a small text in `folder`."""
    (folder / "verse.txt").write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in (SIZES | TIMES).items()]
    return ["shakespeare-cpu", "--corpus", "verse.txt", "--tokenizer", "char", *options, "--run", name]


def on(folder: Path, name: str) -> list[str]:
    """The words that go on with a run, or begin it where it was killed before it was one."""
    if (folder / "runs" / name / "config.json").exists():
        return ["--run", name, "--resume"]
    return new(folder, name)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code of a process that ends by itself, or is made to after five minutes, and what it printed."""
    try:
        out = process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        for _ in range(3):  # the third signal ends a group at once
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        process.kill()
        out = f"still at it after five minutes:\n{process.communicate()[0]}"
    return process.returncode, out


def curve(folder: Path, name: str) -> np.ndarray:
    """Every loss that a run has written, of training and of validation; none where it has not begun."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    if not metrics.exists():
        return np.zeros(0)
    lines = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return np.array([line.get("loss", line.get("val_loss")) for line in lines])


def wait_for_lines(folder: Path, name: str, n: int, process: subprocess.Popen[str]) -> None:
    """Until the run has written more than `n` lines, or its processes have ended."""
    while len(curve(folder, name)) <= n and process.poll() is None:
        time.sleep(0.02)


def members(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a launched group; of one process, its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children] or [process.pid]


def group_kills(folder: Path, trials: int, seed: int) -> Count:
    """Kill runs of 2 processes and of 1, in turn, at random moments; go on in the other number, with other devices.

    A trial is met as promised if the losses of the whole run, before the kill and after it, are within BOUND those of
    an unbroken run of one process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, dice = Count(), random.Random(seed)
    code, out = ended(train(folder, new(folder, "unbroken")))
    count.require(code == 0, f"the unbroken run ended with {code}: {out}")
    unbroken = curve(folder, "unbroken")
    tried = 0
    for number in itertools.count():
        if tried == trials:
            break
        name, (first, then) = f"killed-{number}", ((2, 1), (1, 2))[tried % 2]
        process = train(folder, new(folder, name), first, devices=2 if first == 1 else 1)
        lines = dice.randrange(-1, len(unbroken) - 10)
        if lines < 0:  # at any moment of the start
            time.sleep(dice.uniform(0, 6))
        else:
            wait_for_lines(folder, name, lines, process)
            time.sleep(dice.uniform(0, 0.1))
        if process.poll() is None:
            os.kill(dice.choice(members(process)), signal.SIGKILL)
        killed, _ = ended(process)
        if not killed:  # it came to its end before
            continue
        tried += 1
        before = len(curve(folder, name))
        code, out = ended(train(folder, on(folder, name), then, devices=2))
        found = curve(folder, name)
        problem = f"ended with {code}: {out}" if code else None
        if not problem and found.shape != unbroken.shape:
            problem = f"{len(found)} lines instead of {len(unbroken)}"
        if not problem and (apart := float(np.abs(found - unbroken).max())) > BOUND:
            problem = f"{apart:.2g} nats apart"
        count.expect(problem is None, f"{name}, {first} processes ended with {killed} at line {before}: {problem}")
    count.notes.append("half of them from 2 processes to 1, half from 1 to 2")
    return count
