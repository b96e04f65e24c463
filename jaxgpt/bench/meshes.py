"""What splitting a training step over a mesh costs, on virtual devices that share the cores of one CPU.

The work is the same whatever the mesh, and so are the cores: a ratio above 1 is the overhead of partitioning (copies
between devices, smaller products, waiting for one another), no measure of speed on devices of their own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.facts import facts
from jaxgpt.bench.ruler import Contest
from jaxgpt.bench.shapes import config_of
from jaxgpt.bench.table import Report
from jaxgpt.config import Config, to_tree

DEVICES = 8
STRONG = ("data=2", "data=4", "data=8", "fsdp=2", "fsdp=4", "fsdp=8", "tensor=2", "tensor=8", "context=2", "context=8")
WEAK = {"data=2": 2, "data=4": 4, "data=8": 8, "fsdp=2": 2, "fsdp=4": 4, "fsdp=8": 8}
"""Mesh to how many devices it has, each with PER_DEVICE sequences."""
PER_DEVICE = 4
NOTES = (
    f"Virtual devices of one CPU ({DEVICES}, each mesh takes the first of them); times are of rounds in turn, and "
    "ratios are taken round by round: median (least to greatest).",
    "Strong: the same step over more devices, beside one device. Weak: a batch that grows with the devices, "
    f"{PER_DEVICE} sequences each, beside one device with the same whole batch.",
)


def config(shape: str, batch_size: int) -> Config:
    """A shape with sizes that every mesh here divides: 8 heads, a vocabulary of 64."""
    of = config_of(shape, "cpu")
    model = replace(of.model, n_head=DEVICES, vocab_size=64)
    return replace(of, model=model, train=replace(of.train, batch_size=batch_size))


def measure(
    shape: str = "tiny",
    rounds: int = 5,
    seconds: float = 2.0,
    until: float = float("inf"),
    patience: int = 0,
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on a step of `shape` over each mesh of STRONG and of WEAK."""
    most = DEVICES * PER_DEVICE
    entrants = {f"one, B {n * PER_DEVICE}": ("", n * PER_DEVICE) for n in sorted({*WEAK.values(), DEVICES})}
    entrants |= {f"{mesh}, B {most}": (mesh, most) for mesh in STRONG}
    entrants |= {f"{mesh}, B {n * PER_DEVICE}": (mesh, n * PER_DEVICE) for mesh, n in WEAK.items()}
    with Contest("cpu", tell) as contest:
        for name, (mesh, batch_size) in entrants.items():
            spec = {"task": "train-jaxgpt", "config": to_tree(config(shape, batch_size)), "mesh": mesh}
            contest.enter(name, spec, {"JAX_NUM_CPU_DEVICES": str(DEVICES if mesh else 1)})
        rates = contest.measure(rounds, seconds, until, patience)
    tokens = {
        name: batch_size * config(shape, batch_size).model.block_size for name, (_, batch_size) in entrants.items()
    }
    steps = {name: [tokens[name] / rate for rate in found] for name, found in rates.items()}

    def rows(meshes: dict[str, int]) -> list[dict[str, Any]]:
        found = {mesh: (f"{mesh}, B {size}", f"one, B {size}") for mesh, size in meshes.items()}
        return [
            {
                "mesh": mesh,
                "B": meshes[mesh],
                "time, of one device's": ruler.ratio(steps[over], steps[one]),
                "ms/step": 1e3 * ruler.series(steps[over])["median"],
            }
            for mesh, (over, one) in found.items()
            if over in steps and one in steps
        ]

    return {
        "mode": "meshes",
        "facts": facts("cpu") | {"device": contest.device_name},
        "notes": [*NOTES, contest.quiet()],
        "failed": contest.failed,
        "tables": [
            {"title": f"Strong scaling of {shape}", "rows": rows(dict.fromkeys(STRONG, most))},
            {
                "title": f"Weak scaling of {shape}",
                "rows": rows({mesh: n * PER_DEVICE for mesh, n in WEAK.items()}),
            },
        ],
        "seconds_per_step": steps,
    }
