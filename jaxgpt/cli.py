"""`jaxgpt <verb>`: each verb parses, calls, prints. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted."""

import argparse
import dataclasses
import difflib
import inspect
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from jaxgpt.config import Config, UsageError

DEFAULT_RECIPE = "gpt-demo"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `argv` (that of the process by default) and exit."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(run_verb(sys.argv[1:] if argv is None else argv))


def run_verb(argv: Sequence[str]) -> int:
    """The exit code of `jaxgpt *argv`; errors that a person can mend are printed without a traceback."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    verb, args = argv[0], list(argv[1:])
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return _complain(f"no verb {verb!r}{hint}\n{overview()}", 2)
    try:
        return VERBS[verb](args)
    except UsageError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:  # whoever read the output has gone; let the interpreter's last flush find no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return _complain(f"out of memory: {error}; try a smaller --batch-size or a smaller model", 1)
    except (OSError, RuntimeError) as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def overview() -> str:
    """What `jaxgpt --help` prints."""
    lines = [f"  {name:<13}{inspect.getdoc(verb).splitlines()[0]}" for name, verb in VERBS.items()]  # type: ignore[union-attr]
    return "usage: jaxgpt VERB ...\n\n" + "\n".join(lines) + "\n\njaxgpt VERB --help tells the options of a verb."


def _parse(kind: type[Any], args: list[str], prog: str, **kwargs: Any) -> Any:
    import tyro

    return tyro.cli(kind, args=args, prog=prog, config=(tyro.conf.OmitArgPrefixes,), **kwargs)


def _complain(message: str, code: int) -> int:
    print(f"jaxgpt: {message}", file=sys.stderr)
    return code


@dataclass(frozen=True)
class _Folders:
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    data_dir: Path = Path("data")
    """Folder of all prepared corpora."""


def prepare(args: list[str]) -> int:
    """Turn a text into tokens.bin and tokens.json."""
    import tyro

    @dataclass(frozen=True)
    class Prepare:
        """Turn a text into tokens.bin and tokens.json."""

        corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
        """python-docs, python-stdlib, shakespeare, or a file or folder of UTF-8, .jsonl or .parquet."""
        tokenizer: str = "char"
        """char, ascii, byte, gpt2, bpe:SIZE (learnt from the text, such as bpe:4096), or a tokens.json whose vocabulary
        is to be used again."""
        unknown: Literal["error", "skip"] = "error"
        """What to do with a character outside the vocabulary."""
        column: str = "text"
        """Which column of a .jsonl or .parquet file holds the text."""
        data_dir: Path = Path("data")
        """Folder of all prepared corpora."""

    given = _parse(Prepare, args, "jaxgpt prepare")
    from rich.console import Console

    from jaxgpt.report.progress import patient_bar
    from jaxgpt.text import corpus as corpora

    with patient_bar(Console(stderr=True)) as progress:
        done = corpora.prepare(
            given.corpus,
            given.tokenizer,
            unknown=given.unknown,
            data_dir=given.data_dir,
            column=given.column,
            progress=progress,
        )
    meta = done.corpus.meta
    print(done.corpus.summary)
    for note in meta.get("notes", []):
        print(f"  {note}")
    if meta.get("skipped_characters"):
        print(f"  skipped {meta['skipped_characters']:,} characters outside the vocabulary")
    print(f"{'found in' if done.reused else 'written to'} {done.folder} in {done.seconds:.2f} s")
    return 0


def train(args: list[str]) -> int:
    """Train a recipe, or resume a run."""
    from jaxgpt.recipes import recipe
    from jaxgpt.training.run import Run

    @dataclass(frozen=True)
    class Train:
        run: str
        """Name of the run, a new folder in the runs folder."""
        config: Config
        folders: _Folders = _Folders()
        resume: bool = False
        """Go on with an existing run: its own settings hold, but for the ones given here."""

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
        existing = Run.open(peeked.runs_dir, peeked.run or name)
    defaults = Train(run=name, config=existing.config if existing else recipe(name).config)
    about = "" if existing else _train_help(name)
    given = _parse(Train, args, f"jaxgpt train {name}", default=defaults, description=about)
    if given.resume != bool(existing):
        raise UsageError("--resume and --no-resume were both given")
    return _fit(given, existing)


def _train_help(name: str) -> str:
    from jaxgpt.recipes import RECIPES

    known = RECIPES[name]
    return f"{known.about} ({known.hardware}: {known.time}; loss {known.loss}.) Recipes: {', '.join(RECIPES)}."


def _fit(given: Any, existing: Any) -> int:
    from jaxgpt.report.terminal import RunConsole, TrainingDisplay, describe, duration
    from jaxgpt.training.loop import fit
    from jaxgpt.training.start import resume, start

    if existing:
        run, corpus = existing, resume(given.config, existing, given.folders.data_dir)
        config = given.config
    else:
        run, corpus = start(given.config, given.run, given.folders.runs_dir, given.folders.data_dir)
        config = run.config
    console = RunConsole()
    console.print(corpus.summary)
    with TrainingDisplay(console, config.train.steps) as display:
        done = fit(run, corpus, display, config)
    if done.interrupted_by:
        again = _words("train", run, given.folders, "--resume")
        console.print(f"interrupted at step {done.step:,} of {done.steps:,}; saved. Go on with: {again}")
        return 128 + done.interrupted_by
    first, last, best = done.scores[0], done.scores[-1], done.best
    console.print(
        f"{run.path}: step {done.step:,} in {duration(done.seconds)}"
        + (f", {done.tokens_per_second:,.0f} tokens/s" if done.tokens_per_second else "")
    )
    console.print(f"  before  {describe(first.evaluation)}")
    console.print(f"  after   {describe(last.evaluation)}")
    if best.step != last.step:
        console.print(f"  best    {describe(best.evaluation)}, at step {best.step:,}")
    console.print(f"Write with it: {_words('sample', run, given.folders)}")
    return 0


def _words(verb: str, run: Any, folders: _Folders, *flags: str) -> str:
    """The command line that does `verb` with `run`, to be pasted in the folder where this one was typed."""
    named = ["--run", run.path.name] if verb == "train" else [run.path.name]
    words = ["jaxgpt", verb, *named, *flags]
    if run.path.parent != Path("runs"):
        words += ["--runs-dir", str(run.path.parent)]
    if verb == "train" and folders.data_dir != Path("data"):
        words += ["--data-dir", str(folders.data_dir)]
    return shlex.join(words)


def sample(args: list[str]) -> int:
    """Write text with a trained run."""
    import tyro

    @dataclass(frozen=True)
    class Sample:
        """Write text with a trained run."""

        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """Name of a run, or its folder."""
        prompt: str | None = None
        """What to continue; of a long one the last block_size tokens are seen. None: a line feed."""
        tokens: int = 500
        """How many tokens to write."""
        temperature: float = 0.8
        """Below 1 sharper, above 1 flatter, 0 always the most likely token."""
        top_k: int = 0
        """Draw from the k most likely tokens only; 0 from all."""
        seed: int = 1337
        """The same seed writes the same text."""
        samples: int = 1
        """How many texts to write."""
        checkpoint: Literal["best", "last"] = "best"
        """The checkpoint of lowest validation loss, or the newest."""
        unknown: Literal["error", "skip"] = "error"
        """What to do with a character of the prompt outside the vocabulary."""
        runs_dir: Path = Path("runs")
        """Folder of all runs."""

    given = _parse(Sample, args, "jaxgpt sample")
    from jaxgpt.sampling.write import write

    config, params, tokenizer = _load_model(given.run, given.runs_dir, given.checkpoint)
    texts = write(
        config,
        params,
        tokenizer,
        given.prompt,
        given.tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        seed=given.seed,
        samples=given.samples,
        unknown=given.unknown,
    )
    for i, pieces in enumerate(texts):
        if i:
            print("-" * 40)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


def _load_model(name: str, runs_dir: Path, checkpoint: str) -> Any:
    """(model config, params, tokenizer) of a run or of an exported folder."""
    from jaxgpt.interop import folders
    from jaxgpt.training.run import Run
    from jaxgpt.training.start import load_model

    if folders.is_export(Path(name)):
        return folders.load_export(Path(name))
    return load_model(Run.open(runs_dir, name), checkpoint)


def evaluate(args: list[str]) -> int:
    """Score a run on a whole split."""
    import tyro

    @dataclass(frozen=True)
    class Eval:
        """Score a run on a whole split."""

        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """Name of a run, or its folder."""
        split: Literal["val", "train"] = "val"
        """Which part of the text to score."""
        checkpoint: Literal["best", "last"] = "best"
        """The checkpoint of lowest validation loss, or the newest."""
        eval_batches: int = 200
        """Random batches in the nanoGPT-style estimate; 0 leaves it out."""
        folders: _Folders = _Folders()

    given = _parse(Eval, args, "jaxgpt eval")
    from jaxgpt.report.terminal import describe
    from jaxgpt.training.evaluate import estimate
    from jaxgpt.training.evaluate import evaluate as score
    from jaxgpt.training.run import Run
    from jaxgpt.training.start import corpus_of, load_checkpoint

    if given.eval_batches < 0:
        raise UsageError(f"eval_batches is {given.eval_batches}, expected 0 or more")
    run = Run.open(given.folders.runs_dir, given.run)
    corpus = corpus_of(run, given.folders.data_dir)
    step, params = load_checkpoint(run, given.checkpoint)
    tokens = corpus.split(run.config.data.val_fraction)[given.split == "val"]
    result = score(run.config.model, params, tokens, corpus.tokenizer)
    print(f"{run.path.name}, step {step:,}, {given.split} split, {result.n_tokens:,} tokens predicted")
    print(f"  {describe(result)}")
    if given.eval_batches:
        config = dataclasses.replace(
            run.config, train=dataclasses.replace(run.config.train, eval_batches=given.eval_batches)
        )
        print(f"  estimate by {given.eval_batches} random batches: {estimate(config, params, tokens, step):.4f}")
    return 0


def recipes(args: list[str]) -> int:
    """List the recipes."""

    @dataclass(frozen=True)
    class Recipes:
        """List the recipes."""

    _parse(Recipes, args, "jaxgpt recipes")
    from jaxgpt.recipes import RECIPES

    for name, known in RECIPES.items():
        print(f"jaxgpt train {name}")
        print(f"  {known.about}")
        print(f"  {known.hardware}: {known.time}; loss {known.loss}")
    return 0


def lecture(args: list[str]) -> int:
    """Climb the lecture's ladder, from a uniform guess to the transformer."""

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
        data_dir: Path = Path("data")
        """Folder of all prepared corpora."""

    given = _parse(Lecture, args, "jaxgpt lecture")
    from rich.console import Console

    from jaxgpt.config import TrainConfig, check
    from jaxgpt.lecture import ladder
    from jaxgpt.report import plots, tables
    from jaxgpt.text.corpus import prepare

    check(Config(train=TrainConfig(seed=given.seed)))
    rungs = ladder.configure(
        (*ladder.RUNGS[:-1], ladder.FULL) if given.full else ladder.RUNGS, given.scale_by, given.init, given.steps
    )
    for path in filter(None, (given.plot, given.json)):
        if not path.parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")
    if given.plot:
        plots.require(given.plot)
    longest = max(rung.block_size for rung in rungs)
    corpus = prepare(given.corpus, data_dir=given.data_dir, block_size=longest).corpus

    console, results = Console(highlight=False), []
    console.print(corpus.summary, soft_wrap=True)
    for result in ladder.climb(rungs, *corpus.split(0.1), corpus.tokenizer, given.seed):
        results.append(result)
        console.print(tables.line(result), markup=False, soft_wrap=True)
    console.print(tables.ladder(results))
    console.print(tables.samples(results))
    if given.plot:
        plots.ladder(results, given.plot)
    if given.json:
        given.json.write_text(ladder.to_json(results, corpus=corpus.summary, seed=given.seed), "utf-8")
    return 0


def import_gpt2(args: list[str]) -> int:
    """Make a run from a Hugging Face GPT-2, to sample, evaluate and fine-tune."""
    import tyro

    from jaxgpt.config import DataConfig, OptimizerConfig, TrainConfig
    from jaxgpt.recipes import FINETUNE

    @dataclass(frozen=True)
    class ImportGPT2:
        """Make a run from a Hugging Face GPT-2, to sample, evaluate and fine-tune with train --resume."""

        folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
        """Folder of config.json and model.safetensors, or a name on the Hugging Face hub, such as gpt2."""
        run: str
        """Name of the run, a new folder in the runs folder."""
        block_size: int = 0
        """Keep the first positions only; 0 keeps all."""
        dropout: float = 0.0
        """Probability of dropping an activation in fine-tuning."""
        data: DataConfig = FINETUNE.data
        optimizer: OptimizerConfig = FINETUNE.optimizer
        train: TrainConfig = FINETUNE.train
        folders: _Folders = _Folders()

    given = _parse(ImportGPT2, args, "jaxgpt import-gpt2")
    from jaxgpt.interop import folders

    run = folders.import_run(
        folders.find(given.folder),
        Config(given.data, optimizer=given.optimizer, train=given.train),
        given.run,
        given.folders.runs_dir,
        given.folders.data_dir,
        block_size=given.block_size,
        dropout=given.dropout,
    )
    print(f"{run.path}: {run.config.model}")
    print(f"Write with it: {_words('sample', run, given.folders)}")
    print(f"Fine-tune it: {_words('train', run, given.folders, '--resume')}")
    return 0


def export(args: list[str]) -> int:
    """Write a run as a folder that transformers loads."""
    import tyro

    @dataclass(frozen=True)
    class Export:
        """Write a run as a folder that transformers loads: weights, config, vocabulary and a model card."""

        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """Name of a run, or its folder."""
        out: Path
        """The folder to make."""
        format: Literal["hf"] = "hf"
        """hf: Hugging Face's GPT-2."""
        checkpoint: Literal["best", "last"] = "best"
        """The checkpoint of lowest validation loss, or the newest."""
        runs_dir: Path = Path("runs")
        """Folder of all runs."""

    given = _parse(Export, args, "jaxgpt export")
    from jaxgpt.interop import folders
    from jaxgpt.training.run import Run

    step = folders.export_run(Run.open(given.runs_dir, given.run), given.out, given.checkpoint)
    print(f"step {step:,} of {given.run} written to {given.out}")
    print(f"Write with it: jaxgpt sample {given.out}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare,
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "import-gpt2": import_gpt2,
    "export": export,
    "lecture": lecture,
    "recipes": recipes,
}
