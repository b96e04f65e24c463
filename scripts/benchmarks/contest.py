"""Contestants take turns, each in its own process, so that the thread pools of PyTorch and XLA never share one."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from jaxgpt.config import UsageError
from scripts.benchmarks.machine import machine_seconds, others

T = TypeVar("T")
Entrants = dict[str, tuple[Sequence[str], Mapping[str, str]]]
"""Name -> (arguments of Python, variables of its process)."""


class WorkerError(RuntimeError):
    """A contestant could not start, or failed."""


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def alternate(
    names: Sequence[str], rounds: int, ask: Callable[[str], T], start: Callable[[str], Any] = lambda name: None
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Start each of `names`, then ask each in turn, `rounds` times: the answers of those that gave all, and why the
    others dropped out (by a WorkerError)."""
    if rounds < 1:
        raise UsageError(f"the number of rounds is {rounds}, expected 1 or more")
    found: dict[str, list[T]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for turn in range(1 + rounds):
        for name in names:
            if name not in failed:
                try:
                    if turn == 0:
                        start(name)
                    else:
                        found[name].append(ask(name))
                except WorkerError as error:
                    failed[name] = str(error)
                    log(f"{name}: failed, {error}")
    return {name: answers for name, answers in found.items() if name not in failed}, failed


def compare(
    device: str, entrants: Entrants, rounds: int, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str], list[float | None]]:
    """Start contestants (`contestants.answer_rounds`) one by one, then let each work for `seconds` in each round.

    Returns:
      What each reports of itself, with its "rates" (units per second, of each round) and "peak_bytes"; why others
      dropped out; and the share of the machine that other programs took in each turn.
    """
    shares: list[float | None] = []
    workers: dict[str, Callable[..., Any]] = {}
    about: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as cache, ExitStack() as stack:
        fresh = environment(device) | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}

        def start(name: str) -> None:
            began, (arguments, env) = time.monotonic(), entrants[name]
            workers[name] = stack.enter_context(worker(arguments, fresh | dict(env)))
            about[name] = workers[name]()
            log(f"{name}: ready after {time.monotonic() - began:.1f} s")

        def ask(name: str) -> Any:
            before = machine_seconds()
            done = workers[name](f"{seconds}\n")
            shares.append(others(before, done["cpu_seconds"]))
            log(f"{name}: {done['units'] / done['seconds']:,.0f} per second")
            return done

        measured, failed = alternate(list(entrants), rounds, ask, start)
    found = {}
    for name, turns in measured.items():
        rates = [done["units"] / done["seconds"] for done in turns]
        found[name] = {**about[name], "rates": rates, "peak_bytes": turns[-1]["peak_bytes"]}
    return found, failed, shares


@contextmanager
def worker(arguments: Sequence[str], env: Mapping[str, str]) -> Iterator[Callable[..., Any]]:
    """Start `python ARGUMENTS`; yields answer(line=""), which writes a line to the process and returns the JSON of its
    next line, or raises a WorkerError if the process has ended."""
    pipe, words = subprocess.PIPE, [sys.executable, *arguments]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(words, bufsize=0, stdin=pipe, stdout=pipe, stderr=errors, env=env) as process,
    ):
        stdin: Any = process.stdin
        stdout: Any = process.stdout

        def answer(line: str = "") -> Any:
            with suppress(OSError):  # the process has ended: its error is raised below
                stdin.write(line.encode())
            if found := stdout.readline():
                return json.loads(found)
            raise WorkerError(failure(process.wait(), errors))

        try:
            yield answer
        except BaseException:
            process.kill()
            raise


def failure(code: int, output: IO[bytes]) -> str:
    """The exit code of a process, and the last line that it wrote to `output`."""
    output.seek(0)
    last = output.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"exit code {code}" + "".join(f": {line[:300]}" for line in last)


def environment(device: str) -> dict[str, str]:
    """Variables for a measured process: those of this one without JAX's settings, such as a compile cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    root = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        return kept | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # Idle workers share the device's memory with the one that computes.
    return kept | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
