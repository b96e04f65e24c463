"""`jaxgpt plan`: whether a recipe fits on devices that are not attached, and how fast it might be there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxgpt.cli import COMMANDS
from jaxgpt.cli.options import parse, refuse_unused, take_recipe
from jaxgpt.config import Config, UsageError, check
from jaxgpt.recipes import recipe

SHOWN = 10
"""Rows of a ranking."""


@dataclass(frozen=True)
class PlanOptions:
    config: Config
    topology: Annotated[
        str,
        tyro.conf.arg(help="Chips and their arrangement: v5e:16x16, v5p:4x4x4, v6e:8x8; cpu:8 for virtual devices."),
    ] = "v5e:16x16"
    mesh: Annotated[str, tyro.conf.arg(help="As in train; auto chooses.")] = "auto"
    sweep: Annotated[
        bool, tyro.conf.arg(help="Rank meshes, and batches from a quarter to four times, on paper; compile the best.")
    ] = False
    compiled: Annotated[int, tyro.conf.arg(help="How many of the best a sweep compiles.")] = 1
    effort: Annotated[
        Literal["least", "full"],
        tyro.conf.arg(help="Of the compiler: full is what training gets, and five times slower."),
    ] = "least"
    chips: Annotated[
        tuple[int, ...],
        tyro.conf.arg(help="On paper only, for so many chips: one number, or several for a table of the best of each."),
    ] = ()
    chip: Annotated[str, tyro.conf.arg(help="Of --chips: v4, v5e, v5p, v6e, a100, h100, h200.")] = "v5e"


def run(args: list[str]) -> int:
    missing = "which recipe? jaxgpt plan gpt2-1.5b --topology v5e:16x16"
    name, args = take_recipe(PlanOptions, args, missing, "gpt2-1.5b")
    default = PlanOptions(recipe(name).config)
    given = parse(PlanOptions, args, f"plan {name}", COMMANDS["plan"][1], default=default)
    on_paper = "with --chips, which compiles nothing" if given.chips else ""
    unused = {
        "chip": "" if given.chips else "without --chips",
        "topology": on_paper,
        "effort": on_paper,
        "compiled": on_paper or ("" if given.sweep else "without --sweep"),
        "mesh": "with --sweep, which ranks meshes" if given.sweep else "",
    }
    refuse_unused(given, default, unused)
    config = check(given.config)
    if not config.model.vocab_size:
        raise UsageError(f"the vocabulary of {name} is known only with its text: say its size, --vocab-size 65")
    if given.chips and min(given.chips) < 1:
        raise UsageError(f"--chips {min(given.chips)}: expected 1 or more")

    import os

    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler for TPUs is no device
    from jaxgpt.monitor.terminal import RunConsole

    console, told = RunConsole(), list[bool]()
    for line, fits in _on_paper(given, config) if given.chips else _compiled(given, config):
        console.print(line)
        told.append(fits)
    return 0 if all(told) else 1


def _on_paper(given: PlanOptions, config: Config) -> Iterator[tuple[str, bool]]:
    """Lines, each with whether it fits so far."""
    from jaxgpt.mesh import Sizes
    from jaxgpt.plan import plan, rank
    from jaxgpt.plan import view as plans

    chip, config = plan.chip(given.chip), plan.resolved(config)
    if given.mesh != "auto":
        step = rank.on_paper(config, chip, Sizes.parse(given.mesh), given.chips)
        yield from ((line, step.fits) for line in plans.on_paper(config, given.chip, step))
        return
    batches, shown = rank.batches(config) if given.sweep else (), SHOWN if len(given.chips) == 1 else 1
    steps = [step for n in given.chips for step in rank.ranked(config, chip, n, batches)[:shown]]
    yield from ((line, steps[0][1].fits) for line in plans.table(steps))


def _compiled(given: PlanOptions, config: Config) -> Iterator[tuple[str, bool]]:
    from jaxgpt.mesh import Sizes
    from jaxgpt.plan import estimate, plan, rank
    from jaxgpt.plan import view as plans

    chip, devices = plan.topology(given.topology)
    tried = [(config, None if given.mesh == "auto" else Sizes.parse(given.mesh))]
    if given.sweep:
        if chip is None:
            raise UsageError(
                "--sweep ranks by the rates of chips, which virtual devices have not: say a TPU's --topology"
            )
        config = plan.resolved(config)
        steps = rank.ranked(config, chip, len(devices), rank.batches(config))
        yield from ((line, True) for line in plans.table(steps[:SHOWN]))
        tried = [(config, step.sizes) for config, step in steps[: given.compiled]]
    for config, asked in tried:
        config = plan.resolved(config, "bfloat16" if chip else "float32")
        sizes = plan.mesh(config, chip, devices, asked)
        try:
            found = plan.plan(config, chip, devices, sizes, given.effort)
        except plan.TooLargeError as error:
            if chip is None:
                raise
            paper = estimate.on_paper(config, chip, sizes)
            yield from ((line, False) for line in plans.refused(config, given.topology, str(error), paper))
        else:
            yield from ((line, found.step.fits) for line in plans.lines(config, given.topology, found))
