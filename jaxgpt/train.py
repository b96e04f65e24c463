"""fit(): the story of a run."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt import memory, processes
from jaxgpt import model as nn
from jaxgpt.checkpoint import Checkpoints, Manifest
from jaxgpt.config import Config
from jaxgpt.corpus import Corpus
from jaxgpt.evaluation import Evaluation, estimate, evaluate
from jaxgpt.feed import Feed, chunks, device_tokens, feeder, window_starts
from jaxgpt.interrupt import interruption
from jaxgpt.journal import DivergedError, Evaluated, Event, Journal, notify
from jaxgpt.nans import blame
from jaxgpt.placement import ONE_DEVICE, Placement, fresh, like
from jaxgpt.recovery import circumstances, newest_good, surroundings
from jaxgpt.run import Run, RunError
from jaxgpt.saving import Saving
from jaxgpt.step import TrainState


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
        return min(self.scores, key=lambda scored: scored.rank)


def fit(
    run: Run,
    corpus: Corpus,
    watch: Callable[[Event], None] = lambda event: None,
    config: Config | None = None,
    debug_nans: bool = False,
    placement: Placement = ONE_DEVICE,
    write: Callable[[nn.Params], str] | None = None,
) -> Summary:
    """Train `run` from its newest checkpoint, or from the start, to its last step; log, evaluate and save.

    What metrics.jsonl and the checkpoints hold depends on the run's config and the tokens alone: not on how often the
    run was ended and resumed, nor on `watch`, which is told of each event. (A run that came to its end and is then made
    longer was scored at that end, too: a line that a run which was long from the start has only where it is due.)

    Args:
      config: takes the place of the run's own, where `start.resume` allowed it to differ.
      debug_nans: end the run at the first step that comes to no number, and name the operation; slower.
      placement: the devices to train on. What is computed is the same on all but for float32 reassociation.
      write: makes a line of text from the parameters, for `watch` to be told after each evaluation between the ends.

    Raises:
      OutOfMemoryError: it does not fit, by a count on paper or by the compiler's.
      RunError: another process holds the run, its files do not belong together, or none of its steps is whole.
      DivergedError: too many steps in a row came to no number; the checkpoints before them stand.
      CheckpointError: the last checkpoint was not written, or any was not where the config says to stop then.
    """
    config, began = config or run.config, time.perf_counter()
    train_tokens, _ = corpus.split(config.data)
    parts = corpus.training_parts(config.data)
    steps = placement.steps(config)

    with (
        placement.scope(),
        run.exclusive(),
        interruption() as interrupted_by,
        ThreadPoolExecutor(1, "reader") as reading,
        ThreadPoolExecutor(1, "compile") as background,
        Checkpoints(run.checkpoints, config.train.keep, config.train.keep_every) as checkpoints,
    ):
        feed = feeder(config, train_tokens, placement, parts, reading)
        found = newest(run, config, corpus, checkpoints, watch)
        memory.require(config, device_tokens(config, len(train_tokens)), new=found is None, parts=placement.parts)
        # Several processes must run, and some compile, the same programs in the same order.
        early = processes.alone() and not found
        ahead = background.submit(compile_ahead, config, feed, placement, steps) if early else None
        state = checkpoints.restore(found.step, like(config, placement)) if found else fresh(config, placement)
        if config != run.config:
            run = processes.by_first(partial(run.with_config, config)) or Run(run.path)
        run.event("start", step=int(state.step), **surroundings(), **circumstances())
        n_bytes = found.about["metrics"]["bytes"] if found else 0
        with (
            Journal(run, n_bytes, partial(window_starts, config, parts), watch) as journal,
            Saving(run, config, corpus, checkpoints, journal) as saving,
        ):
            step = int(state.step)
            if not step and config.train.eval_start:
                journal.evaluated(*score(config, corpus, state))
            elif step and due(config, step) and (not journal.scores or journal.scores[-1].step < step):
                # it ended between save and score, or its last step came nearer
                journal.evaluated(*score(config, corpus, state))
                saving.scored()
            stop, compiled = 0, None
            for begin, end in chunks(config, int(state.step)):
                served = feed(begin, end)
                if not compiled:
                    if ahead:
                        ahead.result()
                    compiled = steps.lower(config, state, *served).compile()  # and kept for the call below
                    memory.require_compiled(compiled, config, new=found is None, parts=placement.parts)
                before = jax.tree.map(jnp.copy, state) if debug_nans else None
                state, metrics = steps(config, state, *served)
                if before and not metrics.applied.all():
                    raise DivergedError(blame(config, before, *served))
                journal.trained(begin, metrics)
                saving.look()
                more = end < config.train.steps
                stop = interrupted_by() if more else 0
                if due(config, end) or stop:
                    saving.save(state)  # before it is scored: whoever ends the run may not wait so long
                if due(config, end) and not stop:
                    journal.evaluated(*score(config, corpus, state))
                    saving.scored()
                    if write and more:
                        journal.sampled(end, write(state.params))
                    stop = interrupted_by() if more else 0
                if stop:
                    break
            saving.end(state)
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


def newest(
    run: Run, config: Config, corpus: Corpus, checkpoints: Checkpoints, watch: Callable[[Event], None]
) -> Manifest | None:
    """The manifest of the newest step that is whole, which every process goes on from; None if the run is new."""
    found = processes.by_first(lambda: newest_good(run, config, corpus, checkpoints, partial(notify, run, watch)))
    step = processes.told(found.step if found else -1)
    if step >= 0 and not processes.first():
        found = checkpoints.manifest(step)
    if found and found.step > config.train.steps:
        raise RunError(
            f"run {run.path.name!r} is at step {found.step} already, beyond the {config.train.steps} asked for"
        )
    return found


def score(config: Config, corpus: Corpus, state: TrainState) -> tuple[int, Evaluation, dict[str, float]]:
    """The step of `state`, its loss over the whole validation split, and nanoGPT-style estimates on both splits."""
    train_tokens, val_tokens = corpus.split(config.data)
    step, splits = int(state.step), {"train": train_tokens, "val": val_tokens}
    exact = evaluate(config.model, state.params, val_tokens, corpus.tokenizer)
    if not config.train.eval_batches:
        return step, exact, {}
    noisy = {f"{name}_estimate": estimate(config, state.params, split, step) for name, split in splits.items()}
    return step, exact, noisy


def compile_ahead(config: Config, feed: Feed, placement: Placement, steps: Any) -> None:
    """Compile the first chunk of a new run, while its state is being made and scored; its first call finds that."""
    begin, end = next(chunks(config, 0))
    with placement.scope():
        steps.lower(config, like(config, placement), *feed(begin, end)).compile()


def due(config: Config, step: int) -> bool:
    """Whether to evaluate and save after `step` steps."""
    every = config.train.eval_every
    return step == config.train.steps or bool(every and step % every == 0)
