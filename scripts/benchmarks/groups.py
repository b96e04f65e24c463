"""All measurements of a device as groups, the most important first. A call continues where the last one ended."""

import subprocess
import sys
import time
from pathlib import Path

from jaxgpt.config import UsageError
from scripts.benchmarks.contest import log
from scripts.benchmarks.shapes import Device

QUICK = "--rounds 3 --seconds 2 --precisions bfloat16 --ways bfloat16+compile"
GOAL = "--repeats 1 --bound 1.4697 --stop"
LONG = "--cases small:1:256 baby:1:256 baby:64:256 --rounds 2 --precisions bfloat16 --ways bfloat16"
GROUPS: dict[Device, dict[str, tuple[float, str]]] = {
    "gpu": {
        "startup-124m": (1.5, "startup --recipe gpt2-124m --tokenizer byte --repeats 1"),
        "attention": (1, "attention"),
        "train-124m": (2, f"train --shapes small {QUICK}"),
        "train-baby-dropout": (1, f"train --shapes baby --dropout 0.2 {QUICK}"),
        "train-baby": (1, f"train --shapes baby {QUICK}"),
        "speedrun": (2.5, f"speedrun --recipes speedrun-gpu shakespeare-gpu {GOAL}"),
        "best": (3, "speedrun --recipes best-gpu --repeats 1 --bound 1.43"),
        "sample": (2, f"sample {LONG}"),
        "train-124m-32": (2, f"train --shapes small --batch-size 32 {QUICK}"),
    },
    "cpu": {
        "train": (3, "train --shapes tiny"),
        "startup": (2, "startup --repeats 3"),
        "speedrun": (8, "speedrun --repeats 2"),
        "best": (8, "speedrun --recipes best-cpu --repeats 1 --bound 1.47"),
        "sample": (3, "sample"),
    },
}
"""Name -> (about how many minutes it takes, the arguments of scripts/bench). Each has a folder of its own. It does not
start if less time is left, and is stopped after twice as long."""


def run_all(device: Device = "cpu", minutes: float = 9.0) -> None:
    """Every measurement of a device, in groups; call it again to continue.

    The results are in bench-all-DEVICE, with a folder for each group.

    Args:
      device: where to compute.
      minutes: in all; a group starts only if it fits into the rest of them.
    """
    if minutes <= 0:
        raise UsageError(f"minutes is {minutes}, expected more than 0")
    end, missing = time.monotonic() + 60 * minutes, []
    folders = {name: Path(f"bench-all-{device}", name) for name in GROUPS[device]}
    for name, (expected, line) in GROUPS[device].items():
        left = (end - time.monotonic()) / 60
        if not (folders[name] / "table.md").exists() and expected <= left:
            measure(f"{line} --device {device}", folders[name], 60 * min(left, 2 * expected))
    for name, folder in folders.items():
        if (folder / "table.md").exists():
            print((folder / "table.md").read_text("utf-8"))
        else:
            missing.append(name)
    if missing:
        print(f"not measured yet: {', '.join(missing)}; call scripts/bench all --device {device} again")


def measure(line: str, folder: Path, seconds: float) -> None:
    """Run one group in its own process: its table goes into table.md, its figures beside it, errors into error.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    log(f"{folder.name}: scripts/bench {line}")
    words = [sys.executable, str(Path(__file__).parents[1].resolve() / "bench"), *line.split()]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=seconds)
        error = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds:.0f} s"
    if error:
        (folder / "error.txt").write_text(error, "utf-8")
        log(f"{folder.name} failed: {error.splitlines()[-1]}; see {folder / 'error.txt'}")
    else:
        (folder / "table.md").write_text(done.stdout, "utf-8")
