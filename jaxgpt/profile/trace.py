"""The HLO instructions and programs that a device ran, from a trace by JAX's profiler.

A trace in a folder is for XProf and TensorBoard (`tensorboard --logdir FOLDER`) and for https://ui.perfetto.dev, which
opens its .trace.json.gz.
"""

import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

EXECUTE = re.compile(r"Executable::Execute(?!Prepare)")
"""Names of the events in which XLA's runtimes dispatch a compiled program."""


class Span(NamedTuple):
    """An event of one thread or stream; times are in nanoseconds."""

    name: str
    start: float
    duration: float
    op: str = ""  # the HLO instruction, if the event is one


class Operation(NamedTuple):
    """All runs of an HLO instruction."""

    name: str
    runs: int
    seconds: float  # without the instructions inside it


def capture(folder: Path | None, run: Callable[[], Any]) -> list[list[Span]]:
    """Trace `run()`, which waits for the device, and return the spans of each thread or stream; `folder` keeps it.

    Python calls are left out: they would be most of the trace, and slow `run` down.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="jaxgpt-trace-") as scratch:
        folder = folder or Path(scratch)
        with jax.profiler.trace(str(folder), profiler_options=options):
            run()
        newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
        profile = jax.profiler.ProfileData.from_file(str(newest))  # planes, lines and events are views of it
    with warnings.catch_warnings():
        # From Python 3.12 on, the binding's types warn; where warnings are errors, the process aborts (jaxlib 0.12.0).
        warnings.simplefilter("ignore", DeprecationWarning)
        return [
            [Span(e.name, e.start_ns, e.duration_ns, str(dict(e.stats).get("hlo_op", ""))) for e in line.events]
            for plane in profile.planes
            for line in plane.lines
        ]


def operations(lines: Iterable[list[Span]]) -> list[Operation]:
    """The HLO instructions that ran, slowest first."""
    runs, nanoseconds = Counter[str](), defaultdict[str, float](float)
    for line in lines:
        for span, own, _ in nested(span for span in line if span.op and not span.name.startswith("end: ")):
            runs[span.op] += 1
            nanoseconds[span.op] += own
    found = [Operation(op, runs[op], ns / 1e9) for op, ns in nanoseconds.items()]
    return sorted(found, key=lambda operation: -operation.seconds)


def dispatches(lines: Iterable[list[Span]]) -> int:
    """How many compiled programs were dispatched. A dispatch inside another does not count."""
    return sum(depth == 0 for line in lines for *_, depth in nested(s for s in line if EXECUTE.search(s.name)))


def nested(spans: Iterable[Span]) -> Iterator[tuple[Span, float, int]]:
    """Each span with its duration less that of the spans inside it, and its depth."""
    stack: list[tuple[Span, float, int]] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.duration)):
        while stack and stack[-1][0].start + stack[-1][0].duration < span.start + span.duration:
            yield stack.pop()
        if stack:
            outer, own, depth = stack.pop()
            stack.append((outer, own - span.duration, depth))
        stack.append((span, span.duration, len(stack)))
    yield from stack
