"""`jaxgpt ledger`: what `jit` costs, and what it saves, on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt.bench import ledger
from jaxgpt.cli.options import DataDir, parse, take_recipe
from jaxgpt.config import Config, UsageError
from jaxgpt.recipes import recipe


@dataclass(frozen=True)
class Ledger:
    config: Config
    variants: tuple[str, ...] = ledger.BY_DEFAULT
    """Which ways to run the step; "torch compiled" is one more, and takes a minute."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where all of them compute."""
    rounds: int = 5
    """How often each is asked for some steps, in turn."""
    seconds: float = 0.5
    """How long each works in a round, at least a step, or a whole scan."""
    starts: int = 1
    """How often each is started afresh, to measure its stages again."""
    markdown: bool = False
    """Print Markdown in place of the terminal's tables."""
    out: Path | None = None
    """Where the JSON goes; None is ledger-RECIPE.json in the current folder."""
    plot: Path | None = None
    """Where to draw the stages and the steps, a PNG, SVG or PDF; None draws nothing."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    name, args = take_recipe(Ledger, args, "which recipe? jaxgpt ledger gpt-demo")
    given = parse(Ledger, args, f"ledger {name}", ABOUT, default=Ledger(recipe(name).config))
    for option in ("rounds", "starts"):
        if getattr(given, option) < 1:
            raise UsageError(f"{option} is {getattr(given, option)}, expected 1 or more")
    ledger.require_not_varied(given.config, recipe(name).config)

    from jaxgpt import files as disk
    from jaxgpt import memory
    from jaxgpt.bench import table
    from jaxgpt.cli.runs import complete
    from jaxgpt.display import plots
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.profile import ledger_plot as ledgers
    from jaxgpt.profile import measured

    name = Path(name).stem  # of a recipe that is a file
    out = given.out or Path(f"ledger-{name}.json")
    disk.require_file(out, "--out")
    disk.require_file(given.plot, "--plot")
    if given.plot:
        plots.require(given.plot)
    config = complete(given.config, given.data_dir)
    free = memory.host_available() if given.device == "cpu" else None
    report = ledger.measure(config, name, given.variants, given.device, given.rounds, given.seconds, given.starts, free)
    table.save(report, out)
    if given.plot:
        ledgers.draw(report, given.plot)
    if given.markdown:
        print(table.markdown(report))
    else:
        console = RunConsole()
        for part in measured.parts(report, console.width):
            console.print(part)
    return 0


ABOUT = (
    "One training step of a recipe op by op, jitted, donated, scanned, cached, recomputed, in bfloat16 and in PyTorch: "
    "what each costs before its first step, and what a step costs then. Some minutes; any setting of the recipe can be "
    "given."
)
