"""`jaxgpt lecture`: the ladder climbed, rung by rung."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, parse
from jaxgpt.config import Config, DataConfig, TrainConfig, check


@dataclass(frozen=True)
class Lecture:
    """Climb the lecture's ladder: train each rung, score it on the whole validation split, let it write."""

    corpus: str = "shakespeare"
    """A named corpus, a UTF-8 file or folder, or a prepared folder; the lecture's figures are for shakespeare."""
    seed: int = 1337
    """Fixes the initial parameters, the batches, the dropout and the samples."""
    scale_by: Literal["head-size", "channels"] = "head-size"
    """What attention is scaled by the root of: the lecture's code had the channels before a later fix."""
    init: Literal["torch", "normal"] = "torch"
    """torch: PyTorch's defaults, as in the video; normal: 0.02, which came after it."""
    steps: int = 0
    """Training steps of every rung, for a quick look; 0: each rung's own."""
    full: bool = False
    """The last rung at the lecture's own size: for a GPU."""
    plot: Path | None = None
    """Where to draw the losses, a PNG, SVG or PDF; None draws nothing."""
    json: Path | None = None
    """Where to write the results as JSON; None writes nothing."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    given = parse(Lecture, args, "lecture", Lecture.__doc__)
    from rich.console import Console

    from jaxgpt import files as disk
    from jaxgpt.display import plots
    from jaxgpt.lecture import ladder
    from jaxgpt.lecture import view as tables
    from jaxgpt.prepare.build import prepare_corpus

    use_compile_cache()
    check(Config(train=TrainConfig(seed=given.seed)))
    rungs = ladder.configure(
        (*ladder.RUNGS[:-1], ladder.FULL) if given.full else ladder.RUNGS, given.scale_by, given.init, given.steps
    )
    disk.require_file(given.plot, "--plot")
    disk.require_file(given.json, "--json")
    if given.plot:
        plots.require(given.plot)
    longest = max(rung.block_size for rung in rungs)
    corpus = prepare_corpus(given.corpus, data_dir=given.data_dir, block_size=longest).corpus

    console, results = Console(highlight=False), []
    console.print(corpus.summary, soft_wrap=True)
    for result in ladder.climb(rungs, *corpus.split(DataConfig()), corpus.tokenizer, given.seed):
        results.append(result)
        console.print(tables.line(result), markup=False, soft_wrap=True)
    console.print(tables.ladder(results))
    console.print(tables.samples(results))
    if given.plot:
        plots.ladder(results, given.plot)
    if given.json:
        told = ladder.to_json(results, corpus=corpus.summary, seed=given.seed)
        disk.write_atomically(given.json, told.encode())
    return 0
