"""Training state to disk and back, every byte accounted for: the only module that knows Orbax.

checkpoints/250/                 the state after 250 steps, as Orbax writes it
checkpoints/250/manifest.json    the size and SHA-256 of each of its files, sealed
checkpoints/250.damaged/         one that was found damaged, set aside

A step is written under a temporary name, hashed, and renamed last: what has a step's name is whole.
"""

import logging
import math
import os
import re
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxgpt import files as disk
from jaxgpt import processes
from jaxgpt.step import TrainState

PROGRAM = "jaxgpt checkpoint 1"
STEP = re.compile("0|[1-9][0-9]{0,17}")

# Each thread of a save that fails logs a traceback, and raises; `_finish` reports it, once.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in Path(record.pathname).parts))


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """What a saved step consists of."""

    step: int
    val_loss: float | None
    """Nats per token; None where it was not evaluated, or is no number."""
    about: dict[str, Any]
    """What the run said of itself when it saved."""
    arrays: dict[str, str]
    """Path of each array to its dtype and shape."""
    files: dict[str, list[Any]]
    """Path of each file to its size in bytes and its SHA-256."""
    program: str = PROGRAM


class Checkpoints:
    """The checkpoints of one run, by step.

    Saving is asynchronous. An error in it surfaces at the next `settle`, `save` or end of the `with` block; the steps
    saved before stand, and a later save may succeed. Of several processes, which all save, the first hashes, names and
    makes room.

    Args:
      keep: how many of the newest to keep, beside the one of lowest validation loss; 0 only reads, and leaves the
        folder as it is, so that a run may be looked at while it trains.
      keep_every: keep the multiples of this step too; 0 keeps no more.
    """

    def __init__(self, directory: Path, keep: int = 0, keep_every: int = 0):
        self.directory, self._keep, self._keep_every = directory, keep, keep_every
        self._pending: Future[int] | None = None
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._verified: dict[int, Manifest] = {}
        self._spare: set[int] = set()
        self.not_pruned: OSError | None = None
        """Why the last save, itself whole, did not make room."""
        if not processes.first():
            self._keep = 0
        if self._keep:
            directory.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.settle(wait=True)
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what ended the block comes first
        finally:
            self._worker.shutdown()
            self._sweep()
            if self._keep:
                with suppress(OSError):
                    self._prune(last=True)

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        paths = list(self.directory.iterdir()) if self.directory.is_dir() else []
        return sorted(int(path.name) for path in paths if STEP.fullmatch(path.name) and path.is_dir())

    @property
    def latest(self) -> int | None:
        """The newest saved step, None if there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The saved step of lowest validation loss; the newest if none was evaluated.

        Raises:
          DamagedError: what a step says of its loss cannot be read.
        """
        losses = {}
        for step in self.steps:
            try:
                losses[step] = self.manifest(step).val_loss
            except DamagedError:
                if step in self.steps:  # else it has just made room
                    raise
        scored = [(loss, step) for step, loss in losses.items() if loss is not None]
        return min(scored)[1] if scored else self.latest

    def save(self, state: TrainState, val_loss: float | None = None, about: dict[str, Any] | None = None) -> None:
        """Start to save `state` under its step; `state` may be donated after.

        Raises:
          CheckpointError: the last save failed, this one cannot begin, or that step is saved already.
        """
        self.settle(wait=True)
        self._sweep()
        step = int(state.step)
        if processes.told(step in self.steps):
            raise CheckpointError(f"step {step} was not saved in {self.directory}: there is one already")
        partial = self.directory / f".{step}.{processes.told(secrets.randbits(31)):08x}.part"
        known = Manifest(step, _finite(val_loss), about or {}, _arrays(state), {})
        try:
            response = ocp.save_async(partial.resolve(), state)
        except Exception as error:
            _remove(partial)
            raise CheckpointError(f"step {step} was not saved in {self.directory}: {_reason(error)}") from error
        self._pending = self._worker.submit(self._finish, known, partial, response)

    def score(self, step: int, val_loss: float, about: dict[str, Any]) -> None:
        """Let the manifest of a saved step say its validation loss, and `about` in place of what it said.

        Raises:
          DamagedError: the manifest is missing, damaged, or of another program.
          OSError: it cannot be written.
        """
        scored = replace(self.manifest(step), val_loss=_finite(val_loss), about=about)
        disk.write_atomically(self._path(step) / "manifest.json", disk.seal(asdict(scored)).encode())
        self._verified.pop(step, None)

    def settle(self, wait: bool = False) -> int | None:
        """The step whose save has ended well since the last call, None if none has.

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
        """What `step` says it consists of.

        Raises:
          DamagedError: its manifest is missing, damaged, or of another program.
        """
        path = self._path(step) / "manifest.json"
        try:
            tree = disk.unseal(path.read_bytes())
        except OSError as error:
            raise DamagedError(f"{path}: {error.strerror}") from error
        except disk.SealError as error:
            raise DamagedError(f"{path}: {error}") from error
        if tree.get("program") != PROGRAM or tree.get("step") != step:
            found = f"{tree.get('program')!r}, step {tree.get('step')}"
            raise DamagedError(f"{path}: expected {PROGRAM!r}, step {step}, found {found}")
        return Manifest(**tree)

    def verify(self, step: int) -> Manifest:
        """Its manifest, once every file of `step` was found to be what was written.

        Raises:
          DamagedError: one is not, and which.
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
            if disk.sha256(path) != sha256:
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
        """The parameters alone of a saved step, without its optimizer state.

        Raises:
          CheckpointError: as `restore`.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._load(step, {"params": like})["params"]

    def set_aside(self, step: int) -> Path:
        """Rename a step that is not to be gone on from, so that it stands in nobody's way; its new path."""
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
        found = (self.verify(step) if processes.first() else self.manifest(step)).arrays
        wanted = _arrays(like)
        wrong = [
            f"  {name}: {found.get(name, 'nothing')} in the checkpoint, {wanted[name]} expected"
            for name in wanted
            if found.get(name) != wanted[name]
        ]
        if wrong:
            raise CheckpointError(f"{self._path(step)} is of another model:\n" + "\n".join(wrong[:5]))
        try:
            return ocp.load(self._path(step).resolve(), like, checkpointable_name="state")
        except Exception as error:
            raise CheckpointError(f"{self._path(step)} cannot be read: {error.__cause__ or error}") from error

    def _finish(self, known: Manifest, partial: Path, response: Any) -> int:
        """Wait for Orbax, write the manifest, give the step its name; runs beside the training."""
        try:
            response.result()
            if not processes.first():
                return known.step
            for path in sorted(partial.rglob("*")):
                disk.sync(path)
                if path.is_file():
                    known.files[str(path.relative_to(partial))] = [path.stat().st_size, disk.sha256(path)]
            disk.write_atomically(partial / "manifest.json", disk.seal(asdict(known)).encode())
            partial.rename(self._path(known.step))
            disk.sync(self.directory)
        except Exception as error:
            _remove(partial)
            raise CheckpointError(f"step {known.step} was not saved in {self.directory}: {_reason(error)}") from error
        try:
            self._prune()
            self.not_pruned = None
        except OSError as error:
            self.not_pruned = error
        return known.step

    def _sweep(self) -> None:
        """Remove what saves have left that were killed, or that failed while Orbax was still writing."""
        if self._keep and self.directory.is_dir():
            for left in self.directory.glob(".*.part*"):
                shutil.rmtree(left, ignore_errors=True)

    def _prune(self, last: bool = False) -> None:
        """Remove what need not be kept; a step whose manifest cannot be read is left for a person to look at.

        Until the `last` time, what can be spared stays for one save longer: somebody may be reading it.
        """
        losses = {}
        for step in self.steps:
            try:
                losses[step] = self.manifest(step).val_loss
            except DamagedError:
                continue
        newest = sorted(losses)[-self._keep :]
        best = min(((loss, step) for step, loss in losses.items() if loss is not None), default=(0.0, -1))[1]
        every = self._keep_every
        spare = {step for step in losses if step not in newest and step != best and not (every and step % every == 0)}
        for step in spare if last else spare & self._spare:
            doomed = self.directory / f".{step}.{secrets.token_hex(4)}.part"
            self._path(step).rename(doomed)  # first, so that a kill leaves no half of a step under its name
            _remove(doomed)
        self._spare = spare


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of `tree` placed on the first device, for `restore`."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _arrays(tree: Any) -> dict[str, str]:
    """Path of each array in `tree` to its dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _remove(partial: Path) -> None:
    """Remove what a save left, also under the name that Orbax writes to before it renames."""
    for path in partial.parent.glob(f"{partial.name}*"):
        shutil.rmtree(path, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Why a save failed, as in "No space left on device", without the temporary file that TensorStore names."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)


def _finite(val_loss: float | None) -> float | None:
    """What is no number is never the best."""
    return val_loss if val_loss is not None and math.isfinite(val_loss) else None
