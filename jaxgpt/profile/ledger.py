"""The costs and savings of `jit`: one training step run every way that JAX offers.

Each variant differs from "jit" in one thing. It starts with JAX's caches cleared, so that it finds nothing that another
has compiled; then all take turns (`timing`).
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt.cli import memory
from jaxgpt.config import Config, UsageError, replaced
from jaxgpt.data import config_starts, take
from jaxgpt.matmul import Precision
from jaxgpt.profile import trace
from jaxgpt.profile.report import Report, Rows, facts
from jaxgpt.profile.timing import ratio, repeat, series
from jaxgpt.sharding import one_device, replicated
from jaxgpt.step import Metrics, TrainState, jax_settings, sharded_init, train_step, train_steps

STAGES = ("trace", "lower", "compile", "first call")
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's monitoring event for a program that was compiled, or found in the compile cache."""


class Variant(NamedTuple):
    """One way to run a step, and how it differs from "jit"."""

    about: str
    compiled: bool = True  # as one program
    primitives: bool = False  # each is its own program, even inside functions of jax.numpy (`jax.disable_jit`)
    donated: bool = False  # the state may be overwritten
    steps: int = 1  # per program; a scan if more than one
    cache: bool = False  # with a persistent compile cache
    precision: Precision = "float32"
    remat: Literal["none", "matmuls", "blocks"] = "none"


VARIANTS = {
    "op by op": Variant("every primitive is its own program (jax.disable_jit)", compiled=False, primitives=True),
    "eager": Variant("the step called without jit; functions of jax.numpy are programs", compiled=False),
    "jit": Variant("the step as one program"),
    "jit, donated": Variant("it may overwrite the state", donated=True),
    "scan of 10": Variant("10 steps in one program, donated", donated=True, steps=10),
    "scan of 50": Variant("50 steps in one program, donated", donated=True, steps=50),
    "cache, empty": Variant("compiled programs are saved on disk", cache=True),
    "cache, full": Variant("programs that the variant before saved are loaded", cache=True),
    "remat matmuls": Variant("all but matmul results recomputed", remat="matmuls"),
    "remat blocks": Variant("blocks recomputed", remat="blocks"),
    "bfloat16": Variant("bf16 matmuls", precision="bfloat16"),
}
NOTES = (
    "all variants compute in float32 without remat, except those named after bfloat16 or remat.",
    "trace, lower, compile: Python to jaxpr, jaxpr to HLO, HLO to machine code. first call: the rest of the time until "
    "the first step, or scan, is done. programs: compiled by then.",
    "steady: all variants in turn, median (minimum to maximum) of the rounds; a step's loss is read while the next "
    "one runs. speed: round by round, above 1 is faster. dispatches: programs per step, by JAX's profiler. step, MB: "
    "arguments, results and temporaries by XLA's analysis, donated memory once.",
    "pays off after: steps until the total time is below eager's; 0 if the first step is done earlier, too.",
)


def measure(config: Config, name: str, variants: dict[str, Variant], rounds: int, seconds: float = 0.5) -> Report:
    """A report on the step of `config`, its vocab_size known, called `name`, on the first device; each variant works at
    least `seconds` in each round. Raises OutOfMemoryError if a step does not fit into memory."""
    machine = facts()
    memory.require(config)
    runners, state = dict[str, Runner](), list[TrainState]()
    with tempfile.TemporaryDirectory(prefix="jaxgpt-ledger-") as folder:
        for each, variant in sorted(variants.items(), key=lambda item: not item[1].compiled):
            jax.clear_caches()
            with jax_settings(
                jax_enable_compilation_cache=variant.cache,
                jax_compilation_cache_dir=folder if variant.cache else None,
                jax_persistent_cache_min_compile_time_secs=0.0,
            ):
                compilation_cache.reset_cache()
                runners[each] = Runner(config, variant, state)
    compilation_cache.reset_cache()
    for runner in runners.values():
        runner.run()  # the variants without jit may compile again
    for _ in range(rounds):
        for each in variants:
            n, took = repeat(runners[each].run, seconds, runners[each].wait)
            runners[each].figures["steps_per_second"].append(n / took)
    figures = {each: runners[each].figures for each in variants}
    title = f"A training step of {name}, {config.train.batch_size * config.model.block_size:,} tokens"
    first, later = rows(figures)
    return {
        "mode": f"the ledger of {name}",
        "facts": machine,
        "tables": [
            {"title": f"{title}: until the first is done", "rows": first},
            {"title": f"{title}: each one after it", "rows": later},
        ],
        "notes": [
            "; ".join(f"{each}: {variant.about}" for each, variant in variants.items()),
            *NOTES,
            "loss of the first step: " + ", ".join(f"{each} {found['loss']:.6f}" for each, found in figures.items()),
        ],
        "figures": figures,
    }


def varied(config: Config, variant: Variant) -> Config:
    """The config of a variant: float32 without remat, except for what it sets."""
    return replaced(config, precision=variant.precision, remat=variant.remat, scan_steps=variant.steps)


def choose(names: Sequence[str]) -> dict[str, Variant]:
    """The variants of these names, or all, in the ledger's order. Raises a UsageError if there is no such variant."""
    names = names or tuple(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"no variant {name!r}, expected some of {', '.join(map(repr, VARIANTS))}")
    filled = ("cache, empty",) if "cache, full" in names else ()
    return {name: variant for name, variant in VARIANTS.items() if name in (*names, *filled)}


def rows(figures: dict[str, Any]) -> tuple[Rows, Rows]:
    """Two tables of a row for each variant: its cost until the first step is done, and that of later steps."""
    first, later = [], []
    total = {name: sum(found["stages"].values()) for name, found in figures.items()}
    rates = {name: found["steps_per_second"] for name, found in figures.items()}
    medians = {name: 1 / series(each)["median"] for name, each in rates.items()}
    for name, found in figures.items():
        pays: int | str | None = None
        if "eager" in figures and name != "eager":
            lost = total[name] - total["eager"] - (VARIANTS[name].steps - 1) * medians[name]  # by its first step
            won = medians["eager"] - medians[name]  # by each later step
            pays = round(max(0.0, lost) / won) if won > 0 else "never"
        stages = {f"{stage}, s": found["stages"].get(stage) for stage in STAGES}
        first.append({"variant": name, **stages, "total, s": total[name], "programs": found["programs"]})
        later.append(
            {
                "variant": name,
                "steady, ms": series([1e3 / rate for rate in rates[name]]),
                "speed relative to jit": ratio(rates[name], rates["jit"]) if "jit" in rates and name != "jit" else None,
                "dispatches": found["dispatches"],
                "step, MB": found["step_bytes"] / 1e6 if found["step_bytes"] else None,
                "pays off after, steps": pays,
            }
        )
    return first, later


class Runner:
    """Runs the step of a config as a variant does; `figures` are its costs until the first call is done.

    Runners that take turns share a `state`, a list of one train state, which each new runner initializes again: one for
    each would take much memory.
    """

    def __init__(self, config: Config, variant: Variant, state: list[TrainState]):
        self.config, self.K, self.step, self.loss = varied(config, variant), variant.steps, 0, None
        self.scope = jax.disable_jit if variant.primitives else nullcontext
        tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=1_000_000).astype(np.uint16)
        self.tokens = jax.device_put(tokens, replicated(one_device()))
        self.state = state
        state.clear()
        state.append(jax.block_until_ready(sharded_init(self.config, one_device())))

        def one_step(state: TrainState, tokens: jax.Array, starts: Any) -> tuple[TrainState, Metrics]:
            return train_step(self.config, state, take(tokens, starts, config.model.block_size))

        self.call: Any = partial(train_steps, self.config) if self.K > 1 else one_step
        times, size, timed = [time.perf_counter()], None, list[str]()

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            timed.append(event)

        with ExitStack() as stack:
            jax.monitoring.register_event_duration_secs_listener(listen)
            stack.callback(jax.monitoring.unregister_event_duration_listener, listen)
            if variant.compiled:
                jitted = jax.jit(self.call, donate_argnums=0 if variant.donated else ())
                traced = jitted.trace(state[0], self.tokens, self.starts())
                times.append(time.perf_counter())
                lowered = traced.lower()
                times.append(time.perf_counter())
                self.call = lowered.compile()
                times.append(time.perf_counter())
                size = memory.compiled_bytes(self.call)
            self.run()
            loss = float(np.asarray(self.loss).ravel()[0])
            self.wait()
        times.append(time.perf_counter())
        stages = [after - before for before, after in pairwise(times)]
        self.figures: dict[str, Any] = {
            "stages": dict(zip(STAGES[-len(stages) :], stages, strict=True)),
            "programs": timed.count(COMPILED),
            "loss": loss,
            "step_bytes": sum(size) if size else None,
            "dispatches": self.dispatches(),
            "steps_per_second": [],  # in each round
        }

    def starts(self) -> Any:
        """Window starts of the next call: (B,), or (K, B) for a scan."""
        starts = config_starts(self.config, len(self.tokens), self.step, self.step + self.K).astype(np.int32)
        return starts if self.K > 1 else starts[0]

    def run(self) -> int:
        """Run one step, or one scan; return the number of steps."""
        with self.scope():
            self.state[0], metrics = self.call(self.state[0], self.tokens, self.starts())
        if self.loss is not None:
            jax.block_until_ready(self.loss)  # at most one call ahead of the device
        self.loss, self.step = metrics.loss, self.step + self.K
        return self.K

    def wait(self) -> None:
        jax.block_until_ready((self.state, self.loss))

    def dispatches(self) -> float | None:
        """Programs dispatched per step, counted by the profiler; None where it sees none."""
        self.run()
        self.wait()
        lines = trace.capture(None, lambda: repeat(self.run, 0.0, self.wait))
        return trace.dispatches(lines) / self.K or None
