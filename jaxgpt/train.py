"""fit(): the training loop of a run, with its evaluations and saves."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify, multihost_utils
from jax.sharding import Mesh

from jaxgpt import config as configs
from jaxgpt import evaluation, model, processes
from jaxgpt.checkpoint import CheckpointError, Checkpoints, Manifest
from jaxgpt.config import Config
from jaxgpt.corpus import Corpus
from jaxgpt.data import chunks, config_starts, loader
from jaxgpt.evaluation import Evaluation, estimate, evaluate
from jaxgpt.metrics_log import DivergedError, Evaluated, Event, MetricsLog, Sampled, notify
from jaxgpt.run import Run
from jaxgpt.sharding import one_device
from jaxgpt.signals import stop_signals
from jaxgpt.start import environment, find_newest, identity, require_trainable
from jaxgpt.step import Metrics, TrainState, abstract_state, jit_train_steps, lower_init, train_steps


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run: Run
    step: int
    steps: int
    scores: list[Evaluated]  # every evaluation, oldest first
    seconds: float
    tokens_per_second: float | None  # of training in this process; None before the second chunk
    interrupted_by: int  # the signal that ended it early; 0 if it ran to its last step

    @property
    def best(self) -> Evaluated | None:
        """None if the run was interrupted before its first evaluation."""
        return min(self.scores, key=lambda scored: scored.rank, default=None)


def fit(
    run: Run,
    corpus: Corpus,
    on_event: Callable[[Event], None] = lambda event: None,
    config: Config | None = None,
    debug_nans: bool = False,
    mesh: Mesh | None = None,
    sample: Callable[[model.Params], str] | None = None,
) -> Summary:
    """Train `run` to its last step, from its newest valid checkpoint if it has one; log, evaluate and save.

    metrics.jsonl and the checkpoints depend only on the config and the tokens, not on how often the run was resumed.

    Args:
      config: replaces the run's config; it may differ in `start.MAY_CHANGE`.
      debug_nans: end the run at the first non-finite step, and name the operation; slower.
      mesh: the devices to train on, None for one; all meshes give the same results up to float32 reassociation.
      sample: generates a text from parameters; called after each evaluation during training, not at step 0 or the end.

    Raises:
      ConfigError: `config` cannot run.
      RunError: another process holds the run, it was started with another config or corpus, its files do not belong
        together, or no checkpoint is valid.
      DivergedError: too many steps in a row were not finite; the checkpoints before them remain.
      CheckpointError: the last save failed, or, if on_save_error is "stop", any save.
    """
    began, config, mesh = time.perf_counter(), config or run.config, mesh or one_device()
    train_tokens, val_tokens = corpus.split(config.data)
    parts = corpus.training_parts(config.data)
    checkpoints = Checkpoints(run.checkpoints, config.train.keep, config.train.keep_every)
    # Each thread has its own current mesh. Not in the `with` below, which would wait for it after a second signal.
    compiler = ThreadPoolExecutor(1, "compiler", jax.set_mesh, (mesh,))

    with (
        jax.set_mesh(mesh),
        run.lock(),
        stop_signals() as stop_signal,
        ThreadPoolExecutor(1, "reader") as reader,
    ):
        load = loader(config, train_tokens, mesh, parts, reader)
        require_trainable(run, config, corpus)
        newest = find_newest(run, config, checkpoints, on_event)
        step, n_bytes = (newest.step, newest.about["metrics"]["bytes"]) if newest else (0, 0)
        shapes = abstract_state(config, mesh)

        def compile_steps(begin: int, end: int) -> Any:
            return jit_train_steps(config, mesh).lower(shapes, *load(begin, end)).compile()

        programs = dict[int, Future[Any]]()  # by their number of steps
        evaluator: Future[Any] | None = None
        if newest:
            state = checkpoints.restore(step, shapes)
        else:
            init = lower_init(config, mesh)  # before the other thread lowers anything
            if processes.single_process():  # several must compile and run the same programs in the same order
                _, end = next(chunks(config, 0))
                programs[end] = compiler.submit(compile_steps, 0, end)
                if not config.train.eval_start:
                    evaluator = compiler.submit(evaluation.compiled, config.model, shapes.params, len(val_tokens))
            state = init.compile()()
        if config != run.config:
            run = processes.on_primary(partial(run.with_config, config)) or Run(run.path)
        run.event("start", step=step, **environment())
        stop = 0
        with (
            MetricsLog(run, n_bytes, lambda i: config_starts(config, parts, i, i + 1)[0], on_event) as log,
            checkpoints,
        ):
            evaluated = any(scored.step == step for scored in log.scores)
            if not evaluated and due_at_start(config, newest):
                log.add_evaluation(*score(config, corpus, state))
            for begin, end in chunks(config, step):
                windows = load(begin, end)
                if end - begin not in programs:
                    programs[end - begin] = compiler.submit(compile_steps, begin, end)
                    log.flush()  # the chunk under way, whose time excludes this compilation
                    programs[end - begin].result()
                    log.restart_clock()
                program = programs[end - begin].result()
                before = jax.tree.map(jnp.copy, state) if debug_nans else None
                state, metrics = program(state, *windows)
                if before and not metrics.applied.all():
                    raise DivergedError(find_nan(config, before, windows, metrics))
                log.add(begin, metrics)
                with save_errors(log, checkpoints):
                    checkpoints.settle(wait=False)
                last = end == config.train.steps
                stop = 0 if last else stop_signal()
                if stop or due(config, end):
                    save(log, checkpoints, state)  # first: a signal may leave no time for the evaluation
                    if not stop:
                        log.add_evaluation(*score(config, corpus, state, evaluator.result() if evaluator else None))
                        if sample and not last:
                            on_event(Sampled(end, sample(state.params)))
                            log.restart_clock()
                        stop = 0 if last else stop_signal()
                if stop:
                    break
            finish(log, checkpoints, state)
    seconds, speed = time.perf_counter() - began, log.speed["tokens_per_second"]
    return Summary(run, log.step, config.train.steps, log.scores, seconds, speed, stop)


def save(log: MetricsLog, checkpoints: Checkpoints, state: TrainState, stop: bool = False) -> None:
    """Wait for the last save, sync metrics.jsonl to disk, then start to save `state`; `stop` as in `save_errors`."""
    log.flush()  # the chunk under way, whose time excludes the wait
    with save_errors(log, checkpoints):
        checkpoints.settle()
    with save_errors(log, checkpoints, stop):
        log.sync()
        record = partial(log.run.event, "save", step=int(state.step), **log.speed)
        checkpoints.save(state, identity(log.run) | {"metrics": log.digest}, record)
    log.restart_clock()


def finish(log: MetricsLog, checkpoints: Checkpoints, state: TrainState) -> None:
    """Wait until `state`, the last one, and its metrics are on disk. If its save failed, try once more.

    Raises:
      CheckpointError: that failed, too.
    """
    with save_errors(log, checkpoints):
        checkpoints.settle()
    if not processes.broadcast(int(state.step) in checkpoints.steps):
        save(log, checkpoints, state, stop=True)
    with save_errors(log, checkpoints, stop=True):
        checkpoints.settle()
        log.sync()


@contextmanager
def save_errors(log: MetricsLog, checkpoints: Checkpoints, stop: bool = False) -> Iterator[None]:
    """Report a failed save, then continue; or raise a CheckpointError if `stop` is set or on_save_error is "stop"."""
    try:
        yield
    except (CheckpointError, processes.ProcessError, OSError) as error:
        run, latest = log.run, checkpoints.latest
        stop = stop or run.config.train.on_save_error == "stop"
        what = f"{run.metrics_file} cannot be written: {error.strerror}" if isinstance(error, OSError) else error
        saved = "no step is saved yet" if latest is None else f"step {latest} is saved"
        fix = "make room"
        if isinstance(error, FileNotFoundError):
            saved, fix = "nothing more is saved", "put it back"
        elif isinstance(error, FileExistsError):  # no later save could succeed
            fix, stop = "end the other process", True
        stop = bool(processes.any_process(stop))
        then = f"the run ends: {fix}, then resume it" if stop else f"the next save tries again: {fix}"
        text = f"{what}; {saved}, and {then}"
        notify(run, log.on_event, "save-failed", log.step, text)
        if stop:
            raise CheckpointError(text) from error


def score(
    config: Config, corpus: Corpus, state: TrainState, program: Any = None
) -> tuple[int, Evaluation, dict[str, float]]:
    """The step of `state`, its evaluation on the validation split (`program` as in `evaluate`), and estimates."""
    train, val = corpus.split(config.data)
    step, estimates = int(state.step), dict[str, float]()
    exact = evaluate(config.model, state.params, val, corpus.tokenizer, program=program)
    if config.train.eval_batches:
        for name, tokens in (("train_estimate", train), ("val_estimate", val)):
            estimates[name] = estimate(config, state.params, tokens, step)
    return step, exact, estimates


def due(config: Config, step: int) -> bool:
    """Whether to save and evaluate after `step` steps."""
    every = config.train.eval_every
    return step == config.train.steps or bool(every and step % every == 0)


def due_at_start(config: Config, newest: Manifest | None) -> bool:
    """Whether to evaluate the state that `fit` starts from. A checkpoint is saved before it is evaluated, so a resume
    evaluates a step that was due under the config it was saved with, too."""
    if not newest or not newest.step:
        return config.train.eval_start
    return due(configs.from_tree(newest.about["config"]), newest.step) or due(config, newest.step)


def find_nan(config: Config, state: TrainState, windows: Any, metrics: Metrics) -> str:
    """The first non-finite step of a chunk from `state`, and the operation that caused it: the chunk is computed again
    with a check after every operation (`jax.experimental.checkify`), on one device: checkify fails in a `shard_map`."""
    i = int(metrics.applied.argmin())
    whole, windows = multihost_utils.process_allgather((state, windows), tiled=True)
    with jax.set_mesh(one_device()):
        checked = checkify.checkify(partial(train_steps, config), errors=checkify.float_checks)
        error, _ = jax.jit(checked)(whole, *windows)
    found = error.get() or "no operation made a NaN: a value may have overflowed float32"
    return f"step {int(state.step) + i + 1}: loss {metrics.loss[i]}, gradient norm {metrics.grad_norm[i]}: {found}"
