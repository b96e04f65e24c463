"""Measuring one against another: contestants in processes of their own, asked in turn, and what their rounds say.

A machine's speed drifts. So contestants are never measured one after the other but in rounds, A B C A B C, and are
compared round by round: what slows a whole round down slows all of them down, and their ratio stays.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

Series = dict[str, float]
"""`median`, `low` and `high` (least and greatest), and `n`, how many."""
Rates = dict[str, list[float]]
"""A contestant's name to what it did per second in each round."""

QUIET = 0.1
"""The share of the machine from which on other programs count as a disturbance."""

TOO_LATE = "no time was left for it (--minutes)"

PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class WorkerError(RuntimeError):
    """A contestant could not start, or ended."""


def series(values: Sequence[float]) -> Series:
    """Median, least, greatest and number of `values`.

    >>> series([3.0, 1.0, 2.0, 10.0])
    {'median': 2.5, 'low': 1.0, 'high': 10.0, 'n': 4}
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Series:
    """`ours` divided by `theirs`, round by round.

    >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 2.0, 'high': 3.0, 'n': 3}
    """
    return series([a / b for a, b in zip(ours, theirs, strict=True)])


def best(rates: Rates, names: Sequence[str]) -> str | None:
    """The one of `names` with the highest median, None if none of them was measured."""
    measured = [name for name in names if rates.get(name)]
    return max(measured, key=lambda name: statistics.median(rates[name]), default=None)


def alternate(
    names: Sequence[str], rounds: int, ask: Callable[[str], float], until: float = float("inf")
) -> tuple[Rates, dict[str, str]]:
    """Ask each of `names` in turn, `rounds` times over: their rates, and why some dropped out.

    Args:
      until: a time.monotonic() after which no further round begins, but for the first.
    """
    rates: Rates = {name: [] for name in names}
    failed: dict[str, str] = {}
    for i in range(rounds):
        if i and time.monotonic() > until:
            break
        for name in names:
            if name not in failed:
                try:
                    rates[name].append(ask(name))
                except WorkerError as error:
                    failed[name] = str(error)
    return {name: found for name, found in rates.items() if name not in failed}, failed


class Worker:
    """A contestant: `python -m jaxgpt.bench.worker`, which waits idle until it is asked for a round.

    Args:
      spec: what it is, as `worker.build` reads it.
      device: cpu or gpu.
      env: variables for it alone.
    """

    def __init__(self, spec: Mapping[str, Any], device: str, env: Mapping[str, str] | None = None):
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxgpt.bench.worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment(device) | dict(env or {}),
        )
        self.about: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """Wait until it is ready; what it says of itself."""
        self.about = self._answer()
        return self.about

    def round(self, seconds: float) -> dict[str, Any]:
        """Work for about `seconds`: {"units", "seconds", "cpu_seconds", "peak_bytes"}."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(seconds).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: what it said is read below
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"exit code {code}" + (f": {last[0][:300]}" if last else ""))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind:
            self._process.kill()
        self._process.communicate()  # the end of its input is its end
        self._said.close()


class Contest:
    """Named workers, started one by one and then asked in turn. Those that fail drop out, and `failed` says why."""

    def __init__(self, device: str, tell: Callable[[str], None] = lambda line: None):
        self.device, self.tell = device, tell
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}
        self.peak_bytes: dict[str, int] = {}
        self.others: list[float] = []
        """The share of the machine that was not ours, in each turn that counts."""
        self.repeated = 0

    def __enter__(self) -> "Contest":
        self._folder = tempfile.TemporaryDirectory(prefix="jaxgpt-bench-")
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self.workers.values():
            worker.__exit__(*error)
        self._folder.cleanup()

    def enter(self, name: str, spec: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        """Start a worker and wait until it has compiled and warmed up; the others wait idle."""
        fresh = {name: self._folder.name for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        began, worker = time.monotonic(), Worker(spec, self.device, fresh | dict(env or {}))
        try:
            worker.start()
        except WorkerError as error:
            self._drop(name, worker, str(error))
            return
        except BaseException as error:
            worker.__exit__(type(error), error, None)
            raise
        self.workers[name] = worker
        self.tell(f"{name}: ready after {time.monotonic() - began:.1f} s")

    def measure(self, rounds: int, seconds: float, until: float = float("inf"), patience: int = 0) -> Rates:
        """Units per second of each worker, round by round.

        Args:
          patience: how often a worker's turn is repeated at once if other programs took a tenth of the machine or more;
            the turn in which they took least counts, however fast it was.
        """

        def ask(name: str) -> float:
            turns = [self._turn(name, seconds)]
            while turns[-1][0] >= QUIET and len(turns) <= patience and time.monotonic() < until:
                turns.append(self._turn(name, seconds))
            share, rate = min(turns, key=lambda turn: turn[0])
            self.others.append(share)
            self.repeated += len(turns) - 1
            self.tell(f"{name}: {rate:,.0f} per second")
            return rate

        rates, failed = alternate(list(self.workers), rounds, ask, until)
        for name, why in failed.items():
            self._drop(name, self.workers.pop(name), why)
        return rates

    @property
    def device_name(self) -> str:
        """What the workers say that they compute on."""
        names = {worker.about["device"] for worker in self.workers.values()}
        return ", ".join([self.device, *sorted(names - {self.device})])

    def quiet(self) -> str:
        """How much of the processor other programs took meanwhile, for a report's notes."""
        repeated = f"; {self.repeated} turns were repeated because they took more" if self.repeated else ""
        return disturbance(self.others) + repeated

    def _turn(self, name: str, seconds: float) -> tuple[float, float]:
        """(others' share of the machine, units per second)."""
        before = machine_seconds()
        answer = self.workers[name].round(seconds)
        self.peak_bytes[name] = answer["peak_bytes"]
        share = others(before, machine_seconds(), answer["cpu_seconds"])
        return 0.0 if share is None else share, answer["units"] / answer["seconds"]

    def _drop(self, name: str, worker: Worker, why: str) -> None:
        self.failed[name] = why
        self.tell(f"{name}: failed, {why}")
        worker.__exit__(None, None, None)


def environment(device: str) -> dict[str, str]:
    """Variables for a process that is measured: without settings of JAX, such as a folder for what it compiles."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    path = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        return kept | fixed | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # Idle workers share the device's memory with the one that computes.
    return kept | fixed | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def machine_seconds() -> tuple[float, float] | None:
    """(seconds that all processors together were busy, and all of their seconds) since boot; None without /proc."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in first]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without what was idle, or waited for a disk


def others(before: tuple[float, float] | None, after: tuple[float, float] | None, own: float) -> float | None:
    """The share of the machine between two readings of `machine_seconds` that went to others than our `own` seconds.

    >>> others((100.0, 200.0), (108.0, 210.0), 6.0)
    0.2
    """
    if not before or not after or after[1] <= before[1]:
        return None
    return max(0.0, after[0] - before[0] - own) / (after[1] - before[1])


def disturbance(shares: Sequence[float]) -> str:
    """A note on `others`. PyTorch's threads wait for one another in a loop, and suffer most where they lack a core."""
    if not shares:
        return "what other programs did meanwhile is not known here"
    found = (
        f"other programs took {100 * statistics.median(shares):.0f}% of the machine ({100 * max(shares):.0f}% at most)"
    )
    return found if max(shares) < QUIET else f"NOT QUIET: {found}; measure again on a quiet machine"


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
