"""The one thread: whose turn it is, and which models it holds. The models are stand-ins."""

import contextlib
import itertools
import queue
import threading
import time
from pathlib import Path

from jaxgpt.serve.library import Served
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.scheduler import MODELS, Looked, Scheduler
from jaxgpt.serve.writer import End, Request

RUN = Served(Path("one"), 1)


class Model:
    """Writes for ever, and says what it does."""

    def __init__(self, said):
        self.said, self.waiting = said, []

    @property
    def jobs(self):
        return list(self.waiting)

    @property
    def idle(self):
        return not self.waiting

    def turn(self):
        self.said.put("turn")
        self.waiting = [job for job in self.waiting if not job.cancelled]
        time.sleep(0.001)
        return []

    def look(self, ids):
        self.said.put(ids)
        return ids, ids, ids


@contextlib.contextmanager
def scheduling(load):
    scheduler = Scheduler(load, Limits())
    try:
        yield scheduler
    finally:
        scheduler.stop()
        scheduler.join()


def test_a_turn_has_one_look_and_none_of_those_that_nobody_waits_for():
    said, told, loaded = queue.Queue(), queue.Queue(), threading.Event()

    def load(run):
        loaded.wait(10)
        return Model(said)

    with scheduling(load) as scheduler:
        scheduler.write(Request(RUN, (0,), 9), told.put)
        looks = [scheduler.look(RUN, [i], told.put) for i in range(6)]
        for i in (2, 3, 4):
            scheduler.cancel(looks[i])
        loaded.set()
        assert [told.get(timeout=10).weights for _ in range(3)] == [[0], [1], [5]]
        assert scheduler.state["requests"] == 1, "of looks that are over, nothing is left"
    heard = [said.get() for _ in range(said.qsize())]
    assert [each for each in heard if each != "turn"] == [[0], [1], [5]]
    assert all("turn" in pair for pair in itertools.pairwise(heard)), "a text waits for one look at most"


def test_what_nobody_waits_for_loads_nothing():
    loads, told, loaded = [], queue.Queue(), threading.Event()

    def load(run):
        loads.append(run)
        loaded.wait(10)
        return Model(queue.Queue())

    with scheduling(load) as scheduler:
        scheduler.look(RUN, [0], told.put)
        other = Served(Path("other"), 1)
        scheduler.cancel(scheduler.write(Request(other, (0,), 9), told.put))
        scheduler.cancel(scheduler.look(other, [1], told.put))
        loaded.set()
        while scheduler.state["requests"]:
            time.sleep(0.001)
    assert loads == [RUN]


def test_a_run_made_anew_is_another_and_few_are_held():
    loads, told = [], queue.Queue()

    def load(run):
        loads.append(run)
        return Model(queue.Queue())

    with scheduling(load) as scheduler:
        *runs, last = [Served(Path("one"), made) for made in range(MODELS + 1)]
        jobs = [scheduler.write(Request(run, (0,), 9), told.put) for run in runs]
        scheduler.look(Served(Path("one"), 0), [1], told.put)
        assert isinstance(told.get(timeout=10), Looked)
        assert loads == runs, "each once"
        scheduler.look(last, [2], told.put)
        assert told.get(timeout=10) == End(
            f"one: {MODELS} other models are writing, as many as are held at once: try again soon"
        )
        scheduler.cancel(jobs[1])
        while scheduler.state["requests"] == MODELS:
            time.sleep(0.001)
        scheduler.look(last, [3], told.put)
        assert isinstance(told.get(timeout=10), Looked)
        assert (loads[-1], scheduler.state["models"]) == (last, MODELS)
