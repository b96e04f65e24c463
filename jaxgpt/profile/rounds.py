"""Compare contestants in rounds: each runs in its own process, all take turns, and ratios are taken within a round.

A machine's speed drifts. In rounds (A B C A B C) what slows one round down slows every contestant, and ratios stay. A
contestant's process writes a line of JSON about itself once it has compiled and warmed up, and then answers each line
of input, a number of seconds, with the work that it did in about that time.
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
from typing import Any, Protocol

Series = dict[str, float]
"""`median`, `low` (minimum), `high` (maximum) and `n`, the number of values."""
Rates = dict[str, list[float]]
"""A contestant's name -> its units of work per second in each round."""
QUIET = 0.1
"""Share of the machine from which other programs count as a disturbance."""


class WorkerError(RuntimeError):
    """A contestant could not start, or failed."""


class Contestant(Protocol):
    about: dict[str, Any]
    """Device, versions, seconds spent compiling."""

    def run(self) -> int:
        """Do one piece of work, which may still be running on the device; the number of units in it."""

    def wait(self) -> None:
        """Wait until the device is done."""

    def peak_bytes(self) -> int:
        """Peak memory of the device, or of the process on a CPU."""


def series(values: Sequence[float]) -> Series:
    """
    >>> series([3.0, 1.0, 2.0, 10.0])
    {'median': 2.5, 'low': 1.0, 'high': 10.0, 'n': 4}
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Series:
    """`ours` / `theirs`, round by round.

    >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 2.0, 'high': 3.0, 'n': 3}
    """
    return series([a / b for a, b in zip(ours, theirs, strict=True)])


def alternate(names: Sequence[str], rounds: int, ask: Callable[[str], float]) -> tuple[Rates, dict[str, str]]:
    """Ask each of `names` in turn, `rounds` times: the rates, and why contestants dropped out (by a WorkerError)."""
    rates: Rates = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name in names:
            if name not in failed:
                try:
                    rates[name].append(ask(name))
                except WorkerError as error:
                    failed[name] = str(error)
    return {name: found for name, found in rates.items() if name not in failed}, failed


def repeat(run: Callable[[], int], seconds: float, wait: Callable[[], None] = lambda: None) -> tuple[int, float]:
    """Call `run` until `seconds` have passed, at least once, then `wait`: (sum of its results, seconds it took)."""
    units, began = 0, time.perf_counter()
    while not units or time.perf_counter() - began < seconds:
        units += run()
    wait()
    return units, time.perf_counter() - began


class Worker:
    """The process of a contestant: `python ARGUMENTS`, with `env` beside `environment(device)`."""

    def __init__(self, arguments: Sequence[str], device: str, env: Mapping[str, str]):
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment(device) | dict(env),
        )

    def ask(self, seconds: float) -> Any:
        """The result of a round."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(seconds).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: `answer` reads why
        return self.answer()

    def answer(self) -> Any:
        """
        Raises:
          WorkerError: the process has ended; with the last line that it wrote to stderr.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"exit code {code}" + (f": {last[0][:300]}" if last else ""))
        return json.loads(line)

    def close(self, kill: bool = False) -> None:
        if kill:
            self._process.kill()
        self._process.communicate()  # the end of its input ends it
        self._stderr.close()


class Contest:
    """Contestants started one by one, then asked in turn. One that fails drops out; `failed` says why."""

    def __init__(self, device: str, log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)):
        self.device, self.log = device, log
        self.workers: dict[str, Worker] = {}
        self.about: dict[str, dict[str, Any]] = {}
        """What each contestant reports of itself."""
        self.failed: dict[str, str] = {}
        self.peak_bytes: dict[str, int] = {}
        self.others: list[float] = []
        """Share of the machine that other programs took, in each turn."""

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        for worker in self.workers.values():
            worker.close(kill=kind is not None)

    def enter(self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start a contestant and wait until it is ready."""
        began = time.monotonic()
        self.workers[name] = Worker(arguments, self.device, env or {})
        try:
            self.about[name] = self.workers[name].answer()
        except WorkerError as error:
            self._drop(name, str(error))
        else:
            self.log(f"{name}: ready after {time.monotonic() - began:.1f} s")

    def measure(self, rounds: int, seconds: float) -> Rates:
        """Units per second of each contestant, which works for `seconds` in each round."""

        def ask(name: str) -> float:
            before = machine_seconds()
            done = self.workers[name].ask(seconds)
            self.others += [others(before, machine_seconds(), done["cpu_seconds"])] if before else []
            self.peak_bytes[name] = done["peak_bytes"]
            rate = float(done["units"] / done["seconds"])
            self.log(f"{name}: {rate:,.0f} per second")
            return rate

        rates, failed = alternate(list(self.workers), rounds, ask)
        for name, why in failed.items():
            self._drop(name, why)
        return rates

    def facts(self) -> dict[str, str]:
        """The device that the contestants report, to be added to a report's facts."""
        names = {about["device"] for about in self.about.values()}
        return {"device": ", ".join([self.device, *sorted(names - {self.device})])}

    def _drop(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.log(f"{name}: failed, {why}")
        self.workers.pop(name).close()


def answer_rounds(make: Callable[[], Contestant]) -> None:
    """The main function of a contestant's process. Libraries print to stderr, so that stdout holds answers only."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        contestant = make()
        print(json.dumps(contestant.about), file=answers, flush=True)
        for line in sys.stdin:
            computed = time.process_time()
            units, seconds = repeat(contestant.run, json.loads(line), contestant.wait)
            done = {"units": units, "seconds": seconds, "cpu_seconds": time.process_time() - computed}
            print(json.dumps(done | {"peak_bytes": contestant.peak_bytes()}), file=answers, flush=True)


def environment(device: str) -> dict[str, str]:
    """Variables for a measured process: those of this one without JAX's settings, such as a compile cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    root = str(Path(__file__).resolve().parents[2])
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    if device == "cpu":
        return kept | path | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # Idle workers share the device's memory with the one that computes.
    return kept | path | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def peak_resident_bytes() -> int:
    """Peak memory of this process; 0 on Windows, which does not report it."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine_seconds() -> tuple[float, float] | None:
    """(busy seconds, all seconds) of all cores since boot; None without /proc."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in first]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without idle and waiting for a disk


def others(before: tuple[float, float] | None, after: tuple[float, float] | None, own: float) -> float:
    """Share of the machine, between two readings of `machine_seconds`, that went to others than our `own` seconds.

    >>> others((100.0, 200.0), (108.0, 210.0), 6.0)
    0.2
    """
    if not before or not after or after[1] <= before[1]:
        return 0.0
    return max(0.0, after[0] - before[0] - own) / (after[1] - before[1])


def disturbance(shares: Sequence[float]) -> str:
    """A note on the shares of `others`. PyTorch's threads wait in busy loops, and suffer most from a missing core."""
    if not shares:
        return "the load of other programs is unknown on this system"
    median, most = 100 * statistics.median(shares), 100 * max(shares)
    found = f"other programs took {median:.0f}% of the machine ({most:.0f}% at most)"
    return found if max(shares) < QUIET else f"NOT QUIET: {found}; measure again on a quiet machine"
