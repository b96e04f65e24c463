"""fit(): the training loop of a run, with its evaluations and saves."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.sharding import Mesh

from jaxgpt import memory, model, processes
from jaxgpt.checkpoint import CheckpointError, Checkpoints, Manifest
from jaxgpt.config import Config
from jaxgpt.corpus import Corpus
from jaxgpt.data import chunks, config_starts, device_tokens, inputs_and_targets, loader, take
from jaxgpt.evaluation import Evaluation, estimate, evaluate
from jaxgpt.mesh import num_shards, one_device
from jaxgpt.metrics_log import DivergedError, Evaluated, Event, MetricsLog, Sampled, notify
from jaxgpt.run import Run, RunError
from jaxgpt.signals import stop_signals
from jaxgpt.start import environment, identity, newest_whole
from jaxgpt.step import TrainState, abstract_state, jit_train_steps, sharded_init, train_step


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
      OutOfMemoryError: it does not fit, by an estimate or by the compiler's figures.
      RunError: another process holds the run, its files do not belong together, or no checkpoint is whole.
      DivergedError: too many steps in a row were not finite; the checkpoints before them stand.
      CheckpointError: the last checkpoint was not written, or any where on_save_error is "stop".
    """
    config, began = config or run.config, time.perf_counter()
    train_tokens, _ = corpus.split(config.data)
    parts = corpus.training_parts(config.data)
    mesh = mesh or one_device()
    steps, shards = jit_train_steps(config, mesh), num_shards(mesh)

    def compiled_steps(begin: int, end: int) -> Any:
        """The program of some steps, compiled for the shapes of a state."""
        with jax.set_mesh(mesh):
            return steps.lower(abstract_state(config, mesh), *load(begin, end)).compile()

    def starts_of(step: int) -> Any:
        return config_starts(config, parts, step, step + 1)[0]

    with (
        jax.set_mesh(mesh),
        run.lock(),
        stop_signals() as stop_signal,
        ThreadPoolExecutor(1, "reader") as reading,
        ThreadPoolExecutor(1, "compile") as background,
    ):
        load = loader(config, train_tokens, mesh, parts, reading)
        saved = Checkpoints(run.checkpoints)
        found = newest(run, config, corpus, saved, on_event)
        new = found is None
        memory.require(config, device_tokens(config, len(train_tokens)), new=new, shards=shards)
        # Several processes must run, and some compile, the same programs in the same order.
        early = new and processes.single_process()
        ahead = background.submit(compiled_steps, *next(chunks(config, 0))) if early else None
        state = saved.restore(found.step, abstract_state(config, mesh)) if found else sharded_init(config, mesh)
        if config != run.config:
            run = processes.on_primary(partial(run.with_config, config)) or Run(run.path)
        step, stop, programs = int(state.step), 0, dict[int, Any]()
        run.event("start", step=step, **environment())
        n_bytes = found.about["metrics"]["bytes"] if found else 0
        with (
            MetricsLog(run, n_bytes, starts_of, on_event) as log,
            Checkpoints(run.checkpoints, config.train.keep, config.train.keep_every, log.losses) as checkpoints,
        ):
            saves = Saves(run, corpus, checkpoints, log)
            if (due(config, step) if step else config.train.eval_start) and step not in log.losses:
                log.add_evaluation(*score(config, corpus, state))  # a checkpoint is saved before it is evaluated
            for begin, end in chunks(config, step):
                served = load(begin, end)
                if end - begin not in programs:
                    program = ahead.result() if ahead and not programs else compiled_steps(begin, end)
                    memory.require_compiled(program, config, new=new, shards=shards)
                    programs[end - begin] = program
                before = jax.tree.map(jnp.copy, state) if debug_nans else None
                state, metrics = programs[end - begin](state, *served)
                if before and not metrics.applied.all():
                    raise DivergedError(find_nan(config, before, *served))
                log.add(begin, metrics)
                saves.settle(wait=False)
                more = end < config.train.steps
                stop = stop_signal() if more else 0
                if due(config, end) or stop:
                    saves.save(state)  # first: a signal may leave no time for the evaluation
                if due(config, end) and not stop:
                    log.add_evaluation(*score(config, corpus, state))
                    if sample and more:
                        on_event(Sampled(end, sample(state.params)))
                        log.restart_clock()
                    stop = stop_signal() if more else 0
                if stop:
                    break
            saves.finish(state)
            run.event("end", step=int(state.step), seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return Summary(run, int(state.step), config.train.steps, log.scores, seconds, log.tokens_per_second, stop)


class Saves:
    """The saves of a run in training: metrics.jsonl first, then the state. One that fails in any process is reported in
    all; then the run ends or the next save tries again, as on_save_error says."""

    def __init__(self, run: Run, corpus: Corpus, checkpoints: Checkpoints, log: MetricsLog):
        self._run, self._corpus, self._checkpoints, self._log = run, corpus, checkpoints, log
        self._step = 0
        self._failure: CheckpointError | None = None

    def save(self, state: TrainState) -> None:
        """Start to save `state`, once the last save has ended.

        Raises:
          CheckpointError: a save failed, and on_save_error is "stop".
        """
        self.settle()
        self._step, self._failure = int(state.step), None
        if self._try(self._log.sync):
            tokens, seconds = self._log.trained
            speed = {"tokens_per_second": self._log.tokens_per_second}
            speed |= {"trained_tokens": tokens, "trained_seconds": seconds}
            about = identity(self._run.config, self._corpus.meta, self._log.position)
            record = partial(self._run.event, "save", step=self._step, **speed)
            self._try(partial(self._checkpoints.save, state, about, record))
        self._log.restart_clock()

    def settle(self, wait: bool = True) -> None:
        """Report a save that has failed; as `save`."""
        if wait or processes.single_process():  # processes ask each other together, or not at all
            self._try(partial(self._checkpoints.settle, wait))

    def finish(self, state: TrainState) -> None:
        """Wait for the last save, that of `state`, and try once more if it failed.

        Raises:
          CheckpointError: it failed again, or the last lines of metrics.jsonl cannot be written.
        """
        self.settle()
        if self._failure:
            self.save(state)
            self.settle()
        if self._failure or not self._try(self._log.sync):
            raise CheckpointError(f"{self._failure}; {self._stands()}: make room, then {self._run.resume_command}")

    def _try(self, action: Callable[[], Any]) -> bool:
        """Whether `action` succeeds in every process; if not, the failure is reported."""
        failure = None
        try:
            action()
        except CheckpointError as error:
            failure = error
        except OSError as error:
            failure = CheckpointError(f"{self._run.metrics_file} takes no more lines: {error.strerror}")
        if not processes.any_process(failure is not None):
            return True
        self._failure = failure or CheckpointError(
            f"step {self._step}: another process failed to save it, and says why"
        )
        stop = self._run.config.train.on_save_error == "stop"
        then = "and the next save tries again: make room"
        if stop:
            then = f"and the run ends, as --on-save-error says: make room, then {self._run.resume_command}"
        text = f"{self._failure}; {self._stands()}, {then}"
        notify(self._run, self._log.on_event, "save-failed", self._step, text)
        if stop:
            raise CheckpointError(text) from failure
        return False

    def _stands(self) -> str:
        latest = self._checkpoints.latest
        return "no step is saved yet" if latest is None else f"step {latest} is saved"


def newest(
    run: Run, config: Config, corpus: Corpus, checkpoints: Checkpoints, on_event: Callable[[Event], None]
) -> Manifest | None:
    """The manifest of the step that every process resumes from; None if the run is new."""
    warn = partial(notify, run, on_event)
    found = processes.on_primary(lambda: newest_whole(run, config, corpus, checkpoints, warn))
    step = processes.broadcast(found.step if found else -1)
    if step >= 0 and not processes.is_primary():
        found = checkpoints.manifest(step)
    if step > config.train.steps:
        raise RunError(f"run {run.path.name!r} is at step {step} already, beyond the {config.train.steps} asked for")
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


def due(config: Config, step: int) -> bool:
    """Whether to save and evaluate after `step` steps."""
    every = config.train.eval_every
    return step == config.train.steps or bool(every and step % every == 0)


def find_nan(config: Config, state: TrainState, tokens: jax.Array | None, windows: jax.Array) -> str:
    """The first non-finite step on `windows`, as `train_steps` takes them, and the operation that made it so.

    The steps are computed again one by one from `state`, the non-finite one with a check after every operation
    (`jax.experimental.checkify`).
    """
    one_step = jax.jit(partial(train_step, config))
    checked = jax.jit(checkify.checkify(partial(train_step, config), errors=checkify.float_checks))
    for row in windows:
        batch = inputs_and_targets(row) if tokens is None else take(tokens, row, config.model.block_size)
        after, metrics = one_step(state, batch)
        if not metrics.applied:
            error, _ = checked(state, batch)
            found = error.get() or "no single operation made a NaN: a value may have grown beyond float32"
            return f"step {int(after.step)}: loss {metrics.loss}, gradient norm {metrics.grad_norm}: {found}"
        state = after
    return "a step was not finite in the compiled scan, but is when computed alone: it is at the edge of float32"
