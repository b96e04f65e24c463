"""Contestants take turns, each in its own process, so that the thread pools of PyTorch and XLA never share one.

A contestant's process writes a line of JSON about itself once it has compiled and warmed up, and then answers each line
of input, a number of seconds, with the work that it did in about that time.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxgpt.config import UsageError
from jaxgpt.profile.timing import Rates, repeat
from scripts.benchmarks.load import machine_seconds, others


class WorkerError(RuntimeError):
    """A contestant could not start, or failed."""


class Contestant(Protocol):
    about: dict[str, Any]
    """Device, versions, seconds spent compiling."""

    def run(self) -> int:
        """Do one piece of work and return its number of units; the device may still be computing."""

    def wait(self) -> None:
        """Wait until the device is done."""

    def peak_bytes(self) -> int:
        """Peak memory of the device, or of the process on a CPU."""


def require_round(rounds: int) -> None:
    if rounds < 1:
        raise UsageError(f"the number of rounds is {rounds}, expected 1 or more")


def alternate(names: Sequence[str], rounds: int, ask: Callable[[str], float]) -> tuple[Rates, dict[str, str]]:
    """Ask each of `names` in turn, `rounds` times: the rates, and why contestants dropped out (by a WorkerError)."""
    require_round(rounds)
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
            pass  # the process has ended: `answer` raises its error
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
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class JaxContestant:
    """A contestant on JAX's first device."""

    def __init__(self) -> None:
        import jax

        self.device = jax.local_devices()[0]
        self.about: dict[str, Any] = {"device": self.device.device_kind}

    def wait(self) -> None: ...

    def peak_bytes(self) -> int:
        return int((self.device.memory_stats() or {}).get("peak_bytes_in_use", 0)) or peak_resident_bytes()
