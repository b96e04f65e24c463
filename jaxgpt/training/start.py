"""The way into a run: from a config to a new one, or back into one that exists."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxgpt import nn
from jaxgpt.config import Config, check
from jaxgpt.text import corpus as corpora
from jaxgpt.text.corpus import Corpus, CorpusError
from jaxgpt.training.checkpoint import Checkpoints, abstract, load_params
from jaxgpt.training.run import Run, RunError
from jaxgpt.training.step import init_state

MAY_CHANGE = {"steps", "scan_steps", "accumulate", "eval_every", "eval_batches", "keep"}
"""What a resume may change: how long, how often to look, how to split the work; not what is computed."""


def start(config: Config, name: str, runs_dir: Path, data_dir: Path) -> tuple[Run, Corpus]:
    """Check everything, prepare the corpus, and make the folder of a new run.

    Raises:
      UsageError: the config cannot run, the run exists, or the text cannot be had; before the run is made.
    """
    check(config)
    Run.require_free(runs_dir, name)
    corpus = corpora.prepare(
        config.data.corpus,
        config.data.tokenizer,
        unknown=config.data.unknown,
        data_dir=data_dir,
        block_size=config.model.block_size,
        val_fraction=config.data.val_fraction,
        column=config.data.column,
    ).corpus
    config = with_vocabulary(config, corpus)
    return Run.create(runs_dir, name, config, corpus.meta), corpus


def resume(config: Config, run: Run, data_dir: Path) -> tuple[Run, Corpus]:
    """The run as it stands, to go on under `config`, which may differ from its own in MAY_CHANGE only.

    Raises:
      RunError: `config` changes what the run computes; each such field is named.
      CorpusError: the tokens that it learnt from are not to be had.
    """
    check(config)
    refused = [
        f"  {name}: {was!r} in the run, {now!r} asked for"
        for name, was, now in differences(run.config, config)
        if name not in MAY_CHANGE
    ]
    if refused:
        raise RunError(
            f"run {run.path.name!r} cannot go on with another\n" + "\n".join(refused) + "\n"
            f"a resume may change {', '.join(sorted(MAY_CHANGE))}; for the rest start a new run: --run OTHER-NAME"
        )
    with Checkpoints(run.checkpoints) as checkpoints:
        done = checkpoints.latest or 0
    if done > config.train.steps:
        raise RunError(f"run {run.path.name!r} is at step {done} already, beyond the {config.train.steps} asked for")
    corpus = corpus_of(run, data_dir)
    return (run if config == run.config else run.with_config(config)), corpus


def corpus_of(run: Run, data_dir: Path) -> Corpus:
    """The tokens that `run` learns from: as prepared then, or prepared anew and found to be the same.

    Raises:
      CorpusError, SourceError: they are not to be had, or are not the same.
    """
    folder = corpora.folder_of(run.corpus_meta, data_dir)
    if (folder / "tokens.json").is_file():
        found = corpora.load(folder)
    else:
        data = run.config.data
        found = corpora.prepare(
            data.corpus, data.tokenizer, unknown=data.unknown, data_dir=data_dir, column=data.column
        ).corpus
    wanted = run.corpus_meta["sha256"]
    if found.meta["sha256"] != wanted:
        raise CorpusError(
            f"run {run.path.name!r} learns from {run.corpus_meta['origin']} (tokens of SHA-256 {wanted}), but "
            f"{run.config.data.corpus!r} now gives {found.meta['origin']} (SHA-256 {found.meta['sha256']}): "
            f"put the tokens.bin and tokens.json of then into {folder}"
        )
    return found


def with_vocabulary(config: Config, corpus: Corpus) -> Config:
    """`config` with the vocabulary size of the corpus where it leaves it open (0).

    Raises:
      CorpusError: the config's vocabulary is smaller than the corpus's.
    """
    needed, given = corpus.tokenizer.vocab_size, config.model.vocab_size
    if given and given < needed:
        raise CorpusError(
            f"vocab_size is {given}, expected at least the {needed} ids of {corpus.meta['source']}, or 0 to take those"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=given or needed))


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(field, value in `a`, value in `b`) of every field in which two configs differ."""
    return [
        (name, was, now)
        for section in dataclasses.fields(a)
        for (name, was), now in zip(
            dataclasses.asdict(getattr(a, section.name)).items(),
            dataclasses.asdict(getattr(b, section.name)).values(),
            strict=True,
        )
        if was != now
    ]


def load_checkpoint(run: Run, which: str = "best") -> tuple[int, nn.Params]:
    """The step and the parameters of a run's "best" or "last" checkpoint.

    Raises:
      RunError: nothing was saved yet.
      CheckpointError: the checkpoint is damaged.
    """
    with Checkpoints(run.checkpoints) as checkpoints:
        step = checkpoints.best if which == "best" else checkpoints.latest
    if step is None:
        raise RunError(f"run {run.path.name!r} has no checkpoint yet: jaxgpt train --run {run.path.name} --resume")
    like = jax.eval_shape(init_state, run.config).params
    return step, load_params(run.checkpoints, step, abstract(like))
