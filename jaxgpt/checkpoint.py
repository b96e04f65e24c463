"""Training state to disk and back, with every byte verified: the only module that uses Orbax.

checkpoints/250/                 the state after 250 steps, as Orbax writes it
checkpoints/250/manifest.json    the size and SHA-256 of each of its files, sealed
checkpoints/250.damaged/         one that was found damaged and set aside

A step is written under a temporary name, hashed, and renamed last: a directory named by a step is whole.
"""

import logging
import math
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
from orbax.checkpoint import v1 as ocp

from jaxgpt import files, processes
from jaxgpt.step import TrainState

PROGRAM = "jaxgpt checkpoint 2"
READABLE = (PROGRAM, "jaxgpt checkpoint 1")  # whose manifests held the validation loss, too
NO_LOSSES: Mapping[int, float] = {}
STEP = re.compile("0|[1-9][0-9]{0,17}")

# Each thread of a save that fails logs a traceback besides raising its error, which `_finish` reports.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in Path(record.pathname).parts))


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """The manifest.json of a saved step, written once."""

    step: int
    about: dict[str, Any]
    """What the run must have in common with the checkpoint: `start.identity`."""
    arrays: dict[str, str]
    """Path of each array to its dtype and shape."""
    files: dict[str, list[Any]]
    """Path of each file to its size in bytes and its SHA-256."""


class Checkpoints:
    """The checkpoints of one run, by step.

    Saving is asynchronous: an error surfaces at the next `settle` or `save`, or at the end of the `with` block. Earlier
    steps stand, and a later save may succeed. Of several processes all save, and process 0 hashes, renames and prunes.

    Args:
      keep: how many of the newest to keep; 0 only reads, so that a run can be inspected while it trains.
      keep_every: keep the multiples of this step too; 0 keeps no more.
      losses: validation loss by step, read at each pruning: the best step is kept too.
    """

    def __init__(self, directory: Path, keep: int = 0, keep_every: int = 0, losses: Mapping[int, float] = NO_LOSSES):
        self.directory, self._keep_every, self._losses = directory, keep_every, losses
        self._keep = keep if processes.is_primary() else 0
        self._pending: Future[int] | None = None
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._verified: dict[int, Manifest] = {}
        if self._keep:
            directory.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.settle(wait=True)
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what ended the block comes first
        finally:
            self._worker.shutdown()
            self._sweep()
            with suppress(OSError):
                self._prune()

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        paths = list(self.directory.iterdir()) if self.directory.is_dir() else []
        return sorted(int(path.name) for path in paths if STEP.fullmatch(path.name) and path.is_dir())

    @property
    def latest(self) -> int | None:
        """The newest saved step, None if there is none."""
        return max(self.steps, default=None)

    def save(
        self, state: TrainState, about: dict[str, Any] | None = None, then: Callable[[], None] = lambda: None
    ) -> None:
        """Start to save `state` under its step; `state` may be donated after.

        Args:
          then: called in a thread, once the step is saved.

        Raises:
          CheckpointError: the last save failed, this one cannot begin, or that step is saved already.
        """
        self.settle(wait=True)
        self._sweep()
        step = int(state.step)
        if processes.broadcast(step in self.steps):
            raise CheckpointError(f"step {step} was not saved in {self.directory}: it is there already")
        partial = self.directory / f".{step}.{processes.broadcast(secrets.randbits(31)):08x}.part"
        manifest = Manifest(step, about or {}, _arrays(state), {})
        try:
            response = ocp.save_async(partial.resolve(), state)
        except Exception as error:
            raise self._failed(step, partial, error) from error
        self._pending = self._worker.submit(self._finish, manifest, partial, response, then)

    def settle(self, wait: bool = False) -> int | None:
        """The step whose save has succeeded since the last call, None if none has.

        Args:
          wait: until the save under way has ended.

        Raises:
          CheckpointError: it failed.
        """
        if self._pending is None or not (wait or self._pending.done()):
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def manifest(self, step: int) -> Manifest:
        """The manifest of `step`, whose files may still be damaged.

        Raises:
          DamagedError: it is missing, damaged, or of another program.
        """
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
        """The manifest of `step`, after checking the size and SHA-256 of every file.

        Raises:
          DamagedError: one differs, and which.
        """
        if step in self._verified:
            return self._verified[step]
        manifest = self.manifest(step)
        for name, (size, sha256) in manifest.files.items():
            path = self._path(step) / name
            if not path.is_file():
                raise DamagedError(f"{path} is missing")
            if path.stat().st_size != size:
                raise DamagedError(f"{path} has {path.stat().st_size:,} bytes, expected {size:,}")
            if files.sha256(path) != sha256:
                raise DamagedError(f"{path} has another SHA-256 than when it was saved")
        self._verified[step] = manifest
        return manifest

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, in the shapes, dtypes and shardings of `like` (arrays or shape structs).

        Raises:
          CheckpointError: it is missing, damaged, or of another model.
        """
        return self._load(step, like)

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters of a saved step without its optimizer state; as `restore`."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._load(step, {"params": like})["params"]

    def set_aside(self, step: int) -> Path:
        """Rename a step that must not be resumed from, so that its number is free again; its new path."""
        path, n = self._path(step).with_suffix(".damaged"), 1
        while path.exists():
            path, n = path.with_suffix(f".damaged{n}"), n + 1
        self._path(step).rename(path)
        self._verified.pop(step, None)
        return path

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _load(self, step: int, like: Any) -> Any:
        if step not in self.steps:
            raise CheckpointError(f"step {step} is not in {self.directory}; {self.steps} are")
        arrays = (self.verify(step) if processes.is_primary() else self.manifest(step)).arrays
        # Runs were float64 once where JAX_ENABLE_X64 was set; Orbax rounds them to what `like` asks for.
        found = {name: array.replace("float64", "float32") for name, array in arrays.items()}
        wrong = [
            f"  {name}: {found.get(name, 'nothing')} in the checkpoint, {expected} expected"
            for name, expected in _arrays(like).items()
            if found.get(name) != expected
        ]
        if wrong:
            raise CheckpointError(f"{self._path(step)} is of another model:\n" + "\n".join(wrong[:5]))
        try:
            return ocp.load(self._path(step).resolve(), like, checkpointable_name="state")
        except Exception as error:
            raise CheckpointError(f"{self._path(step)} cannot be read: {error.__cause__ or error}") from error

    def _finish(self, manifest: Manifest, partial: Path, response: Any, then: Callable[[], None]) -> int:
        """Wait for Orbax, write the manifest, rename the directory to the step; runs beside the training."""
        step = manifest.step
        try:
            response.result()
            if not processes.is_primary():
                return step
            for path in sorted(partial.rglob("*")):
                files.sync(path)
                if path.is_file():
                    manifest.files[str(path.relative_to(partial))] = [path.stat().st_size, files.sha256(path)]
            sealed = files.seal({"program": PROGRAM, **asdict(manifest)})
            files.write_atomically(partial / "manifest.json", sealed.encode())
            partial.rename(self._path(step))
            files.sync(self.directory)
        except Exception as error:
            raise self._failed(step, partial, error) from error
        then()
        with suppress(OSError):  # the next save tries again
            self._prune()
        return step

    def _failed(self, step: int, partial: Path, error: Exception) -> CheckpointError:
        """Remove what a failed save left; its error, as in "No space left on device", without temporary paths."""
        _remove(partial)
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)
        return CheckpointError(f"step {step} was not saved in {self.directory}: {reason}")

    def _sweep(self) -> None:
        """Remove what is left of saves that were killed, or that failed while Orbax was still writing."""
        if self._keep and self.directory.is_dir():
            for left in self.directory.glob(".*.part*"):
                shutil.rmtree(left, ignore_errors=True)

    def _prune(self) -> None:
        """Remove the steps that need not be kept; a reader that loses one to it looks again. A step whose manifest is
        damaged stays, for a person to look at."""
        if not self._keep:
            return
        steps = list[int]()
        for step in self.steps:
            with suppress(DamagedError):
                steps.append(self.manifest(step).step)
        if not steps:
            return
        kept = {*steps[-self._keep :], best_step(steps, self._losses)}
        for step in steps:
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                doomed = self.directory / f".{step}.{secrets.token_hex(4)}.part"
                self._path(step).rename(doomed)  # first, so that a kill leaves no half of a step under its name
                _remove(doomed)


def best_step(steps: Sequence[int], losses: Mapping[int, float]) -> int:
    """The step of lowest validation loss among `steps`; the newest if none has a finite one."""
    scored = [(losses[step], step) for step in steps if math.isfinite(losses.get(step, math.nan))]
    return min(scored)[1] if scored else max(steps)


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of `tree` placed on the first device, for `restore`."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _arrays(tree: Any) -> dict[str, str]:
    """Path of each array in `tree` to its dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _remove(partial: Path) -> None:
    """Remove a directory, also under the name that Orbax writes to before it renames."""
    for path in partial.parent.glob(f"{partial.name}*"):
        shutil.rmtree(path, ignore_errors=True)
