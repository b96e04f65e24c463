"""fit(): the story of a run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from jaxgpt.config import Config
from jaxgpt.text import batches
from jaxgpt.text.batches import Ids
from jaxgpt.text.corpus import Corpus
from jaxgpt.training.checkpoint import Checkpoints, abstract
from jaxgpt.training.evaluate import Evaluation, estimate, evaluate
from jaxgpt.training.interrupt import interruption
from jaxgpt.training.journal import Evaluated, Event, Journal
from jaxgpt.training.run import Run
from jaxgpt.training.step import TrainState, init_state, train_steps

DEVICE_TOKENS = 2**28
"""A corpus up to this size lives on the device; a larger one is gathered from disk, a chunk at a time."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run: Run
    step: int
    steps: int
    scores: list[Evaluated]
    """Every evaluation, that of the untrained model first."""
    seconds: float
    tokens_per_second: float | None
    interrupted_by: int
    """The signal that ended it early, 0 if it ran to its last step."""

    @property
    def best(self) -> Evaluated:
        return min(self.scores, key=lambda scored: scored.evaluation.loss)


def fit(
    run: Run, corpus: Corpus, watch: Callable[[Event], None] = lambda event: None, config: Config | None = None
) -> Summary:
    """Train `run` from its newest checkpoint, or from the start, to its last step; log, evaluate and save.

    What metrics.jsonl and the checkpoints hold depends on the run's config and the tokens alone: not on how often the
    run was ended and resumed, nor on `watch`, which is told of each event.

    Args:
      config: takes the place of the run's own, where `start.resume` allowed it to differ.

    Raises:
      RunError: another process holds the run, or its files do not belong together.
      DivergedError: a loss is no longer a number; the checkpoints before it stand.
      CheckpointError: a checkpoint cannot be read or written.
    """
    config, began = config or run.config, time.perf_counter()
    train_tokens, val_tokens = corpus.split(config.data.val_fraction)
    feed = feeder(config, train_tokens)

    def score(state: TrainState) -> tuple[int, Evaluation, dict[str, float]]:
        step, splits = int(state.step), {"train": train_tokens, "val": val_tokens}
        exact = evaluate(config.model, state.params, val_tokens, corpus.tokenizer)
        if not config.train.eval_batches:
            return step, exact, {}
        noisy = {f"{name}_estimate": estimate(config, state.params, split, step) for name, split in splits.items()}
        return step, exact, noisy

    with (
        run.exclusive(),
        interruption() as interrupted_by,
        Checkpoints(run.checkpoints, config.train.keep) as checkpoints,
        Journal(run, checkpoints.latest or 0, watch) as journal,
    ):
        if config != run.config:
            run = run.with_config(config)
        state = restore_or_init(config, checkpoints)
        run.event("start", step=int(state.step), jax=jax.__version__, backend=jax.default_backend())
        if not journal.scores:
            journal.evaluated(*score(state))
        stop = 0
        for begin, end in chunks(config, int(state.step)):
            state, metrics = train_steps(config, state, *feed(begin, end))
            journal.trained(begin, metrics)
            if due(config, end):
                journal.flush()
                journal.evaluated(*score(state))
            stop = interrupted_by() if end < config.train.steps else 0
            if due(config, end) or stop:
                journal.sync()
                checkpoints.save(state, journal.scores[-1].evaluation.loss if due(config, end) else None)
                run.event("save", step=end, tokens_per_second=journal.tokens_per_second)
            if stop:
                break
        if not stop and journal.scores[-1].step < int(state.step):  # an interrupted run whose last step came nearer
            journal.evaluated(*score(state))
            journal.sync()
        checkpoints.wait()
        run.event("end", step=int(state.step), seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return Summary(
        run,
        int(state.step),
        config.train.steps,
        journal.scores,
        seconds,
        journal.tokens_per_second,
        stop,
    )


def restore_or_init(config: Config, checkpoints: Checkpoints) -> TrainState:
    """The newest saved state, or the state at step 0 when nothing was saved yet."""
    if checkpoints.latest is None:
        return init_state(config)
    return checkpoints.restore(checkpoints.latest, abstract(jax.eval_shape(init_state, config)))


def chunks(config: Config, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of each scan from `step` on; ends are multiples of scan_steps, and the last step."""
    K = config.train.scan_steps
    while step < config.train.steps:
        end = min((step // K + 1) * K, config.train.steps)
        yield step, end
        step = end


def due(config: Config, step: int) -> bool:
    """Whether to evaluate and save after `step` steps."""
    every = config.train.eval_every
    return step == config.train.steps or bool(every and step % every == 0)


def feeder(config: Config, tokens: Ids) -> Callable[[int, int], tuple[jax.Array, jax.Array]]:
    """A function from the steps begin..end to the (tokens, starts) that `train_steps` takes."""
    train, T = config.train, config.model.block_size
    on_device = jax.device_put(np.asarray(tokens)) if len(tokens) <= DEVICE_TOKENS else None

    def feed(begin: int, end: int) -> tuple[jax.Array, jax.Array]:
        starts = batches.chunk_starts(train.seed, begin, end, len(tokens), T, train.batch_size, train.sampling)
        if on_device is not None:
            return on_device, jax.device_put(starts.astype(np.int32))
        windows, starts = batches.pack(tokens, starts, T)
        return jax.device_put(windows), jax.device_put(starts.astype(np.int32))

    return feed
