"""What a compiled program sends between devices and multiplies, read from its text."""

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

Collectives = dict[tuple[str, int], tuple[int, int]]
"""(kind, devices that each joins) to (how many, bytes)."""


def collectives(text: str) -> Collectives:
    """What a device sends in one run of a program: optimised HLO as text, of one device.

    Loops count as in `computations`. The bytes are those of whole arrays: a gather's result, what a scatter is given.
    """
    counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    pieces = set()
    for name, (times, lines) in computations(text).items():
        for line in lines:
            # The compiler for TPUs may spread a collective over the products beside it, in pieces of one chain.
            chain = re.search(r'chain_id="(\d+)"', line)
            for kind, n, size in _sent(line, scattered=name.startswith("all-reduce-scatter")):
                if chain and (kind, chain[1]) in pieces:
                    continue
                if chain:
                    pieces.add((kind, chain[1]))
                counts[kind, n][0] += times
                counts[kind, n][1] += times * size
    return {key: (n, size) for key, (n, size) in sorted(counts.items())}


def computations(text: str) -> dict[str, tuple[int, list[str]]]:
    """Name to (how often it runs in one run of the program, its lines), of each computation that runs.

    What a loop does counts as often as the loop runs, where XLA says that or its condition compares a counter from zero
    with a constant, else once.
    """
    entry, bodies = _bodies(text)
    runs: Counter[str] = Counter()

    def run(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies[name]:
            trips = _trips(line, bodies) if " while(" in line else 1
            for groups in CALLED.findall(line):
                for called in re.findall(r"[\w.-]+", " ".join(groups)):
                    if called in bodies:
                        run(called, times * trips)

    run(entry, 1)
    return {name: (times, bodies[name]) for name, times in runs.items()}


def _bodies(text: str) -> tuple[str, dict[str, list[str]]]:
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


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a while loop runs."""
    if found := TRIPS.search(line):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = "\n".join(bodies.get(condition[1], [])) if condition else ""
    end = re.search(r"ROOT .* compare\(.*%?\b([\w.-]+)\), direction=LT", lines)
    constant = end and re.search(rf"%?{re.escape(end[1])} = s32\[\]\S* constant\((\d+)\)", lines)
    return int(constant[1]) if constant else 1


def _sent(line: str, scattered: bool) -> Iterator[tuple[str, int, int]]:
    """The collective of an instruction, if it is one: its kind, the devices it joins, its bytes.

    Args:
      scattered: the sum of which each device keeps a part, as the compiler for TPUs writes a reduce-scatter.
    """
    for kind in KINDS:
        if found := re.search(rf" = (.*?) {kind}(-start)?\(", line):
            n = 2 if kind == "collective-permute" else _together(line)
            sizes = [
                width(dtype) * math.prod(map(int, filter(None, dims.split(",")))) // 8
                for dtype, dims in SHAPE.findall(found[1])
            ]
            if found[2] and kind != "all-reduce":  # operands, results, and what the compiler keeps there
                size = max(sizes)
            else:
                size = sum(sizes) * (n if kind == "reduce-scatter" else 1)
            if n > 1:
                yield "reduce-scatter" if kind == "all-reduce" and scattered else kind, n, size


def _together(line: str) -> int:
    """How many devices a collective joins, by any of the three ways in which HLO writes its groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(found[1].split(",")) if found else 1


def width(kind: str) -> int:
    """Bits of a number, by what HLO calls its kind."""
    return BITS.get(kind) or int(kind[1:])


def custom_calls(text: str) -> set[str]:
    """What the program calls that is not XLA's own code."""
    return set(re.findall(r'custom_call_target="([^"]+)"', text))


def products(text: str) -> Counter[str]:
    """Types of the operands of products, "bf16 x bf16", to how many there are in the text."""
    found: Counter[str] = Counter()
    for body in _bodies(text)[1].values():
        types = dict(re.findall(r"^ *(?:ROOT )?%?([\w.-]+) = (\w+)\[", "\n".join(body), re.M))
        for line in body:
            if call := re.search(r" (?:dot|convolution)\(([^)]*)\)", line):
                names = re.findall(r"%?([\w.-]+)(?:,|$)", call[1])
                found[" x ".join(types.get(name, "?") for name in names)] += 1
    return found
