"""The roofline of this machine, and how far below it each part of a training step is.

A part with F FLOPs and M bytes of memory traffic takes at least max(F / peak, M / bandwidth) (Williams, Waterman and
Patterson, "Roofline", 2009). Above F / M = peak / bandwidth, the ridge, compute is the limit; below, memory is.

A part is the forward or the backward pass of one Flax module named in the compiled step, in all blocks, or the
optimizer. FLOPs and bytes come from the step's HLO, times from a profile.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import prng
from jaxgpt.profile import hlo
from jaxgpt.profile.report import Rows
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


def rows(
    known: dict[str, hlo.Instruction], ran: Iterable[Operation], steps: int, modules: Iterable[str], machine: Machine
) -> Rows:
    """A row for each part of a compiled step that has run, with the figures of one step, slowest first.

    Args:
      known: the instructions of the step.
      ran: the profile of `steps` steps.
      modules: the names of the modules in the paths of parameters.
    """
    names, seconds = set(modules), {each.name: each.seconds / steps for each in ran}
    parts = defaultdict[tuple[str, str | None], list[float]](lambda: [0, 0, 0.0])
    for name, each in known.items():
        more = each.runs * each.flops, each.runs * each.bytes, seconds.get(name, 0.0)
        part = part_of(each.origin, names)
        parts[part] = [sum(pair) for pair in zip(parts[part], more, strict=True)]
    return [
        {
            "part": name,
            "pass": direction,
            "MFLOP": flops / 1e6,
            "MB": moved / 1e6,
            "FLOP/byte": flops / moved,
            "bound by": "compute" if flops / moved > machine.ridge else "memory",
            "least, ms": 1e3 * (least := max(flops / machine.flops, moved / machine.bandwidth)),
            "measured, ms": 1e3 * took,
            "GFLOP/s": flops / took / 1e9,
            "of the roof, %": 100 * least / took,
        }
        for (name, direction), (flops, moved, took) in sorted(parts.items(), key=lambda item: -item[1][2])
        if moved and took
    ]


def part_of(origin: str, modules: set[str]) -> tuple[str, str | None]:
    """The part of an instruction by its `hlo.Instruction.origin`, and its pass; None if it is in neither.

    >>> part_of("transpose(jvp(GPT))/h_*/mlp/c_fc/dot_general", {"h_*", "mlp", "c_fc"})
    ('h_*/mlp/c_fc', 'backward')
    >>> part_of("sqrt", set()), part_of("", set())
    (('optimizer', None), ('unnamed', None))
    """
    path = "/".join(name for name in re.sub(r"(^|/)h/", r"\1h_*/", origin).split("/") if name in modules)
    if "transpose(" in origin or "rematted" in origin:
        return path or OUTSIDE, "backward"
    if path or "jvp(" in origin:
        return path or OUTSIDE, "forward"
    return "optimizer" if origin else "unnamed", None


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

    multiply()  # compiles
    stream()
    both = (multiply, stream)
    rates = [[units / took for units, took in (repeat(run, seconds) for run in both)] for _ in range(rounds)]
    return Machine(*map(max, zip(*rates, strict=True)))
