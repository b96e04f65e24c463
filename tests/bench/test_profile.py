import gzip
import json

import jax
import pytest

from jaxgpt.bench import profile
from jaxgpt.bench.profile import Operation


def event(name, ts, dur, tid=1, **args):
    return {"ph": "X", "pid": 7, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": args}


def op(name, ts, dur, tid=1):
    return event(name, ts, dur, tid, hlo_op=name, hlo_module="jit_f")


TRACE = [
    event("PjitFunction(f)", 0, 50, 9),
    event("PjRtCpuLoadedExecutable::Execute", 10, 30, 9),
    event("CommonPjRtLoadedExecutable::ExecuteHelperOnSingleDevice", 12, 20, 9),
    event("CommonPjRtLoadedExecutable::ExecutePrepare", 13, 5, 9),
    event("CommonPjRtLoadedExecutable::ExecuteHelperOnSingleDevice", 60, 20, 9),
    op("while.1", 100, 100),
    op("dot.1", 110, 30),
    op("add.2", 150, 10),
    op("dot.1", 160, 40),
    op("dot.1", 120, 70, tid=2),
    event("end: dot.1", 190, 1, 2),
]


def test_time_is_an_operations_own():
    """A loop is without what it runs, and another thread's work is its own."""
    found = profile.operations(TRACE)
    assert found == [
        Operation("jit_f", "dot.1", 3, pytest.approx(140e-6)),
        Operation("jit_f", "while.1", 1, pytest.approx(20e-6)),
        Operation("jit_f", "add.2", 1, pytest.approx(10e-6)),
    ]


def test_a_call_inside_a_runtimes_call_is_no_dispatch_of_its_own():
    assert profile.dispatches(TRACE) == 2
    assert profile.dispatches([]) == 0


def test_nothing_but_what_lasts_is_read(tmp_path):
    path = tmp_path / "vm.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"ph": "M", "name": "thread_name"}, *TRACE]}).encode()))
    assert profile.read(path) == TRACE


def test_a_real_trace(tmp_path):
    """Three calls of a program are three dispatches, and three runs of what it consists of."""
    double = jax.jit(lambda x: (x @ x).sum())
    x = jax.numpy.ones((64, 64))
    jax.block_until_ready(double(x))
    events = profile.capture(tmp_path, lambda: [jax.block_until_ready(double(x)) for _ in range(3)])
    assert profile.dispatches(events) == 3
    found = profile.operations(events)
    assert found
    assert {operation.runs for operation in found} == {3}
    assert all(operation.seconds > 0 for operation in found)
    again = profile.capture(tmp_path, lambda: jax.block_until_ready(double(x)))
    assert profile.dispatches(again) == 1, "a folder may hold traces already"
