"""The way into a run: from a config to a new one, or back into one that exists."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt import corpus as corpora
from jaxgpt import files as disk
from jaxgpt import matmul as numerics
from jaxgpt import memory, processes
from jaxgpt import model as nn
from jaxgpt.checkpoint import CheckpointError, Checkpoints, abstract
from jaxgpt.config import Config, ModelConfig, UsageError, check
from jaxgpt.corpus import Corpus, CorpusError
from jaxgpt.optimizer import make_optimizer
from jaxgpt.prepare import sources
from jaxgpt.prepare.build import prepare_corpus, ready
from jaxgpt.recovery import about, require_own, require_same
from jaxgpt.run import Run, RunError
from jaxgpt.step import TrainState, init_state
from jaxgpt.tokenizer import Tokenizer

TRIES = 5
"""How often to look for a checkpoint while the run that writes them goes on."""


def start(
    config: Config,
    name: str,
    runs_dir: Path,
    data_dir: Path,
    weights: nn.Params | None = None,
    origin: str = "",
    require_room: Callable[[Config], None] = memory.require,
) -> tuple[Run, Corpus]:
    """Check everything, prepare the corpus, and make the folder of a new run.

    Args:
      weights: what to begin with in place of random ones, from `origin`; they are in the folder when it gets its name.
      require_room: raises UsageError where the devices cannot train a config; its vocabulary may still be unknown.

    Raises:
      UsageError: the config cannot run, the run exists, or the text cannot be had; before anything is written. Or the
        config cannot run, or is too large, with the vocabulary of the text, which has been prepared by then.
    """
    check(config, new=True)
    Run.require_free(runs_dir, name)
    disk.require_writable(runs_dir, "--runs-dir")
    require_room(config)
    corpus = tokens_of(config, data_dir)
    config = resolve(config, corpus)
    require_room(config)  # the size of the vocabulary is known only now

    def put_weights(run: Run) -> None:
        if weights is None:
            return
        state = TrainState(jnp.int32(0), weights, make_optimizer(config).init(weights))
        with Checkpoints(run.checkpoints, config.train.keep) as checkpoints:
            checkpoints.save(state, None, about(config, corpus.meta))
        run.event("import", step=0, origin=origin)

    return Run.create(runs_dir, name, config, corpus.meta, put_weights), corpus


def resume(config: Config, run: Run, data_dir: Path) -> Corpus:
    """The tokens of `run`, to `fit` it with under `config`, which may differ from its own in what a resume may change.

    Raises:
      RunError: `config` changes what the run computes; each such field is named.
      CorpusError: the tokens that it learnt from are not to be had.
    """
    check(config)
    require_same(run, run.config, config)
    return corpus_of(run, data_dir)


def corpus_of(run: Run, data_dir: Path) -> Corpus:
    """The tokens that `run` learns from: as prepared then, or prepared anew and found to be the same.

    Of several processes the first is to call it before the others, which do without its checks.

    Raises:
      SourceError, CorpusError: they are not to be had, or are not the same.
    """
    if found := ready(run.config.data.corpus, run.corpus_meta, data_dir, verified=not processes.first()):
        return found
    wanted = run.corpus_meta["sha256"]
    folders = " and ".join(map(str, corpora.folders_of(run.corpus_meta, data_dir)))
    was = f"run {run.path.name!r} learns from {run.corpus_meta['origin']} (tokens of SHA-256 {wanted})"
    by_hand = f"put the tokens-*.bin and tokens.json of then into {folders}, or name the folder around: --data-dir"
    try:
        found = tokens_of(run.config, data_dir)
    except UsageError as error:
        raise CorpusError(f"{was}, which cannot be prepared again: {error}; {by_hand}") from error
    if found.meta["sha256"] != wanted:
        raise CorpusError(f"{was}, but {run.config.data.corpus!r} now gives SHA-256 {found.meta['sha256']}; {by_hand}")
    return found


def resolve(config: Config, corpus: Corpus) -> Config:
    """`config` with what it leaves open filled in: the vocabulary's size, the precision that "auto" is here, the
    schedule's end, the text's full path.

    So a run that is later made longer, or goes on elsewhere, keeps the schedule and the precision of its start.

    Raises:
      ConfigError: it cannot run with that vocabulary.
    """
    data, model, optimizer = config.data, config.model, config.optimizer
    data = dataclasses.replace(data, corpus=sources.absolute(data.corpus))
    vocab_size, precision = model.vocab_size or corpus.tokenizer.vocab_size, numerics.resolve(model.precision)
    model = dataclasses.replace(model, vocab_size=vocab_size, precision=precision)
    optimizer = dataclasses.replace(optimizer, decay_steps=optimizer.decay_steps or config.train.steps)
    return check(Config(data, model, optimizer, config.train))


def complete(config: Config, data_dir: Path) -> Config:
    """`config`, checked, with its vocabulary's size: if nobody has said it, its text is prepared to know it.

    Raises:
      UsageError: the config cannot run, or the text cannot be had.
    """
    if check(config).model.vocab_size:
        return config
    V = tokens_of(config, data_dir).tokenizer.vocab_size
    return check(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=V)))


def tokens_of(config: Config, data_dir: Path) -> Corpus:
    """The tokens of a config, prepared if need be.

    Raises:
      UsageError: they cannot be had, or are too few.
    """
    return prepare_corpus(
        config.data.corpus,
        config.data.tokenizer,
        unknown=config.data.unknown,
        data_dir=data_dir,
        block_size=config.model.block_size,
        val_fraction=config.data.val_fraction,
        vocab_size=config.model.vocab_size,
        column=config.data.column,
    ).corpus


def load_model(run: Run, which: str = "best") -> tuple[ModelConfig, nn.Params, Tokenizer]:
    """All that writing needs of a run: its model, the weights of a checkpoint, its tokenizer."""
    return run.config.model, load_checkpoint(run, which)[1], run.tokenizer


def load_checkpoint(run: Run, which: str | int = "best") -> tuple[int, nn.Params]:
    """The step and the parameters of a run's "best" or "last" checkpoint, or of that of a step.

    Raises:
      RunError: nothing was saved yet, or not that.
      CheckpointError: the checkpoint is damaged.
    """
    if which not in ("best", "last") and type(which) is not int:
        raise RunError(f"checkpoint is {which!r}, expected 'best', 'last' or the number of a step")
    like = abstract(jax.eval_shape(init_state, run.config).params)
    with Checkpoints(run.checkpoints) as checkpoints:
        for _ in range(TRIES):
            step = which if isinstance(which, int) else None
            try:
                if not isinstance(which, int):
                    step = checkpoints.best if which == "best" else checkpoints.latest
                if step is None:
                    break
                if step == which and checkpoints.steps and step not in checkpoints.steps:
                    there = ", ".join(map(str, checkpoints.steps))
                    raise RunError(f"run {run.path.name!r} has no checkpoint of step {step}; there are {there}")
                require_own(run, run.config, run.corpus_meta, checkpoints.verify(step))
                return step, checkpoints.restore_params(step, like)
            except CheckpointError as error:
                if step is None or step in checkpoints.steps:  # else it has just made room for a newer one
                    raise CheckpointError(
                        f"the {which} checkpoint cannot be used: {error}; {run.resume_command} goes back to the newest "
                        "that is whole"
                    ) from error
    raise RunError(f"run {run.path.name!r} has no checkpoint yet: let it train on, or {run.resume_command}")
