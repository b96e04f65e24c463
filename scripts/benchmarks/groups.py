"""All measurements of a device as groups, the most important first. A call continues where the last one ended."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.config import UsageError
from scripts.benchmarks.shapes import Device

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Group:
    """One call of scripts/bench, in a folder of its own."""

    name: str
    arguments: tuple[str, ...]
    minutes: float
    """About how long it takes. It does not start if less time is left, and is stopped after twice as long."""


def _group(name: str, minutes: float, line: str) -> Group:
    return Group(name, tuple(line.split()), minutes)


QUICK = "--rounds 3 --seconds 2 --precisions bfloat16 --ways bfloat16+compile"
GROUPS: dict[Device, list[Group]] = {
    "gpu": [
        _group("startup-124m", 1.5, "startup --recipe gpt2-124m --tokenizer byte --repeats 1"),
        _group("attention", 1, "attention"),
        _group("train-124m", 2, f"train --shapes small {QUICK}"),
        _group("train-baby-dropout", 1, f"train --shapes baby --dropout 0.2 {QUICK}"),
        _group("train-baby", 1, f"train --shapes baby {QUICK}"),
        _group(
            "speedrun",
            2.5,
            "speedrun --recipes speedrun-gpu shakespeare-gpu --repeats 1 --bound 1.4697 --stop --no-twin",
        ),
        _group("best", 3, "speedrun --recipes best-gpu --repeats 1 --bound 1.43"),
        _group(
            "sample",
            2,
            "sample --cases small:1:256 baby:1:256 baby:64:256 --rounds 2 --precisions bfloat16 --ways bfloat16",
        ),
        _group("train-124m-32", 2, f"train --shapes small --batch-size 32 {QUICK}"),
    ],
    "cpu": [
        _group("train", 3, "train --shapes tiny"),
        _group("startup", 2, "startup --repeats 3"),
        _group("speedrun", 8, "speedrun --repeats 2"),
        _group("best", 8, "speedrun --recipes best-cpu --repeats 1 --bound 1.47"),
        _group("sample", 3, "sample"),
    ],
}


def run_all(device: Device = "cpu", minutes: float = 9.0, folder: Path | None = None) -> int:
    """Every measurement of a device, in groups; call it again to continue.

    Args:
      device: where to compute.
      minutes: in all; a group starts only if it fits into the rest of them.
      folder: for the results, with a folder for each group; None is bench-all-DEVICE.
    """
    if minutes <= 0:
        raise UsageError(f"minutes is {minutes}, expected more than 0")
    folder, end = folder or Path(f"bench-all-{device}"), time.monotonic() + 60 * minutes
    for group in GROUPS[device]:
        left = (end - time.monotonic()) / 60
        if not (folder / group.name / "table.md").exists() and group.minutes <= left:
            _measure(group, device, folder / group.name, 60 * min(left, 2 * group.minutes))
    missing = []
    for group in GROUPS[device]:
        table = folder / group.name / "table.md"
        if table.exists():
            print(table.read_text("utf-8"))
        else:
            missing.append(group.name)
    if missing:
        print(f"not measured yet: {', '.join(missing)}; call scripts/bench all --device {device} again")
    return 0


def _measure(group: Group, device: Device, folder: Path, seconds: float) -> None:
    """Run one group in its own process: its table goes into table.md, its figures beside it, errors into error.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{group.name}: scripts/bench {' '.join(group.arguments)} --device {device}", file=sys.stderr, flush=True)
    words = [sys.executable, str(ROOT / "scripts" / "bench"), *group.arguments, "--device", device]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=seconds)
        error = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds:.0f} s"
    if error:
        (folder / "error.txt").write_text(error, "utf-8")
        print(f"{group.name} failed: {error.splitlines()[-1]}; see {folder / 'error.txt'}", file=sys.stderr)
    else:
        (folder / "table.md").write_text(done.stdout, "utf-8")
