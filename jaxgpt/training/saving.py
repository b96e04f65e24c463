"""Saves that are told of: in the diary when they are whole, loudly when they failed."""

from types import TracebackType

from jaxgpt.config import Config
from jaxgpt.text.corpus import Corpus
from jaxgpt.training import processes
from jaxgpt.training.checkpoint import CheckpointError, Checkpoints
from jaxgpt.training.journal import Journal
from jaxgpt.training.recovery import about
from jaxgpt.training.run import Run
from jaxgpt.training.step import TrainState


class Saving:
    """The saves of a run in training: first the lines of metrics.jsonl, then the state."""

    def __init__(self, run: Run, config: Config, corpus: Corpus, checkpoints: Checkpoints, journal: Journal):
        self._run, self._config, self._corpus = run, config, corpus
        self._checkpoints, self._journal = checkpoints, journal
        self._step: int = 0
        self._val_loss: float | None = None
        self._failure: CheckpointError | None = None

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put what ends the run early into the diary, behind how the last save ended."""
        if error is None:
            return
        try:
            self.look(wait=True)
        except CheckpointError as failed:
            error.add_note(str(failed))
        self._run.event("broken-off", text=f"{type(error).__name__}: {error}")

    def save(self, state: TrainState, val_loss: float | None) -> None:
        """Start to save `state`, the last save having ended.

        Raises:
          CheckpointError: that one or this one failed, and the config says to stop.
        """
        self.look(wait=True)
        self._step, self._val_loss = int(state.step), val_loss
        try:
            self._sync()
            said = about(self._config, self._corpus.meta, self._journal.position)
            self._checkpoints.save(state, val_loss, said)
        except CheckpointError as error:
            self._failed(error)

    def _sync(self) -> None:
        """Put the lines of metrics.jsonl on disk.

        Raises:
          CheckpointError: it takes no more, in this process or another: all raise, or none.
        """
        failure = None
        try:
            self._journal.sync()
        except OSError as error:
            failure = CheckpointError(f"{self._run.metrics_file} takes no more lines: {error.strerror}")
        if processes.most(failure is not None):
            raise failure or CheckpointError("another process cannot write its lines, and says why")

    def look(self, wait: bool = False) -> None:
        """Tell how the last save ended, if it has (or `wait` until then).

        Raises:
          CheckpointError: as `save`.
        """
        several = not processes.alone()
        if several and not wait:  # all processes look together, or none
            return
        step, failure = None, None
        try:
            step = self._checkpoints.settle(wait)
        except CheckpointError as error:
            failure = error
        if several and processes.most(failure is not None):
            failure = failure or CheckpointError(f"step {self._step} was not saved by another process, which says why")
        if failure:
            self._failed(failure)
            return
        if step is not None:
            self._failure = None
            self._run.event("save", step=step, tokens_per_second=self._journal.tokens_per_second)
            if why := self._checkpoints.not_pruned:
                self._journal.notice("not-pruned", step, f"step {step} is saved, but older ones could not go: {why}")

    def end(self, state: TrainState) -> None:
        """Wait for the last save, that of `state`, and try once more if it failed.

        Raises:
          CheckpointError: it failed again: what was learnt since the one before is not on disk.
        """
        self.look(wait=True)
        if self._failure:
            self.save(state, self._val_loss)
            self.look(wait=True)
        if self._failure:
            raise CheckpointError(f"{self._failure}; {self._stands()}: make room, then resume the run")

    def _failed(self, error: CheckpointError) -> None:
        self._failure = error
        stop = self._config.train.on_save_error == "stop"
        then = "and the run ends, as --on-save-error says" if stop else "and is tried again at the next save"
        self._journal.notice("save-failed", self._step, f"{error}; {self._stands()}, {then}")
        if stop:
            raise CheckpointError(f"{error}; {self._stands()}, {then}") from error

    def _stands(self) -> str:
        latest = self._checkpoints.latest
        return "no step is saved yet" if latest is None else f"step {latest} is saved"
