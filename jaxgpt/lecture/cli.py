"""`jaxgpt lecture`: the models of the lecture, one by one."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, parse
from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig, check


@dataclass(frozen=True)
class Lecture:
    """Train the models of the lecture one by one, score each on the whole validation split, and sample from it."""

    corpus: str = "shakespeare"
    """A named corpus, a UTF-8 file or folder, or a prepared folder; the lecture's figures are for shakespeare."""
    seed: int = 1337
    """Fixes the initial parameters, the batches, the dropout and the samples."""
    scale_by: Literal["head-size", "channels"] = "head-size"
    """Attention is scaled by one over the root of this; the lecture's code first had the channels, a bug."""
    init: Literal["torch", "normal"] = "torch"
    """torch: PyTorch's defaults, as in the video; normal: standard deviation 0.02, as in later code."""
    steps: int = 0
    """Training steps of every model; 0: each model's own."""
    full: bool = False
    """Train the last model at the lecture's own size: for a GPU."""
    plot: Path | None = None
    """Where to draw the losses, a .png, .svg, .pdf or .json (Vega-Lite); None draws nothing."""
    json: Path | None = None
    """File for the results as JSON; None writes nothing."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    given = parse(Lecture, args, "lecture", Lecture.__doc__)
    from rich.console import Console

    from jaxgpt import files
    from jaxgpt.cli.runs import tokens_of
    from jaxgpt.display import charts
    from jaxgpt.lecture import ladder, plots
    from jaxgpt.lecture import view as tables

    use_compile_cache()
    rungs = ladder.configure(
        (*ladder.RUNGS[:-1], ladder.FULL) if given.full else ladder.RUNGS, given.scale_by, given.init, given.steps
    )
    files.require_file(given.plot, "--plot")
    files.require_file(given.json, "--json")
    if given.plot:
        charts.require(given.plot)
    longest = ModelConfig(block_size=max(rung.block_size for rung in rungs))
    config = check(Config(DataConfig(corpus=given.corpus), longest, train=TrainConfig(seed=given.seed)))
    corpus = tokens_of(config, given.data_dir)

    console, results = Console(highlight=False), []
    console.print(corpus.summary, soft_wrap=True)
    for result in ladder.climb(rungs, *corpus.split(config.data), corpus.tokenizer, given.seed):
        results.append(result)
        console.print(tables.line(result), markup=False, soft_wrap=True)
    console.print(tables.ladder(results))
    console.print(tables.samples(results))
    if given.plot:
        charts.save(plots.ladder(results), given.plot)
    if given.json:
        tree = {"corpus": corpus.summary, "seed": given.seed, "rungs": [asdict(result) for result in results]}
        files.write_atomically(given.json, (json.dumps(tree, indent=2) + "\n").encode())
    return 0
