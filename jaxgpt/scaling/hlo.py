"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
SHAPE = re.compile(r"\b(pred|bf16|c64|[fsu]\d+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind to (how many, bytes) in one run of a program: optimised HLO as text, of one device.

    What a loop does counts as often as the loop runs, where XLA knows that, else once. The bytes are those of the
    whole result, before a reduce-scatter scatters it.
    """
    entry, bodies = _computations(text)
    runs: Counter[str] = Counter()

    def run(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies[name]:
            trips = int(found[1]) if " while(" in line and (found := TRIPS.search(line)) else 1
            for groups in CALLED.findall(line):
                for called in re.findall(r"[\w.-]+", " ".join(groups)):
                    if called in bodies:
                        run(called, times * trips)

    run(entry, 1)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, times in runs.items():
        for line in bodies[name]:
            for kind, size in _sent(line):
                counts[kind][0] += times
                counts[kind][1] += times * size
    return {kind: (n, size) for kind, (n, size) in sorted(counts.items())}


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the first computation to run, and the lines of each."""
    entry, name, bodies = "", "", dict[str, list[str]]()
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            name = found[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif name and line.startswith("  "):
            bodies[name].append(line)
    return entry, bodies


def _sent(line: str) -> Iterator[tuple[str, int]]:
    """The collective of an instruction, if it is one, and its bytes."""
    for kind in KINDS:
        if found := re.search(rf" = (.*?) {kind}(?:-start)?\(", line):
            yield kind, _bytes(found[1]) * (_together(line) if kind == "reduce-scatter" else 1)


def _together(line: str) -> int:
    """How many devices a collective joins, by any of the three ways in which HLO writes its groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(found[1].split(",")) if found else 1


def _bytes(text: str) -> int:
    """Of the largest array that is named."""
    arrays = [(kind, math.prod(int(n) for n in dims.split(",") if n)) for kind, dims in SHAPE.findall(text)]
    return max((size * _width(kind) // 8 for kind, size in arrays), default=0)


def _width(kind: str) -> int:
    return BITS.get(kind) or int(kind[1:])


def custom_calls(text: str) -> set[str]:
    """What the program calls that is not XLA's own code."""
    return set(re.findall(r'custom_call_target="([^"]+)"', text))
