"""The thread that runs JAX: it loads models and gives each a turn in a loop."""

import threading
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException

from jaxgpt.config import UsageError
from jaxgpt.serve.library import Served
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

    def __init__(self, load: Callable[[Served], Writer], limits: Limits):
        self.load, self.limits = load, limits
        self._changed = threading.Condition()
        self._jobs: dict[Job, None] = {}  # not ended: an ordered set
        self._new: list[Job] = []
        self._writers: dict[Served, Writer] = {}  # by last admission, the oldest first
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="jax", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue `job`.

        Raises:
          HTTPException: max_requests are open already (429), or the scheduler is stopping (503).
        """
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise HTTPException(503, STOPPING)
            if len(self._jobs) >= self.limits.max_requests:
                busy = f"{len(self._jobs)} requests are under way, which is the limit: try again soon"
                raise HTTPException(429, busy, {"Retry-After": "1"})
            self._jobs[job] = None
            self._new.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop `job`, unless it has ended; its row is free at the next turn."""
        with self._changed:
            job.cancelled = True
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
        status = "stopping" if self._stopping else "ok" if self._thread.is_alive() else "failed"
        return {"status": status, "requests": len(self._jobs), "models": len(self._writers)}

    def _work(self) -> None:
        def busy() -> list[tuple[Served, Writer]]:
            return [(run, writer) for run, writer in self._writers.items() if writer.jobs]

        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._new or busy())
                    if self._stopping:
                        return
                    new, self._new = self._new, []
                for job in new:
                    if not job.cancelled:
                        self._admit(job)
                for run, writer in busy():
                    self._turn(run, writer)
        finally:
            with self._changed:
                self._stopping = True
            for job in list(self._jobs):
                self._end(job, STOPPING)

    def _admit(self, job: Job) -> None:
        """Hand a job to its writer, which is loaded if necessary."""
        try:
            writer = self._writers.pop(job.run, None)
            if not writer:
                if len(self._writers) == MODELS:
                    idle = next((run for run, other in self._writers.items() if not other.jobs), None)
                    if not idle:
                        raise UsageError(f"{MODELS} other models are in use, which is the limit: try again soon")
                    del self._writers[idle]
                writer = self.load(job.run)
            self._writers[job.run] = writer
            writer.waiting.append(job)
        except Exception as error:  # whatever it is, other jobs continue
            self._end(job, str(error) if isinstance(error, UsageError) else f"{job.run.path.name}: {error}")

    def _turn(self, run: Served, writer: Writer) -> None:
        jobs, error = writer.jobs, ""
        try:
            jobs = writer.turn()
        except Exception as raised:  # whatever it is, the rows were donated and are lost
            del self._writers[run]
            error = f"{run.path.name} failed: {raised}"
        for job in jobs:
            self._end(job, error)

    def _end(self, job: Job, error: str) -> None:
        with self._changed:
            self._jobs.pop(job, None)
        job.put(End(error))
