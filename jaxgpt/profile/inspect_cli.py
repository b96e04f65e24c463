"""`jaxgpt inspect`: what a recipe or a run consists of, and what the compiler makes of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxgpt.cli import places
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Folders, parse, refuse_unused, take_recipe
from jaxgpt.config import Config, UsageError
from jaxgpt.recipes import RECIPES, recipe

Program = Literal["forward", "loss", "gradient", "step"]
ABOUT = (
    "Parameters, FLOPs, memory traffic and memory of a recipe or a run; its fusions, the kernels of its matmuls, "
    "and how far each part is from what this machine can do. Accepts every setting of the recipe."
)


@dataclass(frozen=True)
class Inspect:
    config: Config
    folders: Folders = field(default_factory=Folders)
    jaxpr: tuple[Program, ...] = ()
    """Only print the jaxpr of these."""
    hlo: tuple[Program, ...] = ()
    """Only print the optimised HLO of these."""
    measure: bool = True
    """Profile some steps, and time the machine and the step; otherwise only count and compile."""
    profile: Path | None = None
    """Keep the profile of five steps in this folder, for XProf or Perfetto."""
    roofline: Path | None = None
    """Where to draw the parts under the machine's roof, a .png, .svg, .pdf or .json (Vega-Lite); None draws nothing."""
    out: Path | None = None
    """Write the whole report as JSON; None writes nothing."""


def run(args: list[str]) -> int:
    name, args = take_recipe(Inspect, args, "which recipe or run? jaxgpt inspect gpt-demo")
    default = Inspect(_config(name, args))
    given = parse(Inspect, args, f"inspect {name}", ABOUT, default=default)
    texts, unmeasured = bool(given.jaxpr or given.hlo), "" if given.measure else "with --no-measure"
    printed = "with --jaxpr and --hlo, which print nothing else" if texts else ""
    unused = {"measure": printed, "out": printed, "profile": printed or unmeasured, "roofline": printed or unmeasured}
    refuse_unused(given, default, unused)

    from jaxgpt.cli.runs import complete
    from jaxgpt.display import charts
    from jaxgpt.profile import inspection, plots, report

    places.require_file(given.out, "--out")
    places.require_file(given.roofline, "--roofline")
    if given.profile:
        places.require_writable(given.profile, "--profile")
    if given.roofline:
        charts.require(given.roofline)
    use_compile_cache()
    config = complete(given.config, given.folders.data_dir)
    if texts:
        programs = inspection.programs(config)
        for each in given.jaxpr:
            print(programs[each].traced.jaxpr)
        for each in given.hlo:
            print(programs[each].text)
        return 0
    found = inspection.inspect(config, name, measured=given.measure, trace_folder=given.profile)
    if given.out:
        report.save(found, given.out)
    if given.roofline:
        charts.save(plots.roofline(found), given.roofline)
    print(report.markdown(found))
    return 0


def _config(name: str, args: list[str]) -> Config:
    """The config of the recipe of that name, or else of the run."""
    import argparse

    from jaxgpt.run import Run

    if name in RECIPES or name.endswith(".json"):
        return recipe(name).config
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--runs-dir", "--runs_dir", type=Path, default=Path("runs"))
    try:
        return Run.open(peek.parse_known_args(args)[0].runs_dir, name).config
    except UsageError as error:
        raise UsageError(f"{error}; nor is there a recipe of that name, only {', '.join(RECIPES)}") from error
