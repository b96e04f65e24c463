"""`jaxgpt train`: a recipe to a run, or a run further on."""

import argparse
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Folders, parse, words
from jaxgpt.config import Config, UsageError
from jaxgpt.recipes import RECIPES, recipe
from jaxgpt.training.run import Run

DEFAULT_RECIPE = "gpt-demo"


@dataclass(frozen=True)
class Train:
    run: str
    """Name of the run, a new folder in the runs folder."""
    config: Config
    folders: Folders = field(default_factory=Folders)
    resume: bool = False
    """Go on with an existing run: its own settings hold, but for the ones given here."""
    debug_nans: bool = False
    """End the run at the first step that comes to no number, and name the operation; slower."""


def run(args: list[str]) -> int:
    named = args.pop(0) if args and not args[0].startswith("-") else None
    args = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), arg) for arg in args]  # as tyro reads them
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--run")
    peek.add_argument("--resume", action="store_true")
    peek.add_argument("--runs-dir", type=Path, default=Path("runs"))
    try:
        peeked = peek.parse_known_args(args)[0]
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    name, existing = named or DEFAULT_RECIPE, None
    if peeked.resume and not {"-h", "--help"} & set(args):
        if named and peeked.run:
            raise UsageError(f"a resume takes its settings from the run: leave out {named!r}, or leave out --resume")
        existing = Run.named(peeked.runs_dir, peeked.run or name)
    defaults = Train(run=name, config=existing.config if existing else recipe(name).config)
    about = "" if existing else _about(name)
    given = parse(Train, args, f"train {name}", about, default=defaults)
    if given.resume != bool(existing):
        raise UsageError("--resume and --no-resume were both given")
    return _fit(given, existing)


def _about(name: str) -> str:
    known = RECIPES[name]
    return f"{known.about} ({known.hardware}: {known.time}; loss {known.loss}.) Recipes: {', '.join(RECIPES)}."


def _fit(given: Train, existing: Run | None) -> int:
    from jaxgpt import nn
    from jaxgpt.report.terminal import RunConsole, TrainingDisplay, describe, duration
    from jaxgpt.training.loop import fit
    from jaxgpt.training.memory import OutOfMemoryError
    from jaxgpt.training.start import resume, start

    use_compile_cache()
    if existing:
        run, corpus = existing, resume(given.config, existing, given.folders.data_dir)
        config = given.config
    else:
        run, corpus = start(given.config, given.run, given.folders.runs_dir, given.folders.data_dir)
        config = run.config
    console = RunConsole()
    console.print(corpus.summary)
    console.print(nn.describe(config.model))
    try:
        with TrainingDisplay(console, config.train.steps) as display:
            done = fit(run, corpus, display, config, given.debug_nans)
    except OutOfMemoryError:
        if not existing:  # nothing was trained, and another attempt needs the name
            shutil.rmtree(run.path)
        raise
    if display.notices:
        console.print(f"{display.notices} warnings on the way stand in {run.events_file}", style="bold yellow")
    if done.interrupted_by:
        again = words("train", run.path, given.folders, "--resume")
        console.print(f"interrupted at step {done.step:,} of {done.steps:,}; saved. Go on with: {again}")
        return 128 + done.interrupted_by
    first, last, best = done.scores[0], done.scores[-1], done.best
    console.print(
        f"{run.path}: step {done.step:,} in {duration(done.seconds)}"
        + (f", {done.tokens_per_second:,.0f} tokens/s" if done.tokens_per_second else "")
    )
    if first is not last:
        console.print(f"  before  {describe(first.evaluation)}")
    console.print(f"  after   {describe(last.evaluation)}")
    if best.step != last.step:
        console.print(f"  best    {describe(best.evaluation)}, at step {best.step:,}")
    console.print(f"Write with it: {words('sample', run.path, given.folders)}")
    return 0
