"""The thread that runs JAX: it loads models and gives each a turn in a loop."""

import threading
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException

from jaxgpt.config import UsageError
from jaxgpt.run import Run
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.writer import End, Job, Writer

MODELS = 4
"""Most models in memory at once; an idle one makes room for another."""
STOPPING = "the server is stopping"


class Scheduler:
    """Takes jobs from any thread, and calls their `put` with results from its own.

    Args:
      load: makes the writer of a run; slow, and may raise.
    """

    def __init__(self, load: Callable[[Run], Writer], limits: Limits):
        self.load, self.limits = load, limits
        self._changed = threading.Condition()
        self._jobs: dict[Job, None] = {}  # not ended: an ordered set
        self._writers: dict[Run, Writer] = {}  # the last used comes last
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="jax", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue `job`.

        Raises:
          HTTPException: max_requests are open already (429), or the scheduler is stopping (503).
        """
        with self._changed:
            if self._stopping:
                raise HTTPException(503, STOPPING)
            if len(self._jobs) >= self.limits.max_requests:
                busy = f"{len(self._jobs)} requests are open, which is the limit: try again soon"
                raise HTTPException(429, busy, {"Retry-After": "1"})
            self._jobs[job] = None
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop `job`, unless it has ended; its row is free at the next turn."""
        with self._changed:
            self._jobs.pop(job, None)

    def stop(self) -> None:
        """End every job, complete or not. Returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self) -> None:
        """Wait for the thread to end, after `stop`."""
        self._thread.join()

    @property
    def state(self) -> dict[str, Any]:
        """The answer to a health check."""
        status = "stopping" if self._stopping else "ok"
        return {"status": status, "requests": len(self._jobs), "models": len(self._writers)}

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._jobs)
                    if self._stopping:
                        return
                for run in dict.fromkeys(job.run for job in self._open()):
                    if jobs := [job for job in self._open() if job.run == run]:
                        self._turn(run, jobs)
        finally:
            with self._changed:
                self._stopping = True
            for job in self._open():
                self._end(job, STOPPING)

    def _open(self) -> list[Job]:
        """The jobs that have not ended, in the order of submission."""
        with self._changed:
            return list(self._jobs)

    def _turn(self, run: Run, jobs: list[Job]) -> None:
        error = ""
        try:
            writer = self._writers.pop(run, None) or self._load_writer(run)
            self._writers[run] = writer
            jobs = writer.turn(jobs)
        except Exception as raised:  # whatever it is, the jobs of other runs continue
            self._writers.pop(run, None)  # its rows were donated and are lost
            error = str(raised) if isinstance(raised, UsageError) else f"{run.path.name} failed: {raised}"
        for job in jobs:
            self._end(job, error)

    def _load_writer(self, run: Run) -> Writer:
        """A new writer, in place of an idle one if there are too many."""
        if len(self._writers) == MODELS:
            in_use = {job.run for job in self._open()}
            idle = next((other for other in self._writers if other not in in_use), None)
            if not idle:
                raise UsageError(f"{MODELS} other models are in use, which is the limit: try again soon")
            del self._writers[idle]
        return self.load(run)

    def _end(self, job: Job, error: str) -> None:
        with self._changed:
            self._jobs.pop(job, None)
        job.put(End(error))
