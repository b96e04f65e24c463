"""A training step in one of the ways that JAX can run it, and what each costs before it runs: see `ledger`."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxgpt.bench import profile, worker
from jaxgpt.bench.ours import OnJax, random_tokens
from jaxgpt.config import Config, from_tree
from jaxgpt.data import chunk_starts, take
from jaxgpt.memory import compiled_bytes
from jaxgpt.placement import ONE_DEVICE, fresh
from jaxgpt.step import Metrics, TrainState, train_step, train_steps

Way = Literal["op by op", "eager", "jit", "donated", "ahead of time", "scan"]

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
"""What JAX tells its listeners at the end of each stage of each program; a compile that the cache answers is one."""


def one_step(config: Config, state: TrainState, tokens: jax.Array, starts: Any) -> tuple[TrainState, Metrics]:
    """`train_step` on the windows at `starts` (B,) of `tokens` (N,): what every way but "scan" runs."""
    return train_step(config, state, take(tokens, starts, config.model.block_size))


class Stages(OnJax):
    """The step of `config`, `way`. Units are steps; `about` has the seconds of its stages, up to the end of its first
    call, and the figures of `ledger`.

    - "op by op": each primitive a program of its own (`jax.disable_jit`), also those inside the functions of jax.numpy
    - "eager": the step called as it stands, where functions of jax.numpy that are jitted are a program each
    - "jit", and "donated": its state may be overwritten
    - "ahead of time": the compiled program itself is called, in place of the function that looks it up
    - "scan": scan_steps of them in one program (`train_steps`), which donates too
    """

    def __init__(self, config: Any, way: Way):
        super().__init__()
        self.config = from_tree(config)
        self.K, self.step, self.unread = (self.config.train.scan_steps if way == "scan" else 1), 0, None
        self.scope = jax.disable_jit if way == "op by op" else nullcontext
        self.tokens = jax.device_put(random_tokens(self.config.model.vocab_size), ONE_DEVICE.everywhere)
        self.state = fresh(self.config, ONE_DEVICE)
        jax.block_until_ready(self.state)
        with stages() as spent:
            began = time.perf_counter()
            self.call, figures = self.prepared(way)
            self.run()
            loss = np.asarray(self.unread).ravel()[0]
            self.wait()
            seconds = time.perf_counter() - began
        self.about |= {"stages": seconds_of(spent), "programs": Counter(name for name, *_ in spent)["compile"]}
        self.about["stages"]["first call"] = max(0.0, seconds - sum(self.about["stages"].values()))
        self.about |= {"loss": float(loss), "compiled_bytes": sum(figures) if figures else None}
        self.run()
        self.wait()
        self.about |= {"dispatches": self.dispatches(), "faults": self.faults()}

    def prepared(self, way: Way) -> tuple[Callable[..., Any], tuple[int, int] | None]:
        """What a step calls, with (state, tokens, starts), compiled if it is; and the compiler's figures of memory."""
        if way in ("op by op", "eager"):
            return partial(one_step, self.config), None
        donated = 1 if way == "donated" else ()
        function: Any = train_steps if way == "scan" else jax.jit(one_step, static_argnums=0, donate_argnums=donated)
        compiled = function.lower(self.config, self.state, self.tokens, self.starts()).compile()
        # The call of the function finds the program that was compiled here.
        return compiled if way == "ahead of time" else partial(function, self.config), compiled_bytes(compiled)

    def starts(self) -> Any:
        """Window starts of the next piece: (B,), or (K, B) for a scan."""
        train, T = self.config.train, self.config.model.block_size
        found = chunk_starts(
            train.seed, self.step, self.step + self.K, len(self.tokens), T, train.batch_size, train.sampling
        ).astype(np.int32)
        return found if self.K > 1 else found[0]

    def run(self) -> int:
        with self.scope():
            self.state, metrics = self.call(self.state, self.tokens, self.starts())
        if self.unread is not None:
            jax.block_until_ready(self.unread)  # one piece ahead of the device, not more
        self.unread, self.step = metrics.loss, self.step + self.K
        return self.K

    def wait(self) -> None:
        jax.block_until_ready((self.state, self.unread))

    def faults(self, pieces: int = 4) -> float | None:
        """Pages of memory that the system hands to this process in a step: temporaries that a program asks for anew.
        None where nobody counts them, and on accelerators, whose memory has none."""
        before = worker.page_faults()
        for _ in range(pieces):
            self.run()
        self.wait()
        after = worker.page_faults()
        if before is None or after is None or jax.default_backend() != "cpu":
            return None
        return (after - before) / (pieces * self.K)

    def dispatches(self, pieces: int = 2) -> float | None:
        """Programs handed to the device in a step, as the profiler sees them; None where it sees none."""

        def run() -> None:
            for _ in range(pieces):
                self.run()
            self.wait()

        with tempfile.TemporaryDirectory(prefix="jaxgpt-ledger-") as folder:
            return profile.dispatches(profile.capture(Path(folder), run)) / (pieces * self.K) or None


@contextmanager
def stages() -> Iterator[list[tuple[str, float, float]]]:
    """(name, begin, end) of each stage of each program that is made in the block, in the order of their ends."""
    spans: list[tuple[str, float, float]] = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if event in EVENTS:
            end = time.perf_counter()
            spans.append((EVENTS[event], end - duration_secs, end))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def seconds_of(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds of each stage; where one goes on inside another, as functions are traced that a traced one calls, a
    moment counts for the innermost.

    >>> seconds_of([("trace", 1.0, 2.0), ("trace", 0.0, 4.0), ("compile", 4.0, 9.0)])
    {'trace': 4.0, 'lower': 0.0, 'compile': 5.0}
    """
    found = dict.fromkeys(EVENTS.values(), 0.0)
    events = [{"name": name, "tid": 0, "ts": begin, "dur": end - begin} for name, begin, end in spans]
    for event, inside in profile.nested(events):
        found[event["name"]] += event["dur"] - sum(each["dur"] for each in inside)
    return found
