"""The one thread that owns JAX: it loads models, and lets each write for all who ask, turn by turn."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.config import UsageError
from jaxgpt.serve.library import Served
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.writer import End, Job, Request, Writer

MODELS = 4
"""How many models are held at once; one that nobody uses makes room for another."""


class BusyError(Exception):
    """There is no place for one more request: come back later."""


class StoppedError(Exception):
    """The server is on its way out."""


@dataclass(eq=False)
class Look:
    """A question about what comes after `ids`, and the `put` that is told `Looked`, or an `End` that says why not."""

    run: Served
    ids: list[int]
    put: Callable[[Any], None]
    cancelled: bool = False
    """As of a `Job`: it is not answered."""


@dataclass(frozen=True)
class Looked:
    weights: Any  # (L, H, T)
    likely: Any  # (K,)
    chances: Any  # (K,)


@dataclass
class Scheduler:
    """Takes requests from any thread; answers come through their `put`, from its own.

    Args:
      load: the writer of a run; slow, and may raise.
    """

    load: Callable[[Served], Writer]
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._inbox: list[Job | Look] = []
        self._writers: dict[Served, Writer] = {}  # the one used last comes last
        self._requests, self._stopping = 0, False
        self._thread = threading.Thread(target=self._work, name="jax", daemon=True)
        self._thread.start()

    def write(self, request: Request, put: Callable[[Any], None]) -> Job:
        """Have `request` written; `put` is told each `Piece`, then one `End`.

        Raises:
          BusyError: there are as many requests as there may be.
          StoppedError: nothing more is written.
        """
        job = Job(request, put)
        self._submit(job)
        return job

    def look(self, run: Served, ids: list[int], put: Callable[[Any], None]) -> Look:
        """Have the next token of `ids` looked into; `put` is told `Looked`, or an `End`. Raises as `write`."""
        look = Look(run, ids, put)
        self._submit(look)
        return look

    def cancel(self, each: Job | Look) -> None:
        """Nobody waits for it any more: its place is free at the next turn, and `put` is told nothing more."""
        with self._news:
            each.cancelled = True
            self._news.notify()

    def stop(self) -> None:
        """End every text where it is. Returns at once, and may be called again."""
        with self._news:
            self._stopping = True
            self._news.notify()

    def join(self) -> None:
        """Wait until the thread has ended, after `stop`."""
        self._thread.join()

    @property
    def state(self) -> dict[str, Any]:
        """What a health check wants to know."""
        with self._news:
            status = "stopping" if self._stopping else "ok" if self._thread.is_alive() else "failed"
            return {"status": status, "requests": self._requests, "models": len(self._writers)}

    def _submit(self, each: Job | Look) -> None:
        with self._news:
            if self._stopping or not self._thread.is_alive():
                raise StoppedError("the server is stopping")
            if self._requests >= self.limits.max_requests:
                raise BusyError(f"{self._requests} requests are under way, as many as there may be: try again soon")
            self._requests += 1
            self._inbox.append(each)
            self._news.notify()

    def _work(self) -> None:
        try:
            while not self._stopping:
                with self._news:
                    while not (self._stopping or self._inbox or any(not each.idle for each in self._writers.values())):
                        self._news.wait()
                    new = self._share()
                for each in new:
                    self._take(each)
                for run, writer in list(self._writers.items()):
                    if not writer.idle:
                        self._turn(run, writer)
        finally:
            with self._news:
                self._stopping, rest = True, self._inbox
            rest += [job for writer in self._writers.values() for job in writer.jobs]
            for each in rest:
                each.put(End("the server is stopping"))

    def _share(self) -> list[Job | Look]:
        """What one turn takes in: all that is to be written, and one look, so that nobody's text waits for many."""
        here = [each for each in self._inbox if not each.cancelled]
        self._requests -= len(self._inbox) - len(here)
        first = next((each for each in here if isinstance(each, Look)), None)
        self._inbox = [each for each in here if isinstance(each, Look) and each is not first]
        return [each for each in here if isinstance(each, Job) or each is first]

    def _take(self, each: Job | Look) -> None:
        """Hand what is new to its writer, which is loaded if it must be; a look is answered."""
        run = each.request.run if isinstance(each, Job) else each.run
        answer: Looked | End
        try:
            writer = self._writer(run)
            if isinstance(each, Job):
                writer.waiting.append(each)
                return
            answer = Looked(*writer.look(each.ids))
        except Exception as error:  # whatever it is, it is no reason to stop writing for the others
            answer = End(str(error) if isinstance(error, UsageError) else f"{run.path.name}: {error}")
        self._done(1)
        each.put(answer)

    def _writer(self, run: Served) -> Writer:
        writer = self._writers.pop(run, None)
        if writer is None:
            idle = [each for each, other in self._writers.items() if other.idle]
            for each in idle[: max(0, len(self._writers) - MODELS + 1)]:
                del self._writers[each]
            if len(self._writers) >= MODELS:
                raise RuntimeError(f"{MODELS} other models are writing, as many as are held at once: try again soon")
            writer = self.load(run)
        self._writers[run] = writer
        return writer

    def _turn(self, run: Served, writer: Writer) -> None:
        before = len(writer.jobs)
        try:
            ended, end = writer.turn(), End("")
            left = before - len(writer.jobs)
        except Exception as error:  # as above; what was in its rows is lost
            del self._writers[run]
            ended, end, left = writer.jobs, End(f"{run.path.name} could not write on: {error}"), before
        self._done(left)
        for job in ended:
            job.put(end)

    def _done(self, n: int) -> None:
        with self._news:
            self._requests -= n


def warm(scheduler: Scheduler, run: Served) -> None:
    """Load `run` and compile what its first texts need, before anyone asks."""
    scheduler.write(Request(run, (0,), 2), lambda told: None)
