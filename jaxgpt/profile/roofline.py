"""The roofline of this machine, and how far below it each part of a training step is.

A part with F FLOPs and M bytes of memory traffic takes at least max(F / peak, M / bandwidth) (Williams, Waterman and
Patterson, "Roofline", 2009). Above F / M = peak / bandwidth, the ridge, compute is the limit; below, memory is.

The parts are the Flax modules named in the compiled step: FLOPs and bytes come from its HLO, times from a profile.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import prng
from jaxgpt.profile import hlo
from jaxgpt.profile.timing import repeat
from jaxgpt.profile.trace import Operation

N = 2048
"""Rows and columns of the matrices that measure peak FLOP/s: 2 N³ FLOPs."""
STREAMED = 2**26
"""float32 numbers in the array that measures bandwidth: 256 MB, more than most caches."""
OUTSIDE = "embeddings, head, loss"
"""The part of instructions that are traced in the model, but in none of its modules."""


class Machine(NamedTuple):
    flops: float  # matmul FLOP/s
    bandwidth: float  # bytes/s

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which compute is the limit."""
        return self.flops / self.bandwidth


class Part(NamedTuple):
    """The forward or the backward pass of one module, in all blocks, or the optimizer; all of one step."""

    name: str
    backward: bool
    flops: int
    bytes: int
    seconds: float

    def least(self, machine: Machine) -> float:
        """Its least possible seconds."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


def parts(text: str, operations: Iterable[Operation], steps: int, modules: Iterable[str]) -> list[Part]:
    """The parts of a compiled step, slowest first.

    Args:
      text: the optimized HLO of the step.
      operations: the profile of `steps` steps.
      modules: the names of the modules in the paths of parameters.
    """
    flops, moved = Counter[tuple[str, bool]](), Counter[tuple[str, bool]]()
    seconds = defaultdict[tuple[str, bool], float](float)
    names, known = set(modules), hlo.instructions(text)
    for each in known.values():
        key = part_of(each.origin, names)
        flops[key] += each.runs * each.flops
        moved[key] += each.runs * each.bytes
    for operation in operations:
        if ran := known.get(operation.name):
            seconds[part_of(ran.origin, names)] += operation.seconds / steps
    found = [Part(*key, flops[key], moved[key], seconds[key]) for key in moved if moved[key]]
    return sorted(found, key=lambda part: -part.seconds)


def part_of(origin: str, modules: set[str]) -> tuple[str, bool]:
    """The part of an instruction by its `hlo.Instruction.origin`, and whether it is in the backward pass.

    >>> part_of("transpose(jvp(GPT))/h_*/mlp/c_fc/dot_general", {"h_*", "mlp", "c_fc"})
    ('h_*/mlp/c_fc', True)
    >>> part_of("sqrt", set()), part_of("", set())
    (('optimizer', False), ('unnamed', False))
    """
    path = "/".join(name for name in re.sub(r"(^|/)h/", r"\1h_*/", origin).split("/") if name in modules)
    backward = "transpose(" in origin or "rematted" in origin
    if path or backward or "jvp(" in origin:
        return path or OUTSIDE, backward
    return "optimizer" if origin else "unnamed", False


def pass_of(name: str, backward: bool) -> str | None:
    """The pass of a part; None if it is in neither."""
    return "backward" if backward else None if name in ("optimizer", "unnamed") else "forward"


def rows(found: Iterable[Part], machine: Machine) -> list[dict[str, Any]]:
    return [
        {
            "part": part.name,
            "pass": pass_of(part.name, part.backward),
            "MFLOP": part.flops / 1e6,
            "MB": part.bytes / 1e6,
            "FLOP/byte": part.flops / part.bytes,
            "bound by": "compute" if part.flops / part.bytes > machine.ridge else "memory",
            "least, ms": 1e3 * part.least(machine),
            "measured, ms": 1e3 * part.seconds,
            "GFLOP/s": part.flops / part.seconds / 1e9,
            "of the roof, %": 100 * part.least(machine) / part.seconds,
        }
        for part in found
        if part.seconds
    ]


def measure_machine(dtype: str, n: int = N, streamed: int = STREAMED, seconds: float = 0.4, rounds: int = 3) -> Machine:
    """The best rates of some rounds on JAX's first device, each at least `seconds` long.

    Bandwidth: an array is read, scaled and written in place, 8 bytes a number as STREAM counts its "scale" (McCalpin
    1995). On a CPU a new array would cost a page fault every 4 kB, several times as slow as memory.
    """
    x = jax.random.normal(prng.key(0), (n, n), jnp.dtype(dtype))
    matmul = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    scale = jax.jit(lambda x: -1 * x, donate_argnums=0)
    array = [jnp.ones(streamed, jnp.float32)]

    def multiply() -> int:
        jax.block_until_ready(matmul(x))
        return 2 * n**3

    def stream() -> int:
        array[0] = jax.block_until_ready(scale(array[0]))
        return 8 * streamed

    def rate(run: Callable[[], int]) -> float:
        units, took = repeat(run, seconds)
        return units / took

    multiply()  # compiles
    stream()
    rates = [(rate(multiply), rate(stream)) for _ in range(rounds)]
    return Machine(*map(max, zip(*rates, strict=True)))
