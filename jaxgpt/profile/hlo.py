"""What a compiled program does, read from its optimised HLO text: collectives, matmuls, fusions, libraries."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
SHAPE = re.compile(r"\b(pred|bf16|c64|[fsu]\d+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
FUSED = re.compile(r"\bcalls=%?([\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<args>[^)]*)\)"
)
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
TARGET = re.compile(r'custom_call_target="([^"]+)"')
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota"}
"""Instructions that compute nothing."""
LIBRARIES = {
    "ynn": "YNNPACK",
    "xnn": "XNNPACK",
    "onednn": "oneDNN",
    "triton": "Triton",
    "cublas": "cuBLAS",
    "cudnn": "cuDNN",
}
"""What a fusion's kind or a custom call's target contains -> the library that computes it."""

Collectives = dict[tuple[str, int], tuple[int, int]]
"""(kind, devices per group) -> (how many, bytes)."""


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    shape: str
    args: tuple[str, ...]
    line: str
    runs: int = 1
    """In one run of the program."""
    inside: tuple[str, ...] = ()
    """Operations inside a fusion."""

    @property
    def origin(self) -> str:
        """Its place in the model, the same in every block: transpose(jvp(GPT))/h_*/mlp/c_fc/dot_general is in a
        backward pass. Empty if XLA made it up."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return re.sub(r"\bh_\d+/", "h_*/", found[1].split(";")[0].partition("/")[2]) if found else ""

    @property
    def bytes(self) -> int:
        """Of its result."""
        return sum(_bytes(self.shape))

    @property
    def kernel(self) -> str:
        """What computes it: the name of a library, or XLA's own code."""
        kind = TARGET.search(self.line) or (self.op == "fusion" and re.search(r'"kind":"([^"]+)"', self.line))
        if kind:
            return next((name for part, name in LIBRARIES.items() if part in kind[1].lower()), kind[1])
        if self.op == "dot":
            return "XLA dot (Eigen on CPUs)"
        fusion = re.search(r"kind=(k\w+)", self.line) if self.op == "fusion" else None
        return f"XLA fusion ({fusion[1]})" if fusion else f"XLA {self.op}"


class Matmul(NamedTuple):
    """Matmuls of one shape by one kernel."""

    shapes: str  # f32[768,128] x f32[128,512]
    kernel: str
    runs: int
    flops: int  # of all runs


def collectives(text: str) -> Collectives:
    """What a device sends in one run of a program; loops count as in `computations`.

    The bytes are those of whole arrays: the result of a gather, the argument of a scatter.
    """
    counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    pieces = set()
    for name, (runs, lines) in computations(text).items():
        for line in lines:
            # The compiler for TPUs may split a collective into pieces of one chain, spread over the matmuls beside it.
            chain = re.search(r'chain_id="(\d+)"', line)
            for kind, n, size in _sent(line, scattered=name.startswith("all-reduce-scatter")):
                if chain and (kind, chain[1]) in pieces:
                    continue
                if chain:
                    pieces.add((kind, chain[1]))
                counts[kind, n][0] += runs
                counts[kind, n][1] += runs * size
    return {key: (n, size) for key, (n, size) in sorted(counts.items())}


def custom_calls(text: str) -> set[str]:
    """Targets of the calls of code that is not XLA's own."""
    return set(TARGET.findall(text))


def matmul_dtypes(text: str) -> Counter[str]:
    """dtypes of the operands of matmuls, "bf16 x bf16" -> how many matmuls of these the text has."""
    found: Counter[str] = Counter()
    for lines in _bodies(text)[1].values():
        body = {each.name: each for each in _parsed(lines)}
        for each in body.values():
            if each.op in ("dot", "convolution"):
                types = [body[arg].shape.partition("[")[0] if arg in body else "?" for arg in each.args]
                found[" x ".join(types)] += 1
    return found


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions that run on their own, by name: without those inside a fusion or a reduction's function."""
    found = computations(text)
    inner = {name for _, lines in found.values() for line in lines for name in _inner(line)}
    done = {}
    for computation, (runs, lines) in found.items():
        for each in _parsed(lines) if computation not in inner else ():
            fused = [op for name in FUSED.findall(each.line) for op in _parsed(found[name][1])]
            inside = tuple(op.op for op in fused if op.op not in FREE) if each.op == "fusion" else ()
            done[each.name] = Instruction(each.name, each.op, each.shape, each.args, each.line, runs, inside)
    return done


def fusions(found: dict[str, Instruction]) -> list[Instruction]:
    """The fusions, those with the most operations inside first."""
    return sorted((each for each in found.values() if each.op == "fusion"), key=lambda each: -len(each.inside))


def matmuls(text: str) -> list[Matmul]:
    """The matmuls of a program, most FLOPs first. Of custom calls those that name the contracted axes, as cuBLAS's and
    oneDNN's do."""
    own = instructions(text)
    owner = {name: each for each in own.values() if each.op == "fusion" for name in FUSED.findall(each.line)}
    counts: Counter[tuple[str, str]] = Counter()
    flops: Counter[tuple[str, str]] = Counter()
    for computation, (runs, lines) in computations(text).items():
        body = {each.name: each for each in _parsed(lines)}
        for each in body.values():
            shapes = [body[arg].shape.split("{")[0] if arg in body else "?" for arg in each.args[:2]]
            if each.op in ("dot", "custom-call") and (terms := _matmul_flops(each, shapes)):
                by = owner.get(computation) or own.get(each.name)
                key = " x ".join(shapes), by.kernel if by else "?"
                counts[key] += runs
                flops[key] += runs * terms
    return sorted((Matmul(*key, counts[key], flops[key]) for key in counts), key=lambda matmul: -matmul.flops)


def _matmul_flops(each: Instruction, shapes: list[str]) -> int:
    """FLOPs of one run, 0 if it is no matmul."""
    if not shapes or not SHAPE.search(shapes[0]):
        return 0
    sizes = _dims(shapes[0])
    if dims := CONTRACTED.search(each.line):
        axes = [int(n) for n in re.findall(r"\d+", dims[1])]
    elif "onednn$matmul" in each.line:
        axes = [len(sizes) - 1]
    else:
        return 0
    return 2 * math.prod(_dims(each.shape)) * math.prod(sizes[axis] for axis in axes)


def computations(text: str) -> dict[str, tuple[int, list[str]]]:
    """Name -> (runs in one run of the program, lines) of each computation that runs.

    The body of a loop counts once per iteration, if XLA gives their number or the condition compares a counter from
    zero with a constant, else once.
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
    """The name of the entry computation, and the lines of each computation."""
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


def _parsed(lines: list[str]) -> Iterator[Instruction]:
    for line in lines:
        if each := INSTRUCTION.match(line):
            args = tuple(arg.strip().lstrip("%") for arg in each["args"].split(","))
            yield Instruction(each["name"], each["op"], each["shape"], args, line)


def _inner(line: str) -> list[str]:
    """The computations inside an instruction, as opposed to those that a loop, a branch or a call runs."""
    return [] if " call(" in line else re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", line)


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Iterations of a while loop."""
    if found := TRIPS.search(line):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = "\n".join(bodies.get(condition[1], [])) if condition else ""
    end = re.search(r"ROOT .* compare\(.*%?\b([\w.-]+)\), direction=LT", lines)
    constant = end and re.search(rf"%?{re.escape(end[1])} = s32\[\]\S* constant\((\d+)\)", lines)
    return int(constant[1]) if constant else 1


def _sent(line: str, scattered: bool) -> Iterator[tuple[str, int, int]]:
    """The collective of an instruction, if it is one: its kind, devices per group, bytes.

    Args:
      scattered: an all-reduce of which each device keeps a shard, as the compiler for TPUs writes a reduce-scatter.
    """
    for kind in KINDS:
        if found := re.search(rf" = (.*?) {kind}(-start)?\(", line):
            n = 2 if kind == "collective-permute" else _group_size(line)
            sizes = _bytes(found[1])
            if found[2] and kind != "all-reduce":  # the result of a start: arguments, results and scratch space
                size = max(sizes)
            else:
                size = sum(sizes) * (n if kind == "reduce-scatter" else 1)
            if n > 1:
                yield "reduce-scatter" if kind == "all-reduce" and scattered else kind, n, size


def _group_size(line: str) -> int:
    """Devices in a group of a collective, in any of the three notations of HLO."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(found[1].split(",")) if found else 1


def _dims(shape: str) -> list[int]:
    """Of the first array in a shape."""
    return [int(n) for n in SHAPE.findall(shape)[0][1].split(",") if n]


def _bytes(shape: str) -> list[int]:
    """Of each array in a shape."""
    arrays = SHAPE.findall(shape)
    return [
        (BITS.get(dtype) or int(dtype[1:])) * math.prod(int(n) for n in dims.split(",") if n) // 8
        for dtype, dims in arrays
    ]
