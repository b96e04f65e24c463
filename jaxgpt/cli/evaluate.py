"""`jaxgpt eval`: score a run."""

from dataclasses import dataclass, field
from typing import Literal

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Checkpoint, Folders, RunName, parse
from jaxgpt.config import UsageError, check, replaced


@dataclass(frozen=True)
class Eval:
    run: RunName
    split: Literal["val", "train"] = "val"
    """The split to score."""
    checkpoint: Checkpoint = "best"
    eval_batches: int = 200
    """Random batches of the nanoGPT-style estimate; 0 skips it."""
    folders: Folders = field(default_factory=Folders)


def run(args: list[str]) -> int:
    given = parse(Eval, args, "eval")
    from jaxgpt.cli.runs import corpus_of
    from jaxgpt.display.text import count, fixed
    from jaxgpt.evaluation import estimate, evaluate
    from jaxgpt.monitor.terminal import describe
    from jaxgpt.run import Run
    from jaxgpt.start import load_checkpoint

    use_compile_cache()
    if given.eval_batches < 0:
        raise UsageError(f"eval_batches is {given.eval_batches}, expected 0 or more")
    run = Run.open(given.folders.runs_dir, given.run)
    config = check(replaced(run.config, eval_batches=given.eval_batches))
    corpus = corpus_of(run, given.folders.data_dir)
    step, params = load_checkpoint(run, given.checkpoint)
    tokens = corpus.split(run.config.data)[given.split == "val"]
    result = evaluate(run.config.model, params, tokens, corpus.tokenizer)
    print(f"{run.path.name}, step {step:,}, {given.split} split, {result.n_tokens:,} tokens predicted")
    print(f"  {describe(result)}")
    if given.eval_batches:
        loss = estimate(config, params, tokens, step)
        print(f"  estimate by {count(given.eval_batches, 'random batch')}: {fixed(loss)}")
    return 0
