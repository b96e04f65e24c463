"""A contestant in a process of its own: `python -m jaxgpt.bench.worker SPEC`, asked over a pipe for a round at a time.

It says what it is in a line of JSON when it has compiled and warmed up; then each line of its input, a number of
seconds, is answered by a line with what was done in about that time. So the thread pools of PyTorch and of XLA never
share a process, and only one contestant computes at a time.
"""

import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol


class Contestant(Protocol):
    """What is measured."""

    about: dict[str, Any]
    """Its device, versions, and how long it took to compile."""

    def run(self) -> int:
        """Do a piece of work, of which the device may still be at the end; how many units it was."""

    def wait(self) -> None:
        """Return when the device has done all of it."""

    def peak_bytes(self) -> int:
        """The most memory so far: of the device, or of this process where that is a CPU."""


def build(spec: dict[str, Any]) -> Contestant:
    """The contestant of {"task": "train-jaxgpt" and so on, its settings}; only its own libraries are imported."""
    settings = {name: value for name, value in spec.items() if name != "task"}
    match spec["task"]:
        case "train-jaxgpt":
            from jaxgpt.bench import ours

            return ours.Training(**settings)
        case "memory-jaxgpt":
            from jaxgpt.bench import ours

            return ours.Footprint(**settings)
        case "sample-jaxgpt":
            from jaxgpt.bench import ours

            return ours.Sampling(**settings)
        case "product-jax":
            from jaxgpt.bench import ours

            return ours.Product(**settings)
        case "ledger":
            from jaxgpt.bench import stages

            return stages.Stages(**settings)
        case "train-torch":
            from jaxgpt.bench import theirs

            return theirs.Training(**settings)
        case "sample-torch":
            from jaxgpt.bench import theirs

            return theirs.Sampling(**settings)
        case "sample-transformers":
            from jaxgpt.bench import theirs

            return theirs.Transformers(**settings)
        case "product-torch":
            from jaxgpt.bench import theirs

            return theirs.Product(**settings)
    raise ValueError(f"no task {spec['task']!r}")


def work(contestant: Contestant, seconds: float) -> dict[str, Any]:
    """One round: pieces of work until `seconds` have gone by, at least one."""
    units, began, computed = 0, time.perf_counter(), time.process_time()
    while not units or time.perf_counter() - began < seconds:
        units += contestant.run()
    contestant.wait()
    return {
        "units": units,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - computed,
        "peak_bytes": contestant.peak_bytes(),
    }


def peak_resident_bytes() -> int:
    """The most memory that this process has had at once; 0 on Windows, which does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def page_faults() -> int | None:
    """Pages that this process has been given without reading a disk, so far; None on Windows, which does not say."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident(peak: bool = False) -> int | None:
    """This process's memory now, or the most since `forget_peak`; None where there is no /proc."""
    with suppress(OSError):
        said = Path("/proc/self/status").read_text()
        if found := re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB", said, re.M):
            return 1024 * int(found[1])
    return None


def forget_peak() -> bool:
    """Let the most memory so far be what there is now; whether the system allows that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer

        def answer(tree: dict[str, Any]) -> None:
            print(json.dumps(tree), file=answers, flush=True)

        contestant = build(json.loads(sys.argv[1]))
        answer(contestant.about)
        for line in sys.stdin:
            answer(work(contestant, json.loads(line)))


if __name__ == "__main__":
    main()
