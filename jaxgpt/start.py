"""Start a run in a new directory, or resume it from its newest valid checkpoint."""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import machine, matmul, model, processes
from jaxgpt.checkpoint import CheckpointError, Checkpoints, DamagedError, Manifest, best_step
from jaxgpt.config import Config, ModelConfig, check, differences
from jaxgpt.corpus import Corpus
from jaxgpt.metrics_log import Event, notify
from jaxgpt.optimizer import make_optimizer
from jaxgpt.run import Run, RunError
from jaxgpt.sharding import Sizes, one_device
from jaxgpt.step import TrainState, abstract_state
from jaxgpt.tokenizer import Tokenizer

MAY_CHANGE = ["eval_batches", "eval_every", "eval_start", "keep", "keep_every"]
MAY_CHANGE += ["max_skipped", "on_save_error", "scan_steps", "steps"]
"""Settings that a resume may change: none that the weights after a step depend on."""


def new_run(
    config: Config, corpus: Corpus, name: str, runs_dir: Path, weights: model.Params | None = None, origin: str = ""
) -> Run:
    """Create the directory of a run of `config` on `corpus`.

    Args:
      weights: initial parameters, saved as step 0; None for random ones.
      origin: where the weights come from, for events.jsonl.

    Raises:
      UsageError: the config cannot run with this vocabulary, the weights are not of its model, or the directory cannot
        be created.
    """
    config = resolve(config, corpus)
    shapes = partial(jax.tree.map, lambda x: (x.shape, str(x.dtype)))
    if weights is not None and shapes(weights) != shapes(abstract_state(config, one_device()).params):
        raise RunError("the weights have other names, shapes or dtypes than the parameters of the config")

    def save_weights(run: Run) -> None:
        if weights is not None:
            state = TrainState(jnp.int32(0), weights, make_optimizer(config).init(weights))
            with Checkpoints(run.checkpoints, config.train.keep) as checkpoints:
                checkpoints.save(state, identity(run) | {"metrics": digest(b"")})
            run.event("import", step=0, origin=origin)

    return Run.create(runs_dir, name, config, corpus.meta, save_weights)


def resolve(config: Config, corpus: Corpus) -> Config:
    """`config` with the vocabulary size, the compute dtype for "auto" on this machine and decay_steps filled in.

    So a run that is extended, or resumed on another machine, keeps its schedule and its dtype.

    Raises:
      ConfigError: it cannot run with this vocabulary.
    """
    vocab_size = config.model.vocab_size or corpus.tokenizer.vocab_size
    model = replace(config.model, vocab_size=vocab_size, precision=matmul.resolve(config.model.precision))
    optimizer = replace(config.optimizer, decay_steps=config.optimizer.decay_steps or config.train.steps)
    return check(replace(config, model=model, optimizer=optimizer))


def require_resumable(run: Run, was: Config, now: Config) -> None:
    """Raise a RunError if the two configs differ in settings other than MAY_CHANGE."""
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


def require_trainable(run: Run, config: Config, corpus: Corpus) -> None:
    """Raise an error unless `run` can be trained with `config`, as in `require_resumable`, on this corpus, its own."""
    require_resumable(run, run.config, check(config))
    own, found = run.corpus_meta, corpus.meta
    if any(own[name] != found[name] for name in ("sha256", "tokenizer")):
        raise RunError(
            f"run {run.path.name!r}: expected its corpus {own['source']}, tokens of SHA-256 {own['sha256']}, found "
            f"{found['source']}, {found['sha256']}, or another tokenizer; `start_run` returns a run with its corpus"
        )


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint records of its run, besides the `digest` of metrics.jsonl; a resume compares it."""
    tokenizer = digest(json.dumps(run.corpus_meta["tokenizer"], sort_keys=True).encode())["sha256"]
    return {"config": asdict(run.config), "tokens": run.corpus_meta["sha256"], "tokenizer": tokenizer}


def digest(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def require_own(run: Run, config: Config, manifest: Manifest) -> None:
    """Raise a RunError unless a checkpoint belongs to `run`, and was saved with settings that `config` may follow."""
    saved, now = manifest.about, identity(run)
    for name in ("tokens", "tokenizer"):
        if saved.get(name) != now[name]:
            raise RunError(
                f"run {run.path.name!r}, {name} of step {manifest.step}: expected SHA-256 {now[name]}, found "
                f"{saved.get(name)}: the checkpoint is of another run; restore a copy"
            )
    require_resumable(run, configs.from_tree(saved["config"]), config)


def require_metrics(run: Run, manifest: Manifest) -> None:
    """Raise a DamagedError if the lines of metrics.jsonl up to a checkpoint have changed since it was saved."""
    saved = manifest.about["metrics"]
    lines = run.metrics_file.read_bytes() if run.metrics_file.exists() else b""
    if digest(lines[: saved["bytes"]]) != saved:
        raise DamagedError(f"the first {saved['bytes']:,} bytes of {run.metrics_file} are not those that were saved")


def find_newest(
    run: Run, config: Config, checkpoints: Checkpoints, on_event: Callable[[Event], None]
) -> Manifest | None:
    """The manifest of the newest valid checkpoint, the same in all processes; None if nothing was saved yet.

    A checkpoint is valid if its files and the lines of metrics.jsonl up to it are unchanged. Newer, damaged ones are
    set aside, each with a Notice. Another version of jax, device or mesh gets a Notice. If none is valid, no file
    changes.

    Raises:
      RunError: every checkpoint is damaged or gone; one has another config, corpus or tokenizer, or too many steps.
    """
    newest = processes.on_primary(partial(_newest_valid, run, config, checkpoints, on_event))
    step = processes.broadcast(newest.step if newest else -1)
    return checkpoints.manifest(step) if step >= 0 else None


def _newest_valid(
    run: Run, config: Config, checkpoints: Checkpoints, on_event: Callable[[Event], None]
) -> Manifest | None:
    problems = dict[int, str]()
    for step in reversed(checkpoints.steps):
        try:
            manifest = checkpoints.verify(step)
            require_own(run, config, manifest)
            require_metrics(run, manifest)
        except DamagedError as error:
            problems[step] = str(error)
            continue
        if step > (steps := config.train.steps):
            raise RunError(
                f"run {run.path.name!r} is at step {step} already, beyond the {steps} asked for: give at least "
                f"--steps {step}"
            )
        for bad, problem in problems.items():
            aside = f"{problem}; step {bad} was set aside as {checkpoints.set_aside(bad)}"
            notify(run, on_event, "damage", bad, f"{aside}; resuming from step {step}")
        before, here = run.last_event("start"), environment()
        for name in ("jax", "backend", "device", "mesh"):
            if (was := before.get(name, here[name])) != here[name]:
                text = f"{name} is {here[name]} and was {was}: bits may differ from here on"
                notify(run, on_event, "version", step, text)
        return manifest
    found = [f"step {step}: {problem}" for step, problem in problems.items()]
    if not found and (saved := run.last_event("save", "import")):
        found = [f"step {saved.get('step')} was saved, but {checkpoints.directory} holds no checkpoint"]
    if found:
        raise RunError(
            f"run {run.path.name!r} has no valid checkpoint, and is not started over:\n  " + "\n  ".join(found) + "\n"
            "restore a copy of those files, or start a new run: --run OTHER-NAME (jaxgpt sample and export need only a "
            "checkpoint)"
        )
    return None


def environment() -> dict[str, Any]:
    """What events.jsonl records of a start. Of these, a run's bits depend only on jax, backend, device and mesh."""
    return {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "mesh": str(Sizes(**jax.sharding.get_abstract_mesh().shape)),
        "jaxgpt": jaxgpt.__version__,
        "python": platform.python_version(),
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "devices": jax.sharding.get_abstract_mesh().size,
        "processes": jax.process_count(),
        "host": platform.node(),
        "process": os.getpid(),
        "command": shlex.join(["jaxgpt", *sys.argv[1:]]),
    }


def load_model(run: Run, which: str | int = "best") -> tuple[ModelConfig, model.Params, Tokenizer]:
    """The model config, the parameters of a checkpoint and the tokenizer of a run, as sampling takes them."""
    return run.config.model, load_checkpoint(run, which)[1], run.tokenizer


def load_checkpoint(run: Run, which: str | int = "best") -> tuple[int, model.Params]:
    """The step and parameters of a run's checkpoint.

    Args:
      which: "best", by validation loss ("last" if none was evaluated), "last", or a step.

    Raises:
      RunError: there is no such checkpoint.
      CheckpointError: it is damaged.
    """
    checkpoints, like = Checkpoints(run.checkpoints), abstract_state(run.config, one_device()).params
    while True:  # again if the training process prunes the checkpoint while it is read
        steps = checkpoints.steps
        if not steps:
            lost = run.last_event("save", "import")
            then = "restore a copy" if lost else f"let it train, or {run.resume_command}"
            raise RunError(f"run {run.path.name!r} has no checkpoint{'' if lost else ' yet'}: {then}")
        named = {"best": best_step(steps, run.val_losses()), "last": steps[-1]} | {str(step): step for step in steps}
        step = named.get(str(which))
        if step is None:
            raise RunError(f"checkpoint is {which!r}, expected 'best', 'last' or a step: {', '.join(map(str, steps))}")
        try:
            require_own(run, run.config, checkpoints.verify(step))
            return step, checkpoints.restore_params(step, like)
        except CheckpointError as error:
            if step in checkpoints.steps:
                raise CheckpointError(
                    f"checkpoint {which} cannot be used: {error}; {run.resume_command} resumes from the newest "
                    "valid one"
                ) from error
