"""What a compiled program does, read from its optimised HLO text: matmuls, fusions, libraries, memory traffic and
collectives of each instruction. `compiled.cost_analysis()` gives totals only, and counts the body of a loop once."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "c64": 64}
SHAPE = re.compile(r"\b(pred|bf16|c64|[fsu]\d+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
INNER = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<args>[^)]*)\)"
)
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
TARGET = re.compile(r'custom_call_target="([^"]+)"')
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "while", "call", "conditional"}
"""Instructions that compute nothing themselves."""
MOVES = {"broadcast", "concatenate", "convert", "copy", "custom-call", "dynamic-slice", "dynamic-update-slice",
         "gather", "pad", "reshape", "reverse", "slice", "transpose"} | FREE  # fmt: skip
"""Instructions without FLOPs; all others count one for each element."""
LIBRARIES = {"ynn": "YNNPACK", "xnn": "XNNPACK", "onednn": "oneDNN", "triton": "Triton", "cublas": "cuBLAS",
             "cudnn": "cuDNN"}  # fmt: skip
"""What a fusion's kind or a custom call's target contains -> the library that computes it."""

Collectives = dict[tuple[str, int], tuple[int, int]]
"""(kind, devices per group) -> (how many, bytes)."""


@dataclass(frozen=True)
class Instruction:
    """FLOPs and bytes are those of one run."""

    name: str
    op: str
    shape: str
    args: tuple[str, ...]
    line: str
    operands: tuple[str, ...] = ()
    """The shapes of `args`."""
    runs: int = 1
    """In one run of the program."""
    body: tuple["Instruction", ...] = ()
    """The instructions inside a fusion, the root last."""

    @property
    def origin(self) -> str:
        """The scope that it was traced in, the same for every block, such as
        transpose(jvp(GPT))/h_*/mlp/c_fc/dot_general of a backward pass. Empty if XLA made it up."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return re.sub(r"\bh_\d+/", "h_*/", found[1].split(";")[0].partition("/")[2]) if found else ""

    @property
    def kernel(self) -> str:
        """What computes it: the name of a library, or XLA's own code."""
        kind = TARGET.search(self.line) or (self.op == "fusion" and re.search(r'"kind":"([^"]+)"', self.line))
        if kind:
            return next((name for mark, name in LIBRARIES.items() if mark in kind[1].lower()), kind[1])
        if self.op == "dot":
            return "XLA dot (Eigen on CPUs)"
        fusion = re.search(r"kind=(k\w+)", self.line) if self.op == "fusion" else None
        return f"XLA fusion ({fusion[1]})" if fusion else f"XLA {self.op}"

    @property
    def matmul_flops(self) -> int:
        """2 M N K of a dot, or of a custom call that names the contracted axes, as cuBLAS's and oneDNN's do."""
        if self.op not in ("dot", "custom-call") or not self.operands or not SHAPE.search(self.operands[0]):
            return 0
        sizes, dims = _dims(self.operands[0]), CONTRACTED.search(self.line)
        if not dims and "onednn$matmul" not in self.line:
            return 0
        axes = [int(n) for n in re.findall(r"\d+", dims[1])] if dims else [len(sizes) - 1]
        return 2 * math.prod(_dims(self.shape)) * math.prod(sizes[axis] for axis in axes)

    @property
    def flops(self) -> int:
        """Those of the matmuls, and one for each element that anything else computes or reduces."""
        if self.body:
            return sum(each.flops for each in self.body)
        if self.op in MOVES or self.op == "dot" or not SHAPE.search(self.shape):
            return self.matmul_flops
        return math.prod(_dims(self.operands[0] if self.op == "reduce" and self.operands else self.shape))

    @property
    def bytes(self) -> int:
        """Memory traffic: operands and results; where only a slice of an array is read or written, the slice."""
        if self.op in FREE:
            return 0
        if not self.body:
            return _moved(self, 0) + sum(map(_size, self.operands[1:])) + _written(self)
        read = 0
        for each in self.body:
            if each.op == "parameter":
                users = [user for user in self.body if each.name in user.args]
                read += min(_size(each.shape), sum(_moved(user, user.args.index(each.name)) for user in users))
        *others, root = self.body
        roots = [each for each in others if each.name in root.args] if root.op == "tuple" else [root]
        return read + sum(map(_written, roots))


class Matmul(NamedTuple):
    """Matmuls of one shape by one kernel."""

    shapes: str  # f32[768,128] x f32[128,512]
    kernel: str
    runs: int
    flops: int  # of all runs


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions that run on their own, by name: without those inside a fusion or a reduction's function."""
    found = computations(text)
    called = [(each, INNER.findall(each.line)) for _, body in found.values() for each in body if each.op != "call"]
    inner = {name for _, names in called for name in names}
    bodies = {each.name: tuple(found[names[0]][1]) for each, names in called if each.op == "fusion" and names}
    return {
        each.name: replace(each, runs=runs, body=bodies.get(each.name, ()))
        for computation, (runs, body) in found.items()
        for each in body
        if computation not in inner
    }


def matmuls(text: str) -> list[Matmul]:
    """The matmuls of a program, most FLOPs first."""
    runs, flops = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for each in instructions(text).values():
        for inner in each.body or (each,):
            if inner.matmul_flops:
                key = " x ".join(shape.split("{")[0] for shape in inner.operands[:2]), each.kernel
                runs[key] += each.runs
                flops[key] += each.runs * inner.matmul_flops
    return [Matmul(*key, runs[key], n) for key, n in flops.most_common()]


def matmul_dtypes(text: str) -> Counter[str]:
    """dtypes of the operands of matmuls, "bf16 x bf16" -> how many matmuls of these the text has."""
    return Counter(
        " x ".join(shape.partition("[")[0] for shape in each.operands)
        for _, body in computations(text).values()
        for each in body
        if each.op in ("dot", "convolution")
    )


def custom_calls(text: str) -> set[str]:
    """Targets of the calls of code that is not XLA's own."""
    return set(TARGET.findall(text))


def collectives(text: str) -> Collectives:
    """What a device sends in one run of a program. The bytes are those of whole arrays: the result of a gather, the
    argument of a scatter."""
    counts, pieces = dict[tuple[str, int], tuple[int, int]](), set[tuple[str, str]]()
    for name, (runs, body) in computations(text).items():
        for each in body:
            kind, n = each.op.removesuffix("-start"), _group_size(each.line)
            if kind not in KINDS or n < 2:
                continue
            # The compiler for TPUs may split a collective into pieces of one chain, spread over the matmuls beside it.
            if chain := re.search(r'chain_id="(\d+)"', each.line):
                if (kind, chain[1]) in pieces:
                    continue
                pieces.add((kind, chain[1]))
            sizes = _sizes(each.shape)
            if each.op.endswith("-start") and kind != "all-reduce":  # its result: arguments, results, scratch space
                size = max(sizes)
            else:
                size = sum(sizes) * (n if kind == "reduce-scatter" else 1)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # TPUs: each device keeps a shard
                kind = "reduce-scatter"
            times, total = counts.get((kind, n), (0, 0))
            counts[kind, n] = times + runs, total + runs * size
    return dict(sorted(counts.items()))


def computations(text: str) -> dict[str, tuple[int, list[Instruction]]]:
    """Name -> (runs in one run of the program, instructions) of each computation that runs.

    The body of a loop counts once per iteration, if XLA gives their number or the condition compares a counter from
    zero with a constant, else once; every branch of a conditional counts.
    """
    entry, bodies = "", dict[str, list[Instruction]]()
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            body = bodies.setdefault(found[1], [])
            entry = found[1] if line.startswith("ENTRY") else entry
        elif bodies and (each := INSTRUCTION.match(line)):
            args = tuple(arg.strip().lstrip("%") for arg in each["args"].split(","))
            body.append(Instruction(each["name"], each["op"], each["shape"], args, line))
    for name, body in bodies.items():
        shapes = {each.name: each.shape for each in body}
        bodies[name] = [replace(each, operands=tuple(shapes.get(arg, "?") for arg in each.args)) for each in body]
    runs: Counter[str] = Counter()

    def run(name: str, times: int) -> None:
        runs[name] += times
        for each in bodies[name]:
            trips = _trips(each.line, bodies) if each.op == "while" else 1
            for groups in CALLED.findall(each.line):
                for called in re.findall(r"[\w.-]+", " ".join(groups)):
                    if called in bodies:
                        run(called, times * trips)

    run(entry, 1)
    return {name: (times, bodies[name]) for name, times in runs.items()}


def _trips(line: str, bodies: dict[str, list[Instruction]]) -> int:
    """Iterations of a while loop."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    body = {each.name: each for each in bodies.get(condition[1], [])} if condition else {}
    for each in body.values():
        if "ROOT" in each.line and each.op == "compare" and "direction=LT" in each.line:
            end = re.search(r" constant\((\d+)\)", body[each.args[1]].line)
            return int(end[1]) if end else 1
    return 1


def _group_size(line: str) -> int:
    """Devices in a group of a collective, in any of the notations of HLO."""
    if " collective-permute" in line:
        return 2
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(found[1].split(",")) if found else 1


def _moved(user: Instruction, i: int) -> int:
    """Bytes that `user` reads of its operand `i`."""
    if i == 0 and user.op in ("dynamic-slice", "gather", "slice"):
        return _size(user.shape)
    return 0 if i == 0 and user.op == "dynamic-update-slice" else _size(user.operands[i]) if user.operands else 0


def _written(each: Instruction) -> int:
    return _size(each.operands[1] if each.op == "dynamic-update-slice" else each.shape)


def _dims(shape: str) -> list[int]:
    """Of the first array in a shape."""
    return [int(n) for n in SHAPE.findall(shape)[0][1].split(",") if n]


def _size(shape: str) -> int:
    """Bytes of all arrays in a shape."""
    return sum(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    """Bytes of each array in a shape."""
    return [
        (BITS.get(dtype) or int(dtype[1:])) * math.prod(int(n) for n in dims.split(",") if n) // 8
        for dtype, dims in SHAPE.findall(shape)
    ]
