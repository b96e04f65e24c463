"""`jaxgpt plan`: whether a recipe fits on devices that are not attached, and how fast it might run."""

import os
from dataclasses import dataclass

from jaxgpt.cli.options import parse, refuse_unused, take_recipe
from jaxgpt.config import Config, UsageError, check
from jaxgpt.recipes import recipe

SHOWN = 10
"""Rows of a ranking."""


@dataclass(frozen=True)
class PlanOptions:
    config: Config
    topology: str = "v5e:16x16"
    """Chips and their arrangement: v5e:16x16, v5p:4x4x4, v6e:8x8; a100:8, h100:8, h200:8, b200:8; cpu:8 for virtual
    devices."""
    mesh: str = "auto"
    """Device mesh: sizes of data, fsdp, tensor and context, as in data=64,fsdp=4; or auto."""
    sweep: bool = False
    """Rank meshes and batch sizes, a quarter to four times that of the recipe, by estimate, and compile the best."""
    chips: tuple[int, ...] = ()
    """Only estimate, for this many chips; several numbers give a table of the best of each."""
    chip: str = "v5e"
    """Kind of chip for --chips: v4, v5e, v5p, v6e, a100, h100, h100-pcie, h100-nvl, h200, h200-nvl, b200."""


def run(args: list[str]) -> int:
    name, args = take_recipe(PlanOptions, args, "which recipe? jaxgpt plan gpt2-1.5b --topology v5e:16x16", "gpt2-1.5b")
    default = PlanOptions(recipe(name).config)
    given = parse(PlanOptions, args, "plan", default=default, recipe=name)
    unused = {
        "chip": "" if given.chips else "without --chips",
        "topology": "with --chips, which compiles nothing" if given.chips else "",
        "mesh": "with --sweep, which ranks meshes" if given.sweep else "",
    }
    refuse_unused(given, default, unused)
    config = check(given.config)
    if config.model.kind != "gpt":
        raise UsageError(f"{name} is a {config.model.kind}: only a GPT can be planned")
    if not config.model.vocab_size:
        raise UsageError(f"the vocabulary size of {name} depends on its text: give it, --vocab-size 65")
    if given.chips and min(given.chips) < 1:
        raise UsageError(f"--chips {min(given.chips)}: expected 1 or more")
    os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for TPUs and GPUs needs none
    fits = _estimate(given, config) if given.chips else _compile(given, config)
    return 0 if fits else 1


def _estimate(given: PlanOptions, config: Config) -> bool:
    """Print the estimate for --chips and --mesh, or a ranking of meshes; return whether the step, or the best
    of each number of chips, fits."""
    from jaxgpt.cli.mesh import check
    from jaxgpt.monitor.chips import CHIPS
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.plan import plan, view
    from jaxgpt.plan.estimate import estimate
    from jaxgpt.sharding import Sizes

    if given.chip not in CHIPS:
        raise plan.PlanError(f"no chip {given.chip!r}: expected one of {', '.join(CHIPS)}")
    chip, config = CHIPS[given.chip], plan.resolved(config)
    if given.mesh != "auto":
        check(config, sizes := Sizes.parse(given.mesh))
        if given.chips != (sizes.devices,):
            raise plan.PlanError(f"the mesh {sizes} has {sizes.devices} chips: give --chips {sizes.devices}")
        plan.require_pods(chip, sizes)
        bests = [estimate(config, chip, sizes)]
        lines = view.estimated(given.chip, bests[0])
    else:
        shown = SHOWN if len(given.chips) == 1 else 1
        rankings = [plan.ranked(config, chip, n, given.sweep)[:shown] for n in given.chips]
        bests, lines = [steps[0] for steps in rankings], view.table([step for steps in rankings for step in steps])
    RunConsole().print(*lines, sep="\n")
    return all(step.fits for step in bests)


def _compile(given: PlanOptions, config: Config) -> bool:
    """Print the step compiled for --topology, with --sweep on the best mesh of a ranking, or its estimate if it is too
    large for the compiler; return whether it fits."""
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.plan import plan, view
    from jaxgpt.plan.estimate import estimate
    from jaxgpt.plan.topology import topology
    from jaxgpt.sharding import Sizes

    console, (chip, devices) = RunConsole(), topology(given.topology)
    config = plan.resolved(config, "bfloat16" if chip else "float32")
    asked = None if given.mesh == "auto" else Sizes.parse(given.mesh)
    if given.sweep:
        if chip is None:
            raise UsageError("--sweep ranks by the rates of chips, which virtual devices lack: another --topology")
        steps = plan.ranked(config, chip, len(devices), sweep=True)
        console.print(*view.table(steps[:SHOWN]), sep="\n")
        config, asked = steps[0].config, steps[0].sizes
    sizes = plan.mesh(config, chip, devices, asked)
    try:
        found = plan.plan(config, chip, devices, sizes)
        fits, lines = found.step.fits, view.compiled(given.topology, found)
    except plan.TooLargeError as error:
        if chip is None:
            raise
        fits, lines = False, view.estimated(given.topology, estimate(config, chip, sizes), str(error))
    console.print(*lines, sep="\n")
    return fits
