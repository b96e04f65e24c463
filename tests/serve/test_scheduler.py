"""Which models the JAX thread loads and keeps, with stand-ins for them."""

import contextlib
import queue
import threading
import time
from pathlib import Path

import pytest
from starlette.exceptions import HTTPException

from jaxgpt.run import Run
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.scheduler import MODELS, Scheduler
from jaxgpt.serve.writer import End, Job

RUN, OTHER = Run(Path("one")), Run(Path("other"))


class Model:
    """Ends looks at once and texts never."""

    def turn(self, jobs):
        time.sleep(0.001)
        return [job for job in jobs if not job.tokens]


@contextlib.contextmanager
def scheduling(load):
    scheduler = Scheduler(load, Limits())
    try:
        yield scheduler
    finally:
        scheduler.stop()
        scheduler.join()


def test_cancelled_jobs_load_no_model():
    loads, ended, finish_loading = [], queue.Queue(), threading.Event()

    def load(run):
        loads.append(run)
        finish_loading.wait(10)
        return Model()

    with scheduling(load) as scheduler:
        jobs = [Job(RUN, [0], put=ended.put), Job(OTHER, [0], 9), Job(OTHER, [1])]
        for job in jobs:
            scheduler.submit(job)
        for job in jobs[1:]:
            scheduler.cancel(job)
        assert scheduler.state["requests"] == 1
        finish_loading.set()
        assert ended.get(timeout=10) == End()
        assert scheduler.state["requests"] == 0
    assert loads == [RUN]


def test_each_run_is_loaded_once_and_models_are_limited():
    loads, ended = [], queue.Queue()

    def load(run):
        loads.append(run)
        return Model()

    def look(scheduler, run):
        scheduler.submit(Job(run, [1], put=ended.put))
        return ended.get(timeout=10)

    with scheduling(load) as scheduler:
        *runs, last = [Run(Path(f"{i}")) for i in range(MODELS + 1)]
        jobs = [Job(run, [0], 9) for run in runs]
        for job in jobs:
            scheduler.submit(job)
        for i in range(MODELS):
            assert look(scheduler, Run(Path(f"{i}"))) == End()
        assert loads == runs, "each is loaded once"
        assert look(scheduler, last) == End(f"{MODELS} other models are in use, which is the limit: try again soon")
        scheduler.cancel(jobs[1])
        assert look(scheduler, last) == End()
        assert (loads[-1], scheduler.state["models"]) == (last, MODELS)


def test_the_least_recently_used_model_makes_room():
    loads, ended = [], queue.Queue()

    def load(run):
        loads.append(run)
        return Model()

    with scheduling(load) as scheduler:
        first, second, *others, last = [Run(Path(f"{i}")) for i in range(MODELS + 1)]
        for run in (first, second, *others, first, last, first, second):
            scheduler.submit(Job(run, [1], put=ended.put))
            assert ended.get(timeout=10) == End()
    assert loads == [first, second, *others, last, second]


def test_a_scheduler_that_stops_refuses_jobs_and_ends_those_it_has():
    ended, loading, finish_loading = queue.Queue(), threading.Event(), threading.Event()

    def load(run):
        loading.set()
        finish_loading.wait(10)
        return Model()

    with scheduling(load) as scheduler:
        scheduler.submit(Job(RUN, [0], 9, put=ended.put))
        assert loading.wait(10)
        scheduler.stop()  # the JAX thread still loads
        assert scheduler.state["status"] == "stopping"
        with pytest.raises(HTTPException, match="the server is stopping") as refused:
            scheduler.submit(Job(OTHER, [0]))
        assert refused.value.status_code == 503
        finish_loading.set()
        assert ended.get(timeout=10) == End("the server is stopping")
        assert scheduler.state["requests"] == 0
