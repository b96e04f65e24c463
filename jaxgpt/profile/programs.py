"""What the compiler made of a function, read from its optimised HLO: fusions, products, and what computes them."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from jaxgpt.profile import hlo

INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<args>[^)]*)\)"
)
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
KIND = re.compile(r'"kind":"([^"]+)"')
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
"""By a part of what HLO calls a fusion's kind, or the target of a custom call."""


@dataclass(frozen=True)
class Instruction:
    """An instruction of a program as it runs."""

    name: str
    op: str
    shape: str
    line: str
    runs: int
    """In one run of the program."""
    inside: tuple[str, ...] = ()
    """What a fusion fuses."""

    @property
    def origin(self) -> str:
        """Where in the model it comes from, the same in every block: transpose(jvp(GPT))/h_*/mlp/c_fc/dot_general is of
        a backward pass. Empty where XLA made it up."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return re.sub(r"\bh_\d+/", "h_*/", found[1].split(";")[0].partition("/")[2]) if found else ""

    @property
    def bytes(self) -> int:
        """Of its result."""
        return sum(
            math.prod(map(int, filter(None, dims.split(",")))) * hlo.width(kind) // 8
            for kind, dims in hlo.SHAPE.findall(self.shape)
        )

    @property
    def kernel(self) -> str:
        """What computes it: a library's name, or XLA's own code."""
        target = TARGET.search(self.line)
        kind = target or (KIND.search(self.line) if self.op == "fusion" else None)
        if kind:
            return next((name for part, name in LIBRARIES.items() if part in kind[1].lower()), kind[1])
        if self.op == "dot":
            return "XLA dot (Eigen on CPUs)"
        return f"XLA fusion ({fusion_kind(self.line)})" if self.op == "fusion" else f"XLA {self.op}"


class Product(NamedTuple):
    """Products of one shape by one kernel."""

    shapes: str  # as in f32[768,128] x f32[128,512]
    kernel: str
    runs: int
    flops: int  # of all these runs


def instructions(text: str) -> dict[str, Instruction]:
    """Every instruction that runs on its own, by its name: no part of a fusion, nor of what a reduction does to each
    pair of numbers."""
    found = hlo.computations(text)
    inner = {name for _, lines in found.values() for line in lines for name in _inner(line)}
    done = {}
    for computation, (runs, lines) in found.items():
        if computation in inner:
            continue
        for line in lines:
            if each := INSTRUCTION.match(line):
                inside: tuple[str, ...] = ()
                if each["op"] == "fusion":
                    inside = tuple(op for called in _called(line) for op in _operations(found[called][1]))
                done[each["name"]] = Instruction(each["name"], each["op"], each["shape"], line, runs, inside)
    return done


def fusions(found: dict[str, Instruction]) -> list[Instruction]:
    """The fusions, those with the most operations inside first."""
    return sorted((each for each in found.values() if each.op == "fusion"), key=lambda each: -len(each.inside))


def fusion_kind(line: str) -> str:
    """As HLO says it.

    >>> fusion_kind("%x = f32[2] fusion(%y), kind=kLoop, calls=%z")
    'kLoop'
    """
    found = re.search(r"kind=(k\w+)", line)
    return found[1] if found else "?"


def products(text: str) -> list[Product]:
    """The products of a program, those with the most operations first; of custom calls those that name what they sum
    over, as cuBLAS's and oneDNN's do."""
    found, own = hlo.computations(text), instructions(text)
    owner = {called: each for each in own.values() if each.op == "fusion" for called in _called(each.line)}
    counts: Counter[tuple[str, str]] = Counter()
    flops: Counter[tuple[str, str]] = Counter()
    for computation, (runs, lines) in found.items():
        shapes = {each["name"]: each["shape"] for line in lines if (each := INSTRUCTION.match(line))}
        for line in lines:
            each = INSTRUCTION.match(line)
            if not each or each["op"] not in ("dot", "custom-call") or not (term := _terms(line, each["args"], shapes)):
                continue
            by = owner.get(computation) or own.get(each["name"])
            operands = [shapes.get(name.strip().lstrip("%"), "?").split("{")[0] for name in each["args"].split(",")[:2]]
            key = " x ".join(operands), by.kernel if by else "?"
            counts[key] += runs
            flops[key] += runs * term
    return sorted((Product(*key, counts[key], flops[key]) for key in counts), key=lambda product: -product.flops)


def _terms(line: str, args: str, shapes: dict[str, str]) -> int:
    """Operations of a product, 0 if it is none."""
    each = INSTRUCTION.match(line)
    dims = CONTRACTED.search(line)
    left = shapes.get(args.split(",")[0].strip().lstrip("%"), "")
    if not each or not hlo.SHAPE.search(left):
        return 0
    sizes = [int(n) for n in hlo.SHAPE.findall(left)[0][1].split(",") if n]
    if dims:
        axes = [int(n) for n in re.findall(r"\d+", dims[1])]
    elif "onednn$matmul" in line:
        axes = [len(sizes) - 1]
    else:
        return 0
    out = math.prod(int(n) for n in hlo.SHAPE.findall(each["shape"])[0][1].split(",") if n)
    return 2 * out * math.prod(sizes[axis] for axis in axes)


def _called(line: str) -> list[str]:
    return re.findall(r"\bcalls=%?([\w.-]+)", line)


def _inner(line: str) -> list[str]:
    """The computations that an instruction is made of, unlike those that a loop, a branch or a call runs."""
    if " call(" in line:
        return []
    return re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", line)


def _operations(lines: list[str]) -> list[str]:
    names = [each["op"] for line in lines if (each := INSTRUCTION.match(line))]
    return [name for name in names if name not in FREE]
