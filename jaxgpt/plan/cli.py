"""`jaxgpt plan`: whether a recipe fits on devices that are not attached, and how fast it might run."""

import os
from dataclasses import dataclass

from jaxgpt.cli.options import parse, refuse_unused, take_recipe
from jaxgpt.config import Config, UsageError, check
from jaxgpt.recipes import recipe


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
    from jaxgpt.plan import view

    if given.chips:
        return 0 if view.print_estimates(config, given.chip, given.chips, given.mesh, given.sweep) else 1
    return 0 if view.print_plan(config, given.topology, given.mesh, given.sweep) else 1
