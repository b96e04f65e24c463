import jax
import pytest

from jaxgpt.profile import trace
from jaxgpt.profile.trace import Operation, Span


def op(name, start, duration):
    return Span(name, start, duration, op=name)


TRACE = [
    [
        Span("PjitFunction(f)", 0, 50),
        Span("PjRtCpuLoadedExecutable::Execute", 10, 30),
        Span("CommonPjRtLoadedExecutable::ExecuteHelperOnSingleDevice", 12, 20),
        Span("CommonPjRtLoadedExecutable::ExecutePrepare", 13, 5),
        Span("CommonPjRtLoadedExecutable::ExecuteHelperOnSingleDevice", 60, 20),
    ],
    [op("while.1", 100, 100), op("dot.1", 110, 30), op("add.2", 150, 10), op("dot.1", 160, 40)],
    [op("dot.1", 120, 70), Span("end: dot.1", 190, 1)],
]


def test_the_time_of_an_operation_excludes_those_inside_it():
    """A loop counts without the instructions that it runs; each thread counts for itself."""
    assert trace.operations(TRACE) == [
        Operation("dot.1", 3, pytest.approx(140e-9)),
        Operation("while.1", 1, pytest.approx(20e-9)),
        Operation("add.2", 1, pytest.approx(10e-9)),
    ]


def test_a_dispatch_inside_another_is_not_counted():
    assert trace.dispatches(TRACE) == 2
    assert trace.dispatches([]) == 0


def test_trace_of_real_calls(tmp_path):
    """Three calls of a program are three dispatches, and three runs of each of its instructions."""
    double = jax.jit(lambda x: (x @ x).sum())
    x = jax.numpy.ones((64, 64))
    jax.block_until_ready(double(x))
    lines = trace.capture(tmp_path, lambda: [jax.block_until_ready(double(x)) for _ in range(3)])
    assert trace.dispatches(lines) == 3
    found = trace.operations(lines)
    assert found
    assert {operation.runs for operation in found} == {3}
    assert all(operation.seconds > 0 for operation in found)
    assert list(tmp_path.rglob("*.trace.json.gz")), "for Perfetto"
    again = trace.capture(tmp_path, lambda: jax.block_until_ready(double(x)))
    assert trace.dispatches(again) == 1, "the folder may hold older traces"
