"""The cost of each instruction of a compiled program, read from its optimized HLO text: kernel, FLOPs, memory traffic,
collectives. `compiled.cost_analysis()` gives totals only, and counts the body of a loop once."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "c64": 64}
SHAPE = re.compile(r"\b(pred|bf16|c64|[fsu]\d+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=(%?[\w.-]+|\{[^}]*\})")
INLINED = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(([^)]*)\)")
"""Name, shape, op, arguments."""
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
TARGET = re.compile(r'custom_call_target="([^"]+)"')
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "while", "call", "conditional"}
"""Instructions that neither compute nor move anything themselves."""
NO_FLOPS = {"broadcast", "concatenate", "convert", "copy", "custom-call", "dynamic-slice", "dynamic-update-slice",
            "gather", "pad", "reshape", "reverse", "slice", "transpose"} | FREE  # fmt: skip
"""Instructions without FLOPs; all others but matmuls count one for each element."""
LIBRARIES = {"ynn": "YNNPACK", "xnn": "XNNPACK", "onednn": "oneDNN", "triton": "Triton", "cublas": "cuBLAS",
             "cudnn": "cuDNN"}  # fmt: skip
"""Part of a fusion's kind or of a custom call's target -> the library that computes it."""

Collectives = dict[tuple[str, int], tuple[int, int]]
"""(kind, devices per group) -> (how many, bytes)."""


@dataclass(frozen=True)
class Instruction:
    """An HLO instruction; FLOPs and bytes are those of one run."""

    name: str
    op: str
    shape: str
    args: tuple[str, ...]
    operands: tuple[str, ...]  # the shapes of `args`
    line: str
    runs: int = 1  # in one run of the program
    body: tuple["Instruction", ...] = ()  # the instructions inside a fusion, the root last

    @property
    def origin(self) -> str:
        """The scope in which it was traced, the same for every block, such as
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
        """2 M N K of a dot, of a convolution, as which TPUs compute one, or of a custom call that names the contracted
        axes, as cuBLAS's and oneDNN's do."""
        if self.op not in ("dot", "convolution", "custom-call") or not SHAPE.search(self.operands[0]):
            return 0
        sizes, dims = _dims(self.operands[0]), CONTRACTED.search(self.line)
        labels = re.search(r"dim_labels=(\w+)_", self.line)
        if not dims and not labels and "onednn$matmul" not in self.line:
            return 0
        last = labels[1].index("f") if labels else len(sizes) - 1
        axes = [int(n) for n in re.findall(r"\d+", dims[1])] if dims else [last]
        return 2 * math.prod(_dims(self.shape)) * math.prod(sizes[axis] for axis in axes)

    @property
    def flops(self) -> int:
        """FLOPs of its matmuls, and one for each element that anything else computes or reduces."""
        if self.body:
            return sum(inner.flops for inner in self.body)
        if self.op in NO_FLOPS or self.op in ("dot", "convolution") or not SHAPE.search(self.shape):
            return self.matmul_flops
        return math.prod(_dims(self.operands[0] if self.op == "reduce" else self.shape))

    @property
    def bytes(self) -> int:
        """Memory traffic: operands and results; where only a slice of an array is read or written, the slice."""
        if self.op in FREE:
            return 0
        if not self.body:
            return _read(self, 0) + sum(map(_size, self.operands[1:])) + _written(self)
        total = 0
        for inner in self.body:
            if inner.op == "parameter":
                users = [user for user in self.body if inner.name in user.args]
                total += min(_size(inner.shape), sum(_read(user, user.args.index(inner.name)) for user in users))
        *others, root = self.body
        roots = [inner for inner in others if inner.name in root.args] if root.op == "tuple" else [root]
        return total + sum(map(_written, roots))


class Matmul(NamedTuple):
    """Matmuls of one shape by one kernel."""

    shapes: str  # f32[768,128] x f32[128,512]
    kernel: str
    runs: int
    flops: int  # of all runs


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions that run on their own, by name: without those inside a fusion or a reduction's function."""
    found = computations(text)
    callers = [each for body in found.values() for each in body if each.op != "call"]
    inlined = {name for each in callers for name in INLINED.findall(each.line)}
    known = {each.name: each for name, body in found.items() if name not in inlined for each in body}
    for name, each in known.items():
        if each.op == "fusion" and (called := INLINED.search(each.line)):
            known[name] = replace(each, body=tuple(found[called[1]]))
    return known


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


def custom_calls(text: str) -> set[str]:
    """Targets of the calls of code that is not XLA's own."""
    return set(TARGET.findall(text))


def collectives(text: str) -> Collectives:
    """What a device sends in one run of a program. The bytes are those of whole arrays: the result of a gather, the
    argument of a scatter."""
    found, chains = Collectives(), set[tuple[str, str]]()
    for name, body in computations(text).items():
        for each in body:
            kind, n = each.op.removesuffix("-start"), _group_size(each.line)
            if kind not in COLLECTIVES or n < 2:
                continue
            # The TPU compiler may split a collective into a chain of pieces, spread over the matmuls beside it.
            if chain := re.search(r'chain_id="(\d+)"', each.line):
                if (kind, chain[1]) in chains:
                    continue
                chains.add((kind, chain[1]))
            sizes = _sizes(each.shape)
            if each.op.endswith("-start") and kind != "all-reduce":  # its result: arguments, results, scratch space
                k = len(each.args)
                size = max(sum(sizes[:k]), sum(sizes[k : 2 * k]))
            else:
                size = sum(sizes) * (n if kind == "reduce-scatter" else 1)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # TPUs: each device keeps a shard
                kind = "reduce-scatter"
            times, n_bytes = found.get((kind, n), (0, 0))
            found[kind, n] = times + each.runs, n_bytes + each.runs * size
    return dict(sorted(found.items()))


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation that runs.

    The body of a loop counts once per iteration, if XLA gives their number or the condition compares a counter from
    zero with a constant, else once; every branch of a conditional counts.
    """
    entry, bodies = "", dict[str, list[Instruction]]()
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            body, shapes = bodies.setdefault(header[1], []), dict[str, str]()
            entry = header[1] if line.startswith("ENTRY") else entry
        elif bodies and (found := INSTRUCTION.match(line)):
            name, shape, op, listed = found.groups()
            args = tuple(arg.strip().lstrip("%") for arg in listed.split(","))
            operands = tuple(shapes.get(arg, "?") for arg in args)  # HLO defines names before it uses them
            body.append(Instruction(name, op, shape, args, operands, line))
            shapes[name] = shape
    runs: Counter[str] = Counter()

    def run(name: str, times: int) -> None:
        runs[name] += times
        for each in bodies[name]:
            inner = times * (_trip_count(each.line, bodies) if each.op == "while" else 1)
            for listed in CALLED.findall(each.line):
                for called in re.findall(r"[\w.-]+", listed):
                    if called in bodies:
                        run(called, inner)

    run(entry, 1)
    return {name: [replace(each, runs=times) for each in bodies[name]] for name, times in runs.items()}


def _trip_count(line: str, bodies: dict[str, list[Instruction]]) -> int:
    """Iterations of a while loop; 1 if unknown."""
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
    """Devices in a group of a collective, in any notation of HLO; 1 for other instructions."""
    if " collective-permute" in line:
        return 2
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(found[1].split(",")) if found else 1


def _read(user: Instruction, i: int) -> int:
    """Bytes that `user` reads of its operand `i`."""
    if i == 0 and user.op in ("dynamic-slice", "gather", "slice"):
        return _size(user.shape)
    if i == 0 and user.op == "dynamic-update-slice":
        return 0
    return _size(user.operands[i])


def _written(each: Instruction) -> int:
    """Bytes that an instruction writes."""
    return _size(each.operands[1] if each.op == "dynamic-update-slice" else each.shape)


def _dims(shape: str) -> list[int]:
    """Sizes of the first array in a shape."""
    return [int(n) for n in SHAPE.findall(shape)[0][1].split(",") if n]


def _size(shape: str) -> int:
    """Bytes of all arrays in a shape."""
    return sum(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    """Bytes of each array in a shape."""
    arrays = [(dtype, map(int, dims.split(",") if dims else [])) for dtype, dims in SHAPE.findall(shape)]
    return [(BITS.get(dtype) or int(dtype[1:])) * math.prod(dims) // 8 for dtype, dims in arrays]
