"""Starting and resuming a run: a new directory, or the newest checkpoint that everything still agrees with."""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import machine, matmul, model
from jaxgpt.checkpoint import CheckpointError, Checkpoints, DamagedError, Manifest, abstract, best_step
from jaxgpt.config import Config, ModelConfig, check, differences
from jaxgpt.corpus import Corpus
from jaxgpt.optimizer import make_optimizer
from jaxgpt.run import Run, RunError
from jaxgpt.step import TrainState, init_state
from jaxgpt.tokenizer import Tokenizer

MAY_CHANGE = ["eval_batches", "eval_every", "eval_start", "keep", "keep_every"]
MAY_CHANGE += ["max_skipped", "on_save_error", "scan_steps", "steps"]
"""What a resume may change: how long to train, what to evaluate and to keep; nothing that the weights depend on."""
TRIES = 5
"""How often to look for a checkpoint that may be pruned meanwhile, by the process that trains the run."""


def new_run(
    config: Config, corpus: Corpus, name: str, runs_dir: Path, weights: model.Params | None = None, origin: str = ""
) -> Run:
    """Create the directory of a run of `config` on `corpus`.

    Args:
      weights: to start from in place of random ones; from `origin`. They are saved as step 0.

    Raises:
      UsageError: the config cannot run with this vocabulary, or the directory cannot be created.
    """
    config = resolve(config, corpus)

    def save_weights(run: Run) -> None:
        if weights is None:
            return
        state = TrainState(jnp.int32(0), weights, make_optimizer(config).init(weights))
        with Checkpoints(run.checkpoints, config.train.keep) as checkpoints:
            checkpoints.save(state, identity(config, corpus.meta))
        run.event("import", step=0, origin=origin)

    return Run.create(runs_dir, name, config, corpus.meta, save_weights)


def resolve(config: Config, corpus: Corpus) -> Config:
    """`config` with the vocabulary size, the compute dtype that "auto" means here, and the end of the schedule set.

    So a run that is made longer, or resumed elsewhere, keeps the schedule and the dtype it started with.

    Raises:
      ConfigError: it cannot run with that vocabulary.
    """
    vocab_size = config.model.vocab_size or corpus.tokenizer.vocab_size
    model = replace(config.model, vocab_size=vocab_size, precision=matmul.resolve(config.model.precision))
    optimizer = replace(config.optimizer, decay_steps=config.optimizer.decay_steps or config.train.steps)
    return check(replace(config, model=model, optimizer=optimizer))


def require_resumable(run: Run, was: Config, now: Config) -> None:
    """Check that `now` continues what `was` computed.

    Raises:
      RunError: it differs in more than MAY_CHANGE; each such field is named.
    """
    refused = [
        f"  {name}: {old!r} in the run, {new!r} asked for"
        for name, old, new in differences(was, now)
        if name not in MAY_CHANGE
    ]
    if refused:
        raise RunError(
            f"run {run.path.name!r} cannot be resumed with another\n" + "\n".join(refused) + "\n"
            f"a resume may change {', '.join(MAY_CHANGE)}; for the rest start a new run: --run OTHER-NAME"
        )


def identity(config: Config, corpus_meta: dict[str, Any], metrics: tuple[int, str] | None = None) -> dict[str, Any]:
    """What a checkpoint records of its run, and a resume must find again.

    Args:
      metrics: length in bytes and SHA-256 of metrics.jsonl up to the checkpoint; None where it is empty.
    """
    n_bytes, sha256 = metrics or (0, hashlib.sha256().hexdigest())
    tokenizer = json.dumps(corpus_meta["tokenizer"], sort_keys=True)
    return {
        "config": configs.to_tree(config),
        "tokens": corpus_meta["sha256"],
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "metrics": {"bytes": n_bytes, "sha256": sha256},
    }


def require_own(run: Run, config: Config, corpus_meta: dict[str, Any], manifest: Manifest) -> None:
    """Check that a checkpoint belongs to this config, corpus and tokenizer.

    Raises:
      RunError: it does not.
    """
    saved, now = manifest.about, identity(config, corpus_meta)
    if not saved.keys() >= now.keys():
        raise RunError(f"step {manifest.step} of {run.path} does not record its config and corpus: it is not of a run")
    require_resumable(run, configs.from_tree(saved["config"]), config)
    for name in ("tokens", "tokenizer"):
        if saved[name] != now[name]:
            raise RunError(
                f"run {run.path.name!r}: the {name} of step {manifest.step} have SHA-256 {saved[name]}, those of "
                f"{corpus_meta['source']} have {now[name]}: name the folder of the right ones, --data-dir"
            )


def newest_whole(
    run: Run, config: Config, corpus: Corpus, checkpoints: Checkpoints, warn: Callable[[str, int, str], None]
) -> Manifest | None:
    """The newest step whose files and lines of metrics.jsonl are what was saved; None if nothing was saved yet.

    Newer steps are set aside, each with a warning (kind, step, text); so is another version of jax or another device
    than before worth one. If no step is whole, nothing is changed.

    Raises:
      RunError: every step is damaged or gone, or one is of another config, corpus or tokenizer.
    """
    problems: dict[int, str] = {}
    for step in reversed(checkpoints.steps):
        try:
            manifest = checkpoints.verify(step)
            require_own(run, config, corpus.meta, manifest)
            _verify_metrics(run, manifest)
        except DamagedError as error:
            problems[step] = str(error)
            continue
        for bad, problem in problems.items():
            warn("damage", bad, f"{problem}; step {bad} was set aside as {checkpoints.set_aside(bad)}")
        if problems:
            warn("damage", step, f"resuming from step {step}, the newest that is whole with its lines of metrics")
        starts = [event for event in run.events() if event["event"] == "start"]
        for name, now in environment().items() if starts else ():
            if name in ("jax", "backend", "device") and (was := starts[-1].get(name, now)) != now:
                warn("version", step, f"{name} is {now} now and was {was}: the bits that follow may differ")
        return manifest
    found = [f"step {step}: {problem}" for step, problem in problems.items()]
    saved = [event["step"] for event in run.events() if event["event"] in ("save", "import")]
    if not found and saved:
        found = [f"step {max(saved)} was saved, but {checkpoints.directory} holds no checkpoint"]
    if found:
        raise RunError(
            f"run {run.path.name!r} has no step that is whole with its lines of metrics, and is not started over:\n  "
            + "\n  ".join(found)
            + "\nrestore a copy of those files, or start a new run: --run OTHER-NAME (jaxgpt sample and export "
            "need only a checkpoint)"
        )
    return None


def _verify_metrics(run: Run, manifest: Manifest) -> None:
    """Check that the lines of metrics.jsonl up to a step are those that were there when it was saved.

    Raises:
      DamagedError: they are not.
    """
    expected = manifest.about["metrics"]
    data = run.metrics_file.read_bytes() if run.metrics_file.exists() else b""
    if len(data) < expected["bytes"]:
        raise DamagedError(f"{run.metrics_file} has {len(data):,} bytes, expected {expected['bytes']:,} or more")
    if hashlib.sha256(data[: expected["bytes"]]).hexdigest() != expected["sha256"]:
        raise DamagedError(f"{run.metrics_file} has another SHA-256 up to there than when it was saved")


def environment() -> dict[str, Any]:
    """What a start records of its process: the bits of a run depend on jax, backend and device, and on nothing else."""
    return {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "jaxgpt": jaxgpt.__version__,
        "python": platform.python_version(),
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "host": platform.node(),
        "process": os.getpid(),
        "command": shlex.join(["jaxgpt", *sys.argv[1:]]),
    }


def load_model(run: Run, which: str = "best") -> tuple[ModelConfig, model.Params, Tokenizer]:
    """The model config, the parameters of a checkpoint and the tokenizer of a run: what sampling needs."""
    return run.config.model, load_checkpoint(run, which)[1], run.tokenizer


def load_checkpoint(run: Run, which: str | int = "best") -> tuple[int, model.Params]:
    """The step and the parameters of a run's "best" or "last" checkpoint, or of that of a step.

    The best is that of lowest validation loss in metrics.jsonl, and the last if none was evaluated.

    Raises:
      RunError: there is no such checkpoint.
      CheckpointError: it is damaged.
    """
    if which not in ("best", "last") and type(which) is not int:
        raise RunError(f"checkpoint is {which!r}, expected 'best', 'last' or the number of a step")
    like = abstract(jax.eval_shape(init_state, run.config).params)
    checkpoints = Checkpoints(run.checkpoints)
    for _ in range(TRIES):
        steps = checkpoints.steps
        if not steps:
            raise RunError(f"run {run.path.name!r} has no checkpoint yet: let it train, or {run.resume_command}")
        if type(which) is int and which not in steps:
            raise RunError(
                f"run {run.path.name!r} has no checkpoint of step {which}; there are {', '.join(map(str, steps))}"
            )
        step = which if isinstance(which, int) else steps[-1]
        if which == "best":
            step = best_step(steps, run.val_losses())
        try:
            require_own(run, run.config, run.corpus_meta, checkpoints.verify(step))
            return step, checkpoints.restore_params(step, like)
        except CheckpointError as error:
            if step in checkpoints.steps:  # else it was pruned just now
                raise CheckpointError(
                    f"the {which} checkpoint cannot be used: {error}; {run.resume_command} resumes from the newest "
                    "that is whole"
                ) from error
    raise RunError(f"run {run.path.name!r}: each checkpoint was pruned while it was being read; try again")
