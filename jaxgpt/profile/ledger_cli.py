"""`jaxgpt ledger`: the costs and savings of `jit` on this machine."""

from dataclasses import dataclass
from pathlib import Path

from jaxgpt.cli import places
from jaxgpt.cli.options import DataDir, parse, take_recipe
from jaxgpt.config import Config, UsageError
from jaxgpt.recipes import recipe

ABOUT = (
    "Run one training step of a recipe op by op, jitted, donated, scanned, from the compile cache, with remat and in "
    "bfloat16: the cost of each before its first step, and per step. Takes some minutes; accepts every setting of the "
    "recipe."
)


@dataclass(frozen=True)
class Ledger:
    config: Config
    variants: tuple[str, ...] = ()
    """Variants to run, such as jit eager "scan of 10"; all by default."""
    rounds: int = 5
    """Rounds of measurement, in which all variants take turns."""
    seconds: float = 0.5
    """Seconds that each variant works in a round; at least one step or scan."""
    out: Path | None = None
    """The JSON file to write; None is ledger-RECIPE.json in the current folder."""
    plot: Path | None = None
    """Draw the stages and the steps, as .png, .svg, .pdf or .json (Vega-Lite); None draws nothing."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    name, args = take_recipe(Ledger, args, "which recipe? jaxgpt ledger gpt-demo")
    given = parse(Ledger, args, f"ledger {name}", ABOUT, default=Ledger(recipe(name).config))
    if given.rounds < 1:
        raise UsageError(f"rounds is {given.rounds}, expected 1 or more")

    from jaxgpt.cli.runs import complete
    from jaxgpt.display import charts
    from jaxgpt.profile import ledger, plots, report

    ledger.require_not_varied(given.config, recipe(name).config)
    variants = ledger.choose(given.variants)
    name = Path(name).stem  # of a recipe that is a file
    out = given.out or Path(f"ledger-{name}.json")
    places.require_file(out, "--out")
    places.require_file(given.plot, "--plot")
    if given.plot:
        charts.require(given.plot)
    found = ledger.measure(complete(given.config, given.data_dir), name, variants, given.rounds, given.seconds)
    report.save(found, out)
    if given.plot:
        charts.save(plots.ledger(found), given.plot)
    print(report.markdown(found))
    return 0
