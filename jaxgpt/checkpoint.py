"""Checkpoints, written by Orbax and verified byte for byte when they are loaded.

checkpoints/250/                 the state after 250 steps, as Orbax writes it
checkpoints/250/manifest.json    the size and SHA-256 of each of its files, sealed
checkpoints/250.damaged/         a damaged checkpoint, set aside

A step is written under a temporary name, hashed, and renamed last: a directory named by a step is complete.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from jaxgpt import files, processes
from jaxgpt.run import Run
from jaxgpt.step import TrainState

PROGRAM = "jaxgpt checkpoint 2"
READABLE = (PROGRAM, "jaxgpt checkpoint 1")  # whose manifests held the validation loss, too
STEP = re.compile("0|[1-9][0-9]{0,17}")
BARRIERS = (
    "[op={0}] create_directory:post",
    "[op={0}] save_checkpointables_async:finalize",
    "[op={0}.state] save_and_finalize_{0}.state_commit_complete",
    "[op={0}.state] save_and_finalize_{0}.state_finalize_complete",
)
"""Where the processes of an Orbax save, its operation {0}, wait for each other."""

# Each thread of a failed save also logs a traceback; `_finish` reports the error.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in Path(record.pathname).parts))

# TensorStore 0.1 leaks the 3 KiB that this returns, and Orbax 0.12 calls it four times a save for a log line.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read."""


class DamagedError(CheckpointError):
    """A file of a checkpoint has changed since it was saved."""


@dataclass(frozen=True)
class Manifest:
    """The manifest.json of a saved step, written once."""

    step: int
    about: dict[str, Any]  # the run it belongs to: `start.identity` and the digest of metrics.jsonl
    arrays: dict[str, str]  # path of each array to its dtype and shape
    files: dict[str, list[Any]]  # path of each file to its size in bytes and its SHA-256


class Checkpoints:
    """The checkpoints of a run, by step, in `directory`.

    Saves need a `with` block and are asynchronous: the next `settle` or `save`, or the end of the block, raises what
    failed. Earlier steps remain, and a later save may succeed. All processes save; process 0 hashes, renames and
    prunes.

    Args:
      keep: how many of the newest steps to keep, besides the one of lowest validation loss; 0 to read only.
      keep_every: also keep the multiples of this step; 0 for none.
    """

    def __init__(self, directory: Path, keep: int = 0, keep_every: int = 0):
        self.directory, self._keep_every = directory, keep_every
        self._keep = keep if processes.is_primary() else 0
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._verified: dict[int, Manifest] = {}

    def __enter__(self) -> "Checkpoints":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        failed = self._failure()
        self._worker.shutdown()
        self._prune()
        if failed and not error:
            raise failed
        if failed and error:
            error.add_note(str(failed))

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        return sorted(int(name) for name in names if STEP.fullmatch(name))

    @property
    def latest(self) -> int | None:
        return max(self.steps, default=None)

    def save(self, state: TrainState, about: dict[str, Any], then: Callable[[], None] = lambda: None) -> None:
        """Start to save `state`, which may then be donated; call `then` in a thread once it is saved.

        Raises:
          CheckpointError: the last save failed; this one was not started.
        """
        self.settle()
        self._sweep()
        step = int(state.step)
        partial = self.directory / f".{step}.{processes.broadcast(secrets.randbits(31)):08x}.part"

        def try_folders() -> None:  # if Orbax cannot make them, threads with copies of the arrays wait for 5 minutes
            self.directory.mkdir(exist_ok=True)
            partial.mkdir()
            (partial / "state").mkdir()
            shutil.rmtree(partial)

        try:
            processes.on_primary(try_folders)
            written = ocp.save_async(partial.resolve(), state)
        except Exception as error:
            written = Future()
            written.set_exception(error)
        manifest = Manifest(step, about, _arrays(state), {})
        self._pending = self._worker.submit(self._finish, manifest, partial, written, then)

    def settle(self, wait: bool = True) -> None:
        """Wait for the save in progress; `wait=False` only checks one that has ended, in a run of a single process.

        Raises:
          CheckpointError: it failed. ProcessError: it failed in another process.
        """
        if wait or (processes.single_process() and self._pending and self._pending.done()):
            processes.raise_in_all(self._failure())

    def manifest(self, step: int) -> Manifest:
        """The manifest of `step`; a DamagedError if it is missing, damaged or from another program."""
        path = self._path(step) / "manifest.json"
        try:
            tree = files.unseal(path.read_bytes())
        except (OSError, files.SealError) as error:
            raise DamagedError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        if tree.get("program") not in READABLE or tree.get("step") != step:
            found = f"{tree.get('program')!r}, step {tree.get('step')}"
            raise DamagedError(f"{path}: expected {PROGRAM!r}, step {step}, found {found}")
        return Manifest(step, tree["about"], tree["arrays"], tree["files"])

    def verify(self, step: int) -> Manifest:
        """The manifest of `step`; a DamagedError if the size or SHA-256 of a file differs."""
        if step not in self._verified:
            manifest = self.manifest(step)
            for name, saved in manifest.files.items():
                path = self._path(step) / name
                try:
                    found = [path.stat().st_size, files.sha256(path)]
                except OSError as error:
                    raise DamagedError(f"{path} is missing or unreadable: {error.strerror}") from error
                if found != saved:
                    raise DamagedError(f"{path} has {found[0]:,} bytes and another SHA-256 than when it was saved")
            self._verified[step] = manifest
        return self._verified[step]

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, with the shapes, dtypes and shardings of `like` (arrays or shape structs).

        Raises:
          CheckpointError: it is missing, damaged, or from another model.
        """
        if step not in self.steps:
            raise CheckpointError(f"step {step} is not in {self.directory}, which has {self.steps}")
        arrays = (self.verify(step) if processes.is_primary() else self.manifest(step)).arrays
        # With JAX_ENABLE_X64, early versions saved float64; Orbax casts it to the dtype in `like`.
        found = {name: array.replace("float64", "float32") for name, array in arrays.items()}
        wrong = [
            f"  {name}: {found.get(name, 'nothing')} in the checkpoint, {expected} expected"
            for name, expected in _arrays(like).items()
            if found.get(name) != expected
        ]
        if wrong:
            raise CheckpointError(f"{self._path(step)} is from another model:\n" + "\n".join(wrong[:5]))
        try:
            return ocp.load(self._path(step).resolve(), like, checkpointable_name="state")
        except Exception as error:
            raise CheckpointError(f"{self._path(step)} cannot be read: {error.__cause__ or error}") from error

    def restore_params(self, step: int, like: Any) -> Any:
        """`restore` for the parameters alone."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self.restore(step, {"params": like})["params"]

    def set_aside(self, step: int) -> Path:
        """Rename an invalid checkpoint, so that its step can be saved again; return the new path."""
        self._verified.pop(step, None)
        n, aside = 0, self.directory / f"{step}.damaged"
        while aside.exists():
            n, aside = n + 1, self.directory / f"{step}.damaged{n + 1}"
        return self._path(step).rename(aside)

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _failure(self) -> BaseException | None:
        """The error of the last save, if any, once it has ended."""
        pending, self._pending = self._pending, None
        return pending.exception() if pending else None

    def _finish(self, manifest: Manifest, partial: Path, written: Any, then: Callable[[], None]) -> None:
        """Wait for Orbax, write the manifest and rename the directory, in the worker thread."""
        try:
            written.result()
            if not processes.is_primary():
                return
            for path in sorted(partial.rglob("*")):
                files.sync(path)
                if path.is_file():
                    manifest.files[str(path.relative_to(partial))] = [path.stat().st_size, files.sha256(path)]
            sealed = files.seal({"program": PROGRAM, **asdict(manifest)})
            files.write_atomically(partial / "manifest.json", sealed.encode())
            partial.rename(self._path(manifest.step))
            files.sync(self.directory)
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # the rest of the text is temporary paths
            reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)
            if processes.single_process():
                self._sweep()
            elif not isinstance(error, processes.ProcessError):  # the next save sweeps: another process may be writing
                reason = _end_in_all(partial.name, reason)
            raise CheckpointError(f"step {manifest.step} was not saved in {self.directory}: {reason}") from error
        then()
        self._prune()

    def _sweep(self) -> None:
        """Remove the files of saves that were killed or failed; Orbax may still have been writing."""
        if self._keep:
            for left in self.directory.glob(".*.part*"):
                shutil.rmtree(left, ignore_errors=True)

    def _prune(self) -> None:
        """Remove steps that need not be kept. Those with a damaged manifest stay, for a person to look at, and those
        that cannot be removed now are removed after a later save."""
        steps = list[int]()
        for step in self.steps if self._keep else ():
            with suppress(DamagedError):
                steps.append(self.manifest(step).step)
        kept = {*steps[-self._keep :], best_step(steps, Run(self.directory.parent).val_losses())}
        for step in steps:
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                with suppress(OSError):  # rename first: a kill must not leave half a step under its name
                    self._path(step).rename(self.directory / f".{step}.{secrets.token_hex(4)}.part")
        self._sweep()


def best_step(steps: Sequence[int], losses: Mapping[int, float]) -> int | None:
    """The step of lowest validation loss among `steps`; the newest if none was evaluated, None if `steps` is empty."""
    evaluated = [step for step in steps if step in losses]
    return min(evaluated, key=lambda step: losses[step]) if evaluated else max(steps, default=None)


def _arrays(tree: Any) -> dict[str, str]:
    """Path of each array in `tree` to its dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _end_in_all(name: str, reason: str) -> str:
    """End the failed save `name` in all processes, which Orbax would do after 20 minutes; return the reason of
    the one that failed first."""
    # Orbax below 0.13 (pyproject.toml) has no public names for these two, and for BARRIERS.
    from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator
    from orbax.checkpoint._src.multihost.multihost import get_jax_distributed_client

    client, operation = get_jax_distributed_client(), OperationIdGenerator.get_current_operation_id()
    with suppress(RuntimeError):  # another process has set it
        client.key_value_set(name, f"process {jax.process_index()}: {reason}")
    for barrier in BARRIERS:
        with suppress(RuntimeError):  # it fails in all processes, because only this one expects no others there
            client.wait_at_barrier(barrier.format(operation), 10_000, [jax.process_index()])
    return str(client.key_value_try_get(name))
