"""What `jit` costs and what it saves: one training step run every way that JAX offers.

Each variant differs from "jit" in one thing, and starts with JAX's caches cleared, so that none finds what another
compiled; then all take turns (`timing`).
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt.cli import memory
from jaxgpt.config import Config, UsageError, differences
from jaxgpt.data import chunk_starts, take
from jaxgpt.profile import trace
from jaxgpt.profile.report import Report, Rows, facts
from jaxgpt.profile.timing import Rates, disturbance, machine_seconds, others, ratio, repeat, series
from jaxgpt.sharding import one_device, replicated
from jaxgpt.step import Metrics, TrainState, sharded_init, train_step, train_steps

JIT = "jit"
"""The variant that the others are compared with."""
EAGER = "eager"
"""The variant against which compiling pays off."""
STAGES = ("trace", "lower", "compile", "first call")
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's monitoring event when a program has been compiled, or found in the compile cache."""
VARIED = {"precision": "bfloat16", "remat": "remat matmuls, remat blocks", "scan_steps": "scan of 10, scan of 50"}
"""Settings that the variants set -> the variants that do."""


@dataclass(frozen=True)
class Variant:
    """One way to run a step, and how it differs from `jit`."""

    about: str
    compiled: bool = True
    """As one program."""
    primitives: bool = False
    """Each primitive is its own program, even inside functions of jax.numpy (`jax.disable_jit`)."""
    donated: bool = False
    """The state may be overwritten."""
    steps: int = 1
    """Steps per program: a scan, of more than one."""
    cache: bool = False
    """With a persistent compile cache."""
    model: tuple[tuple[str, Any], ...] = ()
    """Settings of the model."""


VARIANTS = {
    "op by op": Variant("every primitive is its own program (jax.disable_jit)", compiled=False, primitives=True),
    EAGER: Variant("the step called without jit; functions of jax.numpy are programs", compiled=False),
    JIT: Variant("the step as one program"),
    "jit, donated": Variant("it may overwrite the state", donated=True),
    "scan of 10": Variant("10 steps in one program, donated", donated=True, steps=10),
    "scan of 50": Variant("50 steps in one program, donated", donated=True, steps=50),
    "cache, empty": Variant("compiled programs are saved on disk", cache=True),
    "cache, full": Variant("programs that the variant before saved are loaded", cache=True),
    "remat matmuls": Variant("all but matmul results recomputed", model=(("remat", "matmuls"),)),
    "remat blocks": Variant("blocks recomputed", model=(("remat", "blocks"),)),
    "bfloat16": Variant("bf16 matmuls", model=(("precision", "bfloat16"),)),
}
NOTES = (
    "all but the variants named after them compute in float32, without remat.",
    "trace, lower, compile: Python to jaxpr, jaxpr to HLO, HLO to machine code. first call: the rest of the time until "
    "the first step, or the first scan, is done. programs: compiled by then; the eager variants compile in their first "
    "call, each operation once for each shape.",
    "steady: steps of all variants in turn (A B C A B C), median with minimum and maximum of the rounds; a step's loss "
    "is read while the next step runs. speed: taken round by round, above 1 is faster. dispatches: programs dispatched "
    "per step, counted by JAX's profiler. step, MB: arguments, results and temporaries of the program by XLA's "
    "analysis, donated memory counted once.",
    "pays after: steps until the time spent before the first step is won back, against eager; 0 if the first step came "
    "sooner too.",
)


def measure(
    config: Config, name: str, variants: Sequence[str] = tuple(VARIANTS), rounds: int = 5, seconds: float = 0.5
) -> Report:
    """A report on the step of `config`, its vocab_size known, called `name`, on the first device.

    Args:
      seconds: how long each variant works in a round, at least.

    Raises:
      UsageError: no such variant, or a step does not fit into memory.
    """
    chosen = choose(variants)
    memory.require(config)
    ways: dict[str, Way] = {}
    with tempfile.TemporaryDirectory(prefix="jaxgpt-ledger-") as folder:
        for each, variant in sorted(chosen.items(), key=lambda item: not item[1].compiled):
            jax.clear_caches()
            with compile_cache(folder if variant.cache else None):
                ways[each] = Way(varied(config, variant), variant)
    before, own = machine_seconds(), time.process_time()
    steps: Rates = {each: [] for each in chosen}
    for way in ways.values():
        way.run()  # what is not one program may compile again
    for _ in range(rounds):
        for each in chosen:
            n, took = repeat(ways[each].run, seconds, ways[each].wait)
            steps[each].append(n / took)
    shares = [others(before, machine_seconds(), time.process_time() - own)] if before else []
    figures, device = {each: ways[each].figures for each in chosen}, jax.local_devices()[0]
    title = f"A training step of {name}, {config.train.batch_size * config.model.block_size:,} tokens"
    first, steady = rows(figures, steps)
    return {
        "mode": f"the ledger of {name}",
        "facts": facts(f"{device.platform}, {device.device_kind}"),
        "failed": {},
        "tables": [
            {"title": f"{title}: until the first is done", "rows": first},
            {"title": f"{title}: each one after it", "rows": steady},
        ],
        "notes": [
            "; ".join(f"{each}: {variant.about}" for each, variant in chosen.items()),
            *NOTES,
            "loss of the first step: " + ", ".join(f"{each} {found['loss']:.6f}" for each, found in figures.items()),
            disturbance(shares),
        ],
        "figures": figures,
        "steps_per_second": steps,
    }


def varied(config: Config, variant: Variant) -> Config:
    """The config of a variant: float32 without remat, except for what it sets."""
    model = replace(config.model, **({"precision": "float32", "remat": "none"} | dict(variant.model)))
    return replace(config, model=model, train=replace(config.train, scan_steps=variant.steps))


def require_not_varied(config: Config, recipe: Config) -> None:
    """Check that `config` does not set, beyond `recipe`, what the variants set.

    Raises:
      UsageError: it does; names the variants that show it.
    """
    for name, value, _ in differences(config, recipe):
        if name in VARIED:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: the variants set {name}, so that each differs from {JIT} in one "
                f"thing; leave it out, and compare {JIT} with {VARIED[name]} (--variants)"
            )


def choose(names: Sequence[str]) -> dict[str, Variant]:
    """The variants of these names, in the ledger's order.

    Raises:
      UsageError: there is no such variant.
    """
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"no variant {name!r}, expected some of {', '.join(map(repr, VARIANTS))}")
    filled = ("cache, empty",) if "cache, full" in names else ()
    return {name: variant for name, variant in VARIANTS.items() if name in (*names, *filled)}


def rows(figures: dict[str, Any], steps: Rates) -> tuple[Rows, Rows]:
    """What each variant costs until its first step is done, and then."""
    first, steady = [], []
    for name, found in figures.items():
        seconds, pays = {key: sum(each["stages"].values()) for key, each in figures.items()}, None
        if EAGER in figures and name != EAGER:
            slow, fast = (1 / series(steps[each])["median"] for each in (EAGER, name))
            after = break_even(seconds[name] - seconds[EAGER], slow, fast)
            pays = "never" if after is None else round(after)
        stages = {f"{stage}, s": found["stages"].get(stage) for stage in STAGES}
        first.append({"variant": name, **stages, "in all, s": seconds[name], "programs": found["programs"]})
        steady.append(
            {
                "variant": name,
                "steady, ms": series([1e3 / rate for rate in steps[name]]),
                "speed, of jit's": ratio(steps[name], steps[JIT]) if JIT in steps and name != JIT else None,
                "dispatches": found["dispatches"],
                "step, MB": found["step_bytes"] / 1e6 if found["step_bytes"] else None,
                "pays after, steps": pays,
            }
        )
    return first, steady


def break_even(extra: float, slow: float, fast: float) -> float | None:
    """Steps after which `extra` seconds at the start are won back by steps of `fast` in place of `slow` seconds; 0 if
    nothing has to be won back, None if it never is.

    >>> break_even(3.0, 0.5, 0.2), break_even(-1.0, 0.5, 0.2), break_even(3.0, 0.2, 0.5), break_even(-1.0, 0.2, 0.5)
    (10.0, 0.0, None, None)
    """
    if extra <= 0:
        return 0.0 if fast <= slow else None
    return extra / (slow - fast) if slow > fast else None


class Way:
    """The step of `config`, run as a variant does; what it costs until the first call is done is in `figures`."""

    def __init__(self, config: Config, variant: Variant):
        self.config, self.K, self.step, self.unread = config, variant.steps, 0, None
        self.scope = jax.disable_jit if variant.primitives else nullcontext
        tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=1_000_000).astype(np.uint16)
        self.tokens = jax.device_put(tokens, replicated(one_device()))
        self.state = jax.block_until_ready(sharded_init(config, one_device()))
        self.call: Any = partial(one_step, config)
        times, programs, size = [time.perf_counter()], list[str](), None
        with listening(programs.append):
            if variant.compiled:
                function = partial(train_steps, config) if self.K > 1 else self.call
                stage = jax.jit(function, donate_argnums=0 if variant.donated else ())
                for step in ("trace", "lower", "compile"):
                    given = (self.state, self.tokens, self.starts()) if step == "trace" else ()
                    stage = getattr(stage, step)(*given)
                    times.append(time.perf_counter())
                self.call, size = stage, memory.compiled_bytes(stage)
            self.run()
            loss = float(np.asarray(self.unread).ravel()[0])
            self.wait()
        times.append(time.perf_counter())
        stages = [after - before for before, after in pairwise(times)]
        self.figures: dict[str, Any] = {
            "stages": dict(zip(STAGES[-len(stages) :], stages, strict=True)),
            "programs": programs.count(COMPILED),
            "loss": loss,
            "step_bytes": sum(size) if size else None,
            "dispatches": self.dispatches(),
        }

    def starts(self) -> Any:
        """Window starts of the next piece: (B,), or (K, B) for a scan."""
        train, end = self.config.train, self.step + self.K
        T = self.config.model.block_size
        found = chunk_starts(train.seed, self.step, end, len(self.tokens), T, train.batch_size, train.sampling)
        return found.astype(np.int32) if self.K > 1 else found.astype(np.int32)[0]

    def run(self) -> int:
        """Run one step, or one scan; the number of steps."""
        with self.scope():
            self.state, metrics = self.call(self.state, self.tokens, self.starts())
        if self.unread is not None:
            jax.block_until_ready(self.unread)  # at most one piece ahead of the device
        self.unread, self.step = metrics.loss, self.step + self.K
        return self.K

    def wait(self) -> None:
        jax.block_until_ready((self.state, self.unread))

    def dispatches(self) -> float | None:
        """Programs dispatched per step, counted by the profiler; None where it sees none."""
        self.run()
        self.wait()
        with tempfile.TemporaryDirectory(prefix="jaxgpt-ledger-") as folder:
            lines = trace.capture(Path(folder), lambda: repeat(self.run, 0.0, self.wait))
        return trace.dispatches(lines) / self.K or None


def one_step(config: Config, state: TrainState, tokens: jax.Array, starts: Any) -> tuple[TrainState, Metrics]:
    """`train_step` on the windows at `starts` (B,) of `tokens` (N,)."""
    return train_step(config, state, take(tokens, starts, config.model.block_size))


@contextmanager
def compile_cache(folder: str | None) -> Iterator[None]:
    """Keep compiled programs in `folder`, or keep none."""
    asked: dict[str, Any] = {"jax_enable_compilation_cache": folder is not None}
    asked |= {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in asked}
    try:
        for name, value in asked.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextmanager
def listening(heard: Callable[[str], Any]) -> Iterator[None]:
    """Call `heard` with the name of each event of JAX that has a duration."""

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        heard(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
