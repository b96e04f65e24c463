"""One variant of the ledger in its own process: a training step run one way, and what that costs before it runs."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxgpt.config import Config, from_tree
from jaxgpt.data import chunk_starts, take
from jaxgpt.memory import compiled_bytes
from jaxgpt.mesh import one_device, replicated
from jaxgpt.profile import rounds, trace
from jaxgpt.profile.trace import Span
from jaxgpt.step import Metrics, TrainState, sharded_init, train_step, train_steps

Way = Literal["op by op", "eager", "jit", "donated", "ahead of time", "scan"]

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
"""JAX's monitoring events at the end of each stage of each program; a hit in the compile cache is a compile too."""


def random_tokens(vocab_size: int, n: int = 1_000_000) -> Any:
    """(n,) ids: the speed of a step does not depend on the text."""
    return np.random.default_rng(0).integers(vocab_size, size=n).astype(np.uint16)


class JaxContestant:
    """A contestant (`rounds.Contestant`) on JAX's first device."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {"device": jax.local_devices()[0].device_kind}

    def wait(self) -> None: ...

    def peak_bytes(self) -> int:
        stats = jax.local_devices()[0].memory_stats() or {}
        return int(stats.get("peak_bytes_in_use", 0)) or rounds.peak_resident_bytes()


def one_step(config: Config, state: TrainState, tokens: jax.Array, starts: Any) -> tuple[TrainState, Metrics]:
    """`train_step` on the windows at `starts` (B,) of `tokens` (N,)."""
    return train_step(config, state, take(tokens, starts, config.model.block_size))


class Stages(JaxContestant):
    """The step of `config`, run one `way`. Units are steps; `about` has the seconds of each stage up to the end of the
    first call, and the ledger's other figures.

    - "op by op": each primitive is its own program (`jax.disable_jit`), even inside functions of jax.numpy
    - "eager": the step is called without `jit`; jitted functions of jax.numpy are a program each
    - "jit"; "donated": the state may be overwritten
    - "ahead of time": the compiled program is called, not the jitted function that looks it up
    - "scan": scan_steps steps in one program (`train_steps`), with the state donated
    """

    def __init__(self, config: Any, way: Way):
        super().__init__()
        self.config = from_tree(config)
        self.K, self.step, self.unread = (self.config.train.scan_steps if way == "scan" else 1), 0, None
        self.scope = jax.disable_jit if way == "op by op" else nullcontext
        self.tokens = jax.device_put(random_tokens(self.config.model.vocab_size), replicated(one_device()))
        self.state = jax.block_until_ready(sharded_init(self.config, one_device()))
        with compile_spans() as spans:
            began = time.perf_counter()
            self.call, figures = self.prepare(way)
            self.run()
            loss = np.asarray(self.unread).ravel()[0]
            self.wait()
            seconds = time.perf_counter() - began
        stages = stage_seconds(spans)
        stages["first call"] = max(0.0, seconds - sum(stages.values()))
        self.about |= {"stages": stages, "programs": sum(span.name == "compile" for span in spans)}
        self.about |= {"loss": float(loss), "compiled_bytes": sum(figures) if figures else None}
        self.pieces(1)
        self.about |= {"dispatches": self.dispatches(), "faults": self.faults()}

    def prepare(self, way: Way) -> tuple[Callable[..., Any], tuple[int, int] | None]:
        """The function of (state, tokens, starts) that a step calls, and the compiler's memory figures."""
        if way in ("op by op", "eager"):
            return partial(one_step, self.config), None
        donated = 1 if way in ("donated", "scan") else ()
        function: Any = jax.jit(train_steps if way == "scan" else one_step, static_argnums=0, donate_argnums=donated)
        compiled = function.lower(self.config, self.state, self.tokens, self.starts()).compile()
        # A call of the function finds the program that was compiled here.
        return compiled if way == "ahead of time" else partial(function, self.config), compiled_bytes(compiled)

    def starts(self) -> Any:
        """Window starts of the next piece: (B,), or (K, B) for a scan."""
        train, end = self.config.train, self.step + self.K
        T = self.config.model.block_size
        found = chunk_starts(train.seed, self.step, end, len(self.tokens), T, train.batch_size, train.sampling)
        return found.astype(np.int32) if self.K > 1 else found.astype(np.int32)[0]

    def run(self) -> int:
        with self.scope():
            self.state, metrics = self.call(self.state, self.tokens, self.starts())
        if self.unread is not None:
            jax.block_until_ready(self.unread)  # at most one piece ahead of the device
        self.unread, self.step = metrics.loss, self.step + self.K
        return self.K

    def wait(self) -> None:
        jax.block_until_ready((self.state, self.unread))

    def pieces(self, n: int) -> None:
        for _ in range(n):
            self.run()
        self.wait()

    def faults(self, n: int = 4) -> float | None:
        """Page faults per step: memory pages that the system gives to this process, for temporaries that each run
        allocates anew. None on Windows, which does not count them, and on accelerators."""
        if sys.platform == "win32" or jax.default_backend() != "cpu":
            return None
        before = page_faults()
        self.pieces(n)
        return (page_faults() - before) / (n * self.K)

    def dispatches(self, n: int = 2) -> float | None:
        """Programs dispatched per step, counted by the profiler; None where it sees none."""
        with tempfile.TemporaryDirectory(prefix="jaxgpt-ledger-") as folder:
            return trace.dispatches(trace.capture(Path(folder), lambda: self.pieces(n))) / (n * self.K) or None


def page_faults() -> int:
    """Memory pages that this process has been given so far without reading a disk."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def compile_spans() -> Iterator[list[Span]]:
    """A span for each stage of each program that is compiled in the block, in seconds."""
    spans: list[Span] = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if event in EVENTS:
            spans.append(Span(EVENTS[event], time.perf_counter() - duration_secs, duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def stage_seconds(spans: list[Span]) -> dict[str, float]:
    """Seconds of each stage. Where stages nest, as tracing does, a moment counts for the innermost.

    >>> stage_seconds([Span("trace", 1.0, 1.0), Span("trace", 0.0, 4.0), Span("compile", 4.0, 5.0)])
    {'trace': 4.0, 'lower': 0.0, 'compile': 5.0}
    """
    seconds = dict.fromkeys(EVENTS.values(), 0.0)
    for span, own, _ in trace.nested(spans):
        seconds[span.name] += own
    return seconds


if __name__ == "__main__":
    rounds.answer_rounds(lambda: Stages(**json.loads(sys.argv[1])))
