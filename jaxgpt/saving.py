"""Saves that are told of: in the diary when they are whole, loudly when they failed."""

from contextlib import suppress
from types import TracebackType

from jaxgpt import processes
from jaxgpt.checkpoint import CheckpointError, Checkpoints, DamagedError
from jaxgpt.config import Config
from jaxgpt.corpus import Corpus
from jaxgpt.journal import Evaluated, Journal
from jaxgpt.recovery import about
from jaxgpt.run import Run
from jaxgpt.step import TrainState


class Saving:
    """The saves of a run in training: first the lines of metrics.jsonl, then the state, then how it scores."""

    def __init__(self, run: Run, config: Config, corpus: Corpus, checkpoints: Checkpoints, journal: Journal):
        self._run, self._config, self._corpus = run, config, corpus
        self._checkpoints, self._journal = checkpoints, journal
        self._step: int = 0
        self._spent = journal.spent
        self._score: tuple[Evaluated, tuple[int, str]] | None = None
        self._failure: CheckpointError | None = None

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put what ends the run early into the diary, behind how the last save ended: as this process alone knows it,
        for the others may go on, and would take a question for one of their own."""
        if error is None:
            return
        try:
            self._tell(*self._settled(wait=True))
        except CheckpointError as failed:
            error.add_note(str(failed))
        self._run.event("broken-off", step=self._journal.step, text=f"{type(error).__name__}: {error}")

    def save(self, state: TrainState) -> None:
        """Start to save `state`, the last save having ended.

        Raises:
          CheckpointError: that one or this one failed, and the config says to stop.
        """
        self.look(wait=True)
        self._step = int(state.step)
        try:
            self._sync()
            self._spent = self._journal.spent
            said = about(self._config, self._corpus.meta, self._journal.position)
            self._checkpoints.save(state, about=said)
        except CheckpointError as error:
            self._failed(error)
        self._journal.rested()

    def scored(self) -> None:
        """Put the last score of the journal on disk: its line, and now or with the next save its loss, beside its step.

        A run that ends before goes on from that step, and scores it again.

        Raises:
          CheckpointError: the disk does not take them, and the config says to stop.
        """
        last = self._journal.scores[-1]
        self._step, self._score = last.step, (last, self._journal.position)
        self.look()
        try:
            self._sync()
        except CheckpointError as error:
            self._complain(error)

    def _sync(self) -> None:
        """Put the lines of metrics.jsonl on disk, then the last score beside its step.

        Raises:
          CheckpointError: it takes no more, in this process or another: all raise, or none.
        """
        failure = None
        try:
            self._journal.sync()
            with suppress(DamagedError):  # whoever goes on from that step is told
                self._put_score()
        except OSError as error:
            failure = CheckpointError(f"{self._run.metrics_file} takes no more lines: {error.strerror}")
        if processes.most(failure is not None):
            raise failure or CheckpointError("another process cannot write its lines, and says why")

    def _put_score(self) -> None:
        """Write the last score, and that its line counts, into the manifest of its step once that is whole."""
        if self._score and not processes.first():
            self._score = None
        if not self._score or self._score[0].step not in self._checkpoints.steps:
            return
        scored, position = self._score
        said = about(self._config, self._corpus.meta, position)
        self._checkpoints.score(scored.step, scored.evaluation.loss, said)
        self._score = None

    def look(self, wait: bool = False) -> None:
        """Tell how the last save ended, if it has (or `wait` until then).

        Raises:
          CheckpointError: as `save`.
        """
        several = not processes.alone()
        if several and not wait:  # all processes look together, or none
            return
        step, failure = self._settled(wait)
        if several and processes.most(failure is not None):
            failure = failure or CheckpointError(f"step {self._step} was not saved by another process, which says why")
        self._tell(step, failure)

    def _settled(self, wait: bool) -> tuple[int | None, CheckpointError | None]:
        """The step that this process has saved since the last call, if it has, and what kept it from that."""
        try:
            return self._checkpoints.settle(wait), None
        except CheckpointError as error:
            return None, error

    def _tell(self, step: int | None, failure: CheckpointError | None) -> None:
        if failure:
            self._failed(failure)
            return
        if step is not None:
            self._failure = None
            tokens, seconds = self._spent  # up to that step: by now there is more
            speed = tokens / seconds if seconds else None
            said = {"tokens_per_second": speed, "trained_tokens": tokens, "trained_seconds": seconds}
            self._run.event("save", step=step, **said)
            if why := self._checkpoints.not_pruned:
                self._journal.notice("not-pruned", step, f"step {step} is saved, but older ones could not go: {why}")

    def end(self, state: TrainState) -> None:
        """Wait for the last save, that of `state`, and try once more if it failed.

        Raises:
          CheckpointError: it failed again: what was learnt since the one before is not on disk.
        """
        self.look(wait=True)
        if self._failure:
            self.save(state)
            self.look(wait=True)
        if not self._failure:
            try:
                self._sync()
            except CheckpointError as error:
                self._failure = error
        if self._failure:
            raise CheckpointError(f"{self._failure}; {self._stands()}: make room, then {self._run.resume_command}")

    def _failed(self, error: CheckpointError) -> None:
        self._failure = error
        self._complain(error)

    def _complain(self, error: CheckpointError) -> None:
        stop = self._config.train.on_save_error == "stop"
        then = "and the next save tries again: make room"
        if stop:
            then = f"and the run ends, as --on-save-error says: make room, then {self._run.resume_command}"
        self._journal.notice("save-failed", self._step, f"{error}; {self._stands()}, {then}")
        if stop:
            raise CheckpointError(f"{error}; {self._stands()}, {then}") from error

    def _stands(self) -> str:
        latest = self._checkpoints.latest
        return "no step is saved yet" if latest is None else f"step {latest} is saved"
