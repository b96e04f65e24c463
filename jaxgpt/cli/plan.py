"""`jaxgpt plan`: whether a recipe fits on devices that are not attached, and how fast it might be there."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxgpt.cli import VERBS
from jaxgpt.cli.options import parse
from jaxgpt.config import Config, UsageError, check
from jaxgpt.recipes import recipe


@dataclass(frozen=True)
class PlanOptions:
    config: Config
    topology: Annotated[str, tyro.conf.arg(help="Chips and their arrangement: v5e:16x16, v5p:4x4x4, v6e:8x8.")] = (
        "v5e:16x16"
    )
    mesh: Annotated[str, tyro.conf.arg(help="As in train; auto chooses.")] = "auto"


def run(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        if not {"-h", "--help"} & set(args):
            raise UsageError("which recipe? jaxgpt plan gpt2-124m --topology v5e:16x16")
        args = ["gpt2-124m", *args]
    name = args.pop(0)
    given = parse(PlanOptions, args, f"plan {name}", VERBS["plan"][1], default=PlanOptions(recipe(name).config))
    config = check(given.config)
    if not config.model.vocab_size:
        raise UsageError(f"the vocabulary of {name} is known only with its text: say its size, --vocab-size 65")

    import os

    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler for TPUs is no device
    from jaxgpt.report import plans
    from jaxgpt.report.terminal import RunConsole
    from jaxgpt.scaling import mesh, plan

    sizes = None if given.mesh == "auto" else mesh.Sizes.parse(given.mesh)
    chip, devices = plan.topology(given.topology)
    found = plan.plan(config, chip, devices, sizes)
    console = RunConsole()
    for line in plans.lines(config, given.topology, found):
        console.print(line)
    return 0 if found.fits else 1
