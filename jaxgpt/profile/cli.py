"""`jaxgpt ledger`: what `jit` costs and saves here. `jaxgpt inspect`: parameters, and the cost of the compiled step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from jaxgpt.cli import places
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, Folders, parse, refuse_unused, take_recipe
from jaxgpt.cli.places import local_path
from jaxgpt.config import Config, UsageError
from jaxgpt.recipes import RECIPES, recipe

Program = Literal["forward", "loss", "gradient", "step"]


@dataclass(frozen=True)
class Ledger:
    """Run one training step of a recipe op by op, jitted, donated, scanned, from the compile cache, with remat and in
    bfloat16: the cost of each before its first step, and per step. Takes some minutes; accepts every setting of the
    recipe."""

    config: Config
    variants: tuple[str, ...] = ()
    """Variants to run, such as jit eager "scan of 10"; all by default."""
    rounds: int = 5
    """Rounds of measurement, in which all variants take turns."""
    out: Path | None = None
    """The JSON file to write; None is ledger-RECIPE.json in the current folder."""
    plot: Path | None = None
    """Draw the stages and the steps, as .png, .svg, .pdf or .json (Vega-Lite); None draws nothing."""
    data_dir: DataDir = Path("data")


@dataclass(frozen=True)
class Inspect:
    """Parameters, FLOPs, memory traffic and memory of a recipe or a run, the kernels of its matmuls, and how far each
    part is below this machine's roofline. Accepts every setting of the recipe."""

    config: Config
    folders: Folders = field(default_factory=Folders)
    jaxpr: tuple[Program, ...] = ()
    """Print only the jaxprs of these programs."""
    hlo: tuple[Program, ...] = ()
    """Print only the optimized HLO of these programs."""
    measure: bool = True
    """Profile some steps, and time the machine and the step; else only compile and count."""
    profile: Path | None = None
    """Keep the profile of five steps in this folder, for XProf or Perfetto."""
    roofline: Path | None = None
    """Draw the parts under the roofline, as .png, .svg, .pdf or .json (Vega-Lite); None draws nothing."""


def run_ledger(args: list[str]) -> int:
    name, args = take_recipe(Ledger, args, "which recipe? jaxgpt ledger gpt-demo")
    default = Ledger(recipe(name).config)
    given = parse(Ledger, args, "ledger", Ledger.__doc__, default, name)
    if given.rounds < 1:
        raise UsageError(f"rounds is {given.rounds}, expected 1 or more")
    varied = "on variants, which set it themselves (compare them: --variants jit {})".format
    unused = {"precision": varied("bfloat16"), "remat": varied("'remat matmuls' 'remat blocks'")}
    refuse_unused(given.config.model, default.config.model, unused)
    refuse_unused(given.config.train, default.config.train, {"scan_steps": varied("'scan of 10' 'scan of 50'")})

    from jaxgpt.cli.runs import complete
    from jaxgpt.display import charts
    from jaxgpt.profile import ledger, plots, report

    variants = ledger.choose(given.variants)
    name = Path(name).stem  # of a recipe that is a file
    out = given.out or Path(f"ledger-{name}.json")
    places.require_file(out, "--out")
    places.require_file(given.plot, "--plot", out)
    if given.plot:
        charts.require(given.plot)
    found = ledger.measure(complete(given.config, given.data_dir), name, variants, given.rounds)
    report.save(found, out)
    print(report.markdown(found))
    if given.plot:
        charts.save(plots.ledger(found), given.plot)
    return 0


def run_inspect(args: list[str]) -> int:
    name, args = take_recipe(Inspect, args, "which recipe or run? jaxgpt inspect gpt-demo")
    default = Inspect(_config(name, args))
    given = parse(Inspect, args, "inspect", Inspect.__doc__, default, name)
    printed = "with --jaxpr and --hlo, which print nothing else" if given.jaxpr or given.hlo else ""
    unmeasured = printed or ("" if given.measure else "with --no-measure")
    refuse_unused(given, default, {"profile": unmeasured, "roofline": unmeasured})

    from jaxgpt.cli.runs import complete
    from jaxgpt.display import charts
    from jaxgpt.profile import inspection, plots, report

    places.require_file(given.roofline, "--roofline")
    if given.profile:
        places.require_writable(given.profile, "--profile")
    if given.roofline:
        charts.require(given.roofline)
    use_compile_cache()
    config = complete(given.config, given.folders.data_dir)
    if printed:
        programs = inspection.programs(config)
        for each in given.jaxpr:
            print(programs[each].traced.jaxpr)
        for each in given.hlo:
            print(programs[each].text)
        return 0
    found = inspection.inspect(config, name, measured=given.measure, trace_folder=given.profile)
    print(report.markdown(found))
    if given.roofline:
        charts.save(plots.roofline(found), given.roofline)
    return 0


def _config(name: str, args: list[str]) -> Config:
    """The config of a recipe or, if there is none of that name, of a run."""
    from jaxgpt.run import Run

    if name in RECIPES or name.endswith(".json"):
        return recipe(name).config
    folders, _ = tyro.cli(Folders, args=args, add_help=False, return_unknown_args=True)
    try:
        return Run.open(local_path(folders.runs_dir), name).config
    except UsageError as error:
        raise UsageError(f"{error}; nor is there a recipe of that name, only {', '.join(RECIPES)}") from error
