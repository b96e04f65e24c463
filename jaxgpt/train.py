"""fit(): the training loop of a run, with its evaluations and saves."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.sharding import Mesh

from jaxgpt import evaluation, model, processes
from jaxgpt.checkpoint import CheckpointError, Checkpoints
from jaxgpt.config import Config
from jaxgpt.corpus import Corpus
from jaxgpt.data import Loader, chunks, config_starts, loader
from jaxgpt.evaluation import Evaluation, estimate, evaluate
from jaxgpt.metrics_log import DivergedError, Evaluated, Event, MetricsLog, Sampled, notify
from jaxgpt.run import Run
from jaxgpt.sharding import one_device
from jaxgpt.signals import stop_signals
from jaxgpt.start import environment, find_newest, identity
from jaxgpt.step import Metrics, TrainState, abstract_state, jit_train_steps, lower_init, train_steps


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run: Run
    step: int
    steps: int
    scores: list[Evaluated]  # every evaluation, that of the untrained model first
    seconds: float
    tokens_per_second: float | None  # of training in this process; None before the second chunk
    interrupted_by: int  # the signal that ended it early, 0 if it ran to its last step

    @property
    def best(self) -> Evaluated:
        return min(self.scores, key=lambda scored: scored.rank)


def fit(
    run: Run,
    corpus: Corpus,
    on_event: Callable[[Event], None] = lambda event: None,
    config: Config | None = None,
    debug_nans: bool = False,
    mesh: Mesh | None = None,
    sample: Callable[[model.Params], str] | None = None,
) -> Summary:
    """Train `run` from its newest checkpoint, or from the start, to its last step; log, evaluate and save.

    metrics.jsonl and the checkpoints depend on the run's config and the tokens alone, not on how often the run was
    stopped and resumed.

    Args:
      config: replaces the run's own, within what a resume may change.
      debug_nans: end the run at the first non-finite step, and name the operation; slower.
      mesh: the devices to train on, None for one; results are the same on all up to float32 reassociation.
      sample: parameters to a text, reported after each evaluation but the first and the last.

    Raises:
      RunError: another process holds the run, its files do not belong together, or no checkpoint is valid.
      DivergedError: too many steps in a row were not finite; the checkpoints before them stand.
      CheckpointError: the last checkpoint was not written, or any where on_save_error is "stop".
    """
    began, config, mesh = time.perf_counter(), config or run.config, mesh or one_device()
    train_tokens, val_tokens = corpus.split(config.data)
    parts = corpus.training_parts(config.data)
    checkpoints = Checkpoints(run.checkpoints, config.train.keep, config.train.keep_every)

    with (
        jax.set_mesh(mesh),
        run.lock(),
        stop_signals() as stop_signal,
        ThreadPoolExecutor(1, "reader") as reading,
        ThreadPoolExecutor(1, "compile") as background,
    ):
        load = loader(config, train_tokens, mesh, parts, reading)
        newest = find_newest(run, config, corpus, checkpoints, on_event)
        step, n_bytes = (newest.step, newest.about["metrics"]["bytes"]) if newest else (0, 0)
        initial = None if newest else lower_init(config, mesh)  # before another thread lowers the steps
        # Several processes must run, and some compile, the same programs in the same order.
        early = initial and processes.single_process()
        ahead = background.submit(compiled_steps, config, mesh, load, *next(chunks(config, 0))) if early else None
        late = early and not config.train.eval_start
        scorer = background.submit(compiled_score, config, mesh, len(val_tokens)) if late else None
        state = initial.compile()() if initial else checkpoints.restore(step, abstract_state(config, mesh))
        if config != run.config:
            run = processes.on_primary(partial(run.with_config, config)) or Run(run.path)
        run.event("start", step=step, **environment())
        stop, programs = 0, dict[int, Any]()
        with (
            MetricsLog(run, n_bytes, lambda i: config_starts(config, parts, i, i + 1)[0], on_event) as log,
            checkpoints,
        ):
            evaluated = any(scored.step == step for scored in log.scores)
            if (due(config, step) if step else config.train.eval_start) and not evaluated:
                log.add_evaluation(*score(config, corpus, state))  # a checkpoint is saved before it is evaluated
            for begin, end in chunks(config, step):
                windows = load(begin, end)
                if end - begin not in programs:
                    new = ahead.result() if ahead and not programs else compiled_steps(config, mesh, load, begin, end)
                    programs[end - begin] = new
                before = jax.tree.map(jnp.copy, state) if debug_nans else None
                state, metrics = programs[end - begin](state, *windows)
                if before and not metrics.applied.all():
                    raise DivergedError(find_nan(config, before, windows, metrics))
                log.add(begin, metrics)
                with save_errors(run, log, checkpoints):
                    checkpoints.settle(wait=False)
                last = end == config.train.steps
                stop = 0 if last else stop_signal()
                if due(config, end):
                    save(run, corpus, log, checkpoints, state)  # first: a signal may leave no time for the evaluation
                    if not stop:
                        program = scorer.result() if scorer else None
                        log.add_evaluation(*score(config, corpus, state, program))
                        if sample and not last:
                            on_event(Sampled(end, sample(state.params)))
                            log.restart_clock()
                        stop = 0 if last else stop_signal()
                if stop:
                    break
            with save_errors(run, log, checkpoints):
                checkpoints.settle()
            with save_errors(run, log, checkpoints, stop=True):
                # A signal came between two saves, or the last save failed.
                if not processes.broadcast(int(state.step) in checkpoints.steps):
                    save(run, corpus, log, checkpoints, state)
                    checkpoints.settle()
                log.sync()
    seconds, speed = time.perf_counter() - began, log.speed["tokens_per_second"]
    return Summary(run, log.step, config.train.steps, log.scores, seconds, speed, stop)


def compiled_steps(config: Config, mesh: Mesh, load: Loader, begin: int, end: int) -> Any:
    """The program of these steps, for the shapes of a state."""
    with jax.set_mesh(mesh):
        return jit_train_steps(config, mesh).lower(abstract_state(config, mesh), *load(begin, end)).compile()


def compiled_score(config: Config, mesh: Mesh, n_tokens: int) -> Any:
    """The program that scores a validation split of `n_tokens`."""
    with jax.set_mesh(mesh):
        return evaluation.compiled(config.model, abstract_state(config, mesh).params, n_tokens)


def save(run: Run, corpus: Corpus, log: MetricsLog, checkpoints: Checkpoints, state: TrainState) -> None:
    """Start to save `state` once the last save has ended and the lines of metrics.jsonl up to it are on disk."""
    with save_errors(run, log, checkpoints):
        checkpoints.settle()
    with save_errors(run, log, checkpoints):
        log.sync()
        record = partial(run.event, "save", step=int(state.step), **log.speed)
        checkpoints.save(state, identity(run.config, corpus.meta) | {"metrics": log.digest}, record)
    log.restart_clock()


@contextmanager
def save_errors(run: Run, log: MetricsLog, checkpoints: Checkpoints, stop: bool = False) -> Iterator[None]:
    """Report what was not saved. The next save tries again, or the run ends, as on_save_error or `stop` says.

    Raises:
      CheckpointError: the run ends.
    """
    try:
        yield
    except (CheckpointError, processes.ProcessError, OSError) as error:
        what = f"{run.metrics_file} takes no more lines: {error.strerror}" if isinstance(error, OSError) else error
        latest, stop = checkpoints.latest, stop or run.config.train.on_save_error == "stop"
        stands = "no step is saved yet" if latest is None else f"step {latest} is saved"
        then = f"the run ends: make room, then {run.resume_command}" if stop else "the next save tries again: make room"
        text = f"{what}; {stands}, and {then}"
        notify(run, log.on_event, "save-failed", log.step, text)
        if stop:
            raise CheckpointError(text) from error


def score(
    config: Config, corpus: Corpus, state: TrainState, program: Any = None
) -> tuple[int, Evaluation, dict[str, float]]:
    """The step of `state`, its loss over the whole validation split, and nanoGPT-style estimates on both splits;
    `program` as in `evaluate`."""
    train_tokens, val_tokens = corpus.split(config.data)
    step, splits = int(state.step), {"train": train_tokens, "val": val_tokens}
    exact = evaluate(config.model, state.params, val_tokens, corpus.tokenizer, program=program)
    if not config.train.eval_batches:
        return step, exact, {}
    noisy = {f"{name}_estimate": estimate(config, state.params, split, step) for name, split in splits.items()}
    return step, exact, noisy


def due(config: Config, step: int) -> bool:
    """Whether to save and evaluate after `step` steps."""
    every = config.train.eval_every
    return step == config.train.steps or bool(every and step % every == 0)


def find_nan(config: Config, state: TrainState, windows: Any, metrics: Metrics) -> str:
    """The first non-finite step of a chunk and the operation that made it so: the chunk is computed again from `state`
    with a check after every operation (`jax.experimental.checkify`)."""
    i = int(metrics.applied.argmin())
    error, _ = jax.jit(checkify.checkify(partial(train_steps, config), errors=checkify.float_checks))(state, *windows)
    found = error.get() or "no single operation made a NaN: a value may have grown beyond float32"
    return f"step {int(state.step) + i + 1}: loss {metrics.loss[i]}, gradient norm {metrics.grad_norm[i]}: {found}"
