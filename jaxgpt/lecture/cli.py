"""`jaxgpt lecture`: train the models of the lecture, one by one."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxgpt.cli import places
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, parse
from jaxgpt.config import Config, UsageError, check, replaced


@dataclass(frozen=True)
class Lecture:
    """Train the models of the lecture one by one, score each on the whole validation split, and sample from it."""

    corpus: str = "shakespeare"
    """A named corpus, a UTF-8 file or folder, or a prepared one (char); the lecture's losses are for shakespeare."""
    seed: int = 1337
    """Fixes the initial parameters, the batches, the dropout and the samples."""
    steps: int = 0
    """Training steps of every model; 0: each model's own number."""
    full: bool = False
    """Train the last model at the lecture's own size; needs a GPU."""
    plot: Path | None = None
    """File for a chart of the losses: .png, .svg, .pdf or .json (Vega-Lite); None draws nothing."""
    json: Path | None = None
    """File for the results as JSON; None writes nothing."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    given = parse(Lecture, args, "lecture", Lecture.__doc__)
    from jaxgpt import files
    from jaxgpt.cli.runs import prepared
    from jaxgpt.display import charts
    from jaxgpt.lecture import ladder

    use_compile_cache()
    if given.steps < 0:
        raise UsageError(f"steps is {given.steps}, expected 0 (each model's own) or more")
    rungs = [*ladder.RUNGS[:-1], ladder.FULL if given.full else ladder.RUNGS[-1]]
    if given.steps:
        rungs = [replace(rung, steps=given.steps) for rung in rungs]
    places.require_file(given.plot, "--plot")
    places.require_file(given.json, "--json", given.plot)
    if given.plot:
        charts.require(given.plot)
    longest = max(rung.block_size for rung in rungs)
    config = check(replaced(Config(), corpus=given.corpus, block_size=longest, seed=given.seed))
    corpus = prepared(config, given.data_dir)

    results = []
    print(corpus.summary)
    for result in ladder.climb(rungs, *corpus.split(config.data), corpus.tokenizer, given.seed):
        results.append(result)
        print(ladder.line(result), flush=True)
    if given.json:
        tree = {"corpus": corpus.summary, "seed": given.seed, "rungs": [asdict(result) for result in results]}
        files.write_atomically(given.json, (json.dumps(tree, indent=2) + "\n").encode())
    if given.plot:
        charts.save(ladder.chart(results), given.plot)
    return 0
