"""The way back: the newest step of a run whose every byte is what was saved."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import machine
from jaxgpt.checkpoint import Checkpoints, DamagedError, Manifest
from jaxgpt.config import Config, differences
from jaxgpt.corpus import Corpus
from jaxgpt.run import Run, RunError

MAY_CHANGE = {
    "steps",
    "scan_steps",
    "eval_every",
    "eval_start",
    "eval_batches",
    "keep",
    "keep_every",
    "max_skipped",
    "on_save_error",
}
"""What a resume may change: how long, how often to look, what to keep; not what is computed."""


def about(config: Config, corpus_meta: dict[str, Any], metrics: tuple[int, str] = (0, "")) -> dict[str, Any]:
    """What a checkpoint says of its run: what a resume must find again.

    Args:
      metrics: length in bytes and SHA-256 of metrics.jsonl up to the checkpoint.
    """
    n_bytes, sha256 = metrics
    return {
        "config": configs.to_tree(config),
        "tokens": corpus_meta["sha256"],
        "tokenizer": _sha256(corpus_meta["tokenizer"]),
        "metrics": {"bytes": n_bytes, "sha256": sha256 or hashlib.sha256().hexdigest()},
    }


def require_same(run: Run, was: Config, now: Config) -> None:
    """Check that `now` goes on with what `was` computed.

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
            f"run {run.path.name!r} cannot go on with another\n" + "\n".join(refused) + "\n"
            f"a resume may change {', '.join(sorted(MAY_CHANGE))}; for the rest start a new run: --run OTHER-NAME"
        )


def newest_good(
    run: Run, config: Config, corpus: Corpus, checkpoints: Checkpoints, tell: Callable[[str, int, str], None]
) -> Manifest | None:
    """The newest step to go on from, None if nothing was saved yet; nothing is written unless there is one.

    Newer steps that are damaged, or whose lines of metrics are, are set aside, and each is told of; so is another
    version of jax than before, or another device.

    Raises:
      RunError: all that was saved is damaged or gone, or it is of another config, text or tokenizer.
    """
    problems: dict[int, str] = {}
    for step in reversed(checkpoints.steps):
        try:
            manifest = checkpoints.verify(step)
        except DamagedError as error:
            problems[step] = str(error)
            continue
        require_own(run, config, corpus.meta, manifest)
        if problem := _metrics_problem(run, manifest):
            problems[step] = problem
            continue
        for bad, what in problems.items():
            tell("damage", bad, f"{what}; step {bad} was set aside as {checkpoints.set_aside(bad)}")
        if problems:
            tell("damage", step, f"going back to step {step}, the newest that is whole with its lines of metrics")
        starts = [event for event in run.events() if event["event"] == "start"]
        for name, now in surroundings().items():
            was = starts[-1].get(name, now) if starts else now
            if was != now:
                tell("version", step, f"{name} is {now} now and was {was}: the bits that follow may differ")
        return manifest
    told = [f"step {step}: {what}" for step, what in problems.items()]
    saved = [event["step"] for event in run.events() if event["event"] in ("save", "import")]
    if not told and saved:
        told = [f"step {max(saved)} was saved, but {checkpoints.directory} holds no checkpoint"]
    if told:
        raise RunError(
            f"run {run.path.name!r} has no step that is whole with its lines of metrics, and is not started again "
            "from nothing:\n  " + "\n  ".join(told) + "\nput back a copy of those files, or start a new run: "
            "--run OTHER-NAME (jaxgpt sample and export ask for the checkpoint alone)"
        )
    return None


def surroundings() -> dict[str, str]:
    """What besides (config, tokens, seed) the last bits of a run depend on."""
    return {"jax": jax.__version__, "backend": jax.default_backend(), "device": jax.devices()[0].device_kind}


def circumstances() -> dict[str, Any]:
    """What no number of a run depends on, and what a person may want to know of it later."""
    return {
        "jaxgpt": jaxgpt.__version__,
        "python": platform.python_version(),
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "command": shlex.join(["jaxgpt", *sys.argv[1:]]),
    }


def require_own(run: Run, config: Config, corpus_meta: dict[str, Any], manifest: Manifest) -> None:
    """Check that a whole step belongs to this config, text and tokenizer.

    Raises:
      RunError: it does not.
    """
    said, now = manifest.about, about(config, corpus_meta)
    if not said.keys() >= now.keys():
        raise RunError(f"step {manifest.step} of {run.path} does not say what it belongs to: it is no step of a run")
    require_same(run, configs.from_tree(said["config"]), config)
    for name in ("tokens", "tokenizer"):
        if said[name] != now[name]:
            raise RunError(
                f"run {run.path.name!r}: the {name} of step {manifest.step} have SHA-256 {said[name]}, "
                f"those of {corpus_meta['source']} in hand {now[name]}: name the folder of the right ones, --data-dir"
            )


def _metrics_problem(run: Run, manifest: Manifest) -> str | None:
    """What is wrong with the lines of metrics.jsonl up to a step, None if they are what they were."""
    wanted = manifest.about["metrics"]
    data = run.metrics_file.read_bytes() if run.metrics_file.exists() else b""
    if len(data) < wanted["bytes"]:
        return f"{run.metrics_file} has {len(data):,} bytes, expected {wanted['bytes']:,} or more"
    if hashlib.sha256(data[: wanted["bytes"]]).hexdigest() != wanted["sha256"]:
        return f"{run.metrics_file} has another SHA-256 up to there than when it was saved"
    return None


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
