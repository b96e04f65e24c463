"""What a device did, as JAX's profiler saw it: a trace taken, read and added up.

The trace is for XProf and TensorBoard (`tensorboard --logdir FOLDER`) and for https://ui.perfetto.dev, which opens its
.trace.json.gz; here that file is read, one JSON object in Chrome's trace event format.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Event = dict[str, Any]
"""`name`, `tid` (its thread), `ts` and `dur` in microseconds, and maybe `args`."""

EXECUTE = re.compile(r"Executable::Execute(?!Prepare)")
"""How XLA's runtimes call it when a compiled program is handed to a device."""


class Operation(NamedTuple):
    """An operation of a compiled program, all its runs together."""

    module: str  # the program
    name: str  # as in its optimised HLO
    runs: int
    seconds: float  # its own: without the operations inside it


def capture(folder: Path, run: Callable[[], Any]) -> list[Event]:
    """Trace `run()`, which returns when the device has done all of it; the trace stays in `folder`.

    Python's own calls are left out: they would be most of it, and slow it down.
    """
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        run()
    return read(max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime_ns))


def read(path: Path) -> list[Event]:
    """The events of a .trace.json.gz that last."""
    with gzip.open(path) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def operations(events: Iterable[Event]) -> list[Operation]:
    """The operations that ran on the device, the longest first."""
    runs: Counter[tuple[str, str]] = Counter()
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for event, inside in nested(event for event in events if "hlo_op" in event.get("args", {})):
        key = event["args"].get("hlo_module", ""), event["args"]["hlo_op"]
        runs[key] += 1
        seconds[key] += (event["dur"] - sum(each["dur"] for each in inside)) / 1e6
    found = [Operation(*key, runs[key], seconds[key]) for key in runs]
    return sorted(found, key=lambda operation: -operation.seconds)


def dispatches(events: Iterable[Event]) -> int:
    """How many compiled programs were handed to a device."""
    calls = [event for event in events if EXECUTE.search(event["name"])]
    inside = sum(len(children) for _, children in nested(calls))  # a runtime's call may consist of others of its own
    return len(calls) - inside


def nested(events: Iterable[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Each event with those directly inside it: of its thread, begun after it and ended before it."""
    threads: defaultdict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event["tid"]].append(event)
    for thread in threads.values():
        around: list[tuple[Event, list[Event]]] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1][0]["ts"] + around[-1][0]["dur"] < event["ts"] + event["dur"]:
                yield around.pop()
            if around:
                around[-1][1].append(event)
            around.append((event, []))
        yield from around
