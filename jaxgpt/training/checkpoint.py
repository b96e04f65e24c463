"""Training state to disk and back: the only module that knows Orbax."""

import math
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxgpt.training.step import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read."""


class Checkpoints:
    """The checkpoints of one run, by step.

    Args:
      keep: how many of the newest to keep, beside the one of lowest validation loss; 0 only reads, and leaves the
        folder as it is, so that a run may be looked at while it trains.

    Saving is asynchronous; an error in it surfaces at the next `save`, `wait` or end of the `with` block.
    """

    def __init__(self, directory: Path, keep: int = 0):
        policies = ocp.training.preservation_policies
        best = policies.BestN(n=1, reverse=True, get_metric_fn=_val_loss, keep_checkpoints_without_metrics=False)
        self.directory = directory
        self._checkpointer: Any = None
        if keep or directory.is_dir():
            self._checkpointer = ocp.training.Checkpointer(
                directory.resolve(),
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]) if keep else None,
                cleanup_tmp_directories=keep > 0,
            )
        self._pending: Any = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            if self._checkpointer:
                self._checkpointer.close()

    def save(self, state: TrainState, val_loss: float | None) -> None:
        """Start to save `state` under its step, unless that step is saved already."""
        self.wait()
        step = int(state.step)
        if step in self.steps:
            return
        scored = val_loss is not None and math.isfinite(val_loss)  # what is no number is never the best
        metrics = {"val_loss": val_loss} if scored else None
        try:
            self._pending = self._checkpointer.save_async(step, state, force=True, metrics=metrics)
        except Exception as error:
            raise CheckpointError(f"step {step} was not saved in {self.directory}: {error}") from error

    def wait(self) -> None:
        """Return once the last save is whole on disk.

        Raises:
          CheckpointError: it failed; the steps saved before it are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise CheckpointError(f"a save in {self.directory} failed: {error}") from error

    @property
    def _infos(self) -> Any:
        return self._checkpointer.checkpoints if self._checkpointer else []

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(info.step for info in self._infos)

    @property
    def latest(self) -> int | None:
        """The newest saved step, None if there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The saved step of lowest validation loss; the newest if none was evaluated."""
        scored = [(info.metrics["val_loss"], info.step) for info in self._infos if info.metrics]
        return min(scored)[1] if scored else self.latest

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, in the shapes, dtypes and shardings of `like` (arrays or shape structs).

        Raises:
          CheckpointError: it is missing, damaged, or of another model.
        """
        try:
            return self._checkpointer.load(step, like)
        except Exception as error:
            raise CheckpointError(
                f"step {step} in {self.directory} cannot be read: {error.__cause__ or error}"
            ) from error


def load_params(directory: Path, step: int, like: Any) -> Any:
    """The parameters alone of a saved step, without its optimizer state.

    Raises:
      CheckpointError: as `Checkpoints.restore`.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load(directory.resolve() / str(step), {"params": like}, checkpointable_name="state")["params"]
    except Exception as error:
        raise CheckpointError(f"step {step} in {directory} cannot be read: {error.__cause__ or error}") from error


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of `tree` placed on the first device, for `restore`."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _val_loss(metrics: Any) -> float:
    return metrics["val_loss"]
