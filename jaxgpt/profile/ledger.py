"""What `jit` costs and what it saves: one training step run every way that JAX offers.

Each variant differs from "jit" in one thing and runs in its own process, so that none finds what another compiled; all
take turns (`rounds`).
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxgpt.config import Config, UsageError, differences, to_tree
from jaxgpt.profile.report import Report, facts
from jaxgpt.profile.rounds import Contest, Rates, disturbance, ratio, series

JIT = "jit"
"""The variant that the others are compared with."""
EAGER = "eager"
"""The variant against which compiling pays off."""
STAGES = ("trace", "lower", "compile", "first call")
PROCESS_BYTES = 600_000_000
"""What a process with JAX and its compiler takes beside the memory of a step, about."""


@dataclass(frozen=True)
class Variant:
    """One way to run a step, and how it differs from `jit`."""

    about: str
    way: str = "jit"
    """As in `stages.Stages`."""
    cache: bool = False
    """With a persistent compile cache."""
    model: tuple[tuple[str, Any], ...] = ()
    """Settings of the model."""
    steps: int = 1
    """Steps per program."""


VARIANTS = {
    "op by op": Variant("every primitive is its own program (jax.disable_jit)", "op by op"),
    EAGER: Variant("the step called without jit; functions of jax.numpy are programs", "eager"),
    JIT: Variant("the step as one program"),
    "jit, donated": Variant("it may overwrite the state", "donated"),
    "scan of 10": Variant("10 steps in one program, donated", "scan", steps=10),
    "scan of 50": Variant("50 steps in one program, donated", "scan", steps=50),
    "ahead of time": Variant("the compiled program is called directly", "ahead of time"),
    "cache, empty": Variant("compiled programs are saved on disk", cache=True),
    "cache, full": Variant("programs that the variant before saved are loaded", cache=True),
    "remat matmuls": Variant("all but matmul results recomputed", model=(("remat", "matmuls"),)),
    "remat blocks": Variant("blocks recomputed", model=(("remat", "blocks"),)),
    "bfloat16": Variant("bf16 matmuls", model=(("precision", "bfloat16"),)),
}
NOTES = (
    "trace, lower, compile: Python to jaxpr, jaxpr to HLO, HLO to machine code, as timed by JAX. first call: the rest "
    "of the time until the first step, or the first scan, is done. programs: compiled by then; the eager variants also "
    "compile, each operation once for each shape.",
    "steady: steps of all variants in turn (A B C A B C), median with minimum and maximum of the rounds; a step's loss "
    "is read while the next step runs. speed: taken round by round, above 1 is faster. dispatches: programs dispatched "
    "per step, counted by JAX's profiler. page faults: memory pages that the system gives to the process per step, on "
    "a CPU, for temporaries that each run of a program allocates anew.",
    "step, MB: arguments, results and temporaries of the program by XLA's analysis, donated memory counted once. "
    "process, MB: peak memory of the whole process, with libraries and the compiler.",
    "pays after: steps until the time spent before the first step is won back, against eager; 0 if the first step came "
    "sooner too.",
)


def measure(
    config: Config,
    name: str,
    variants: Sequence[str] = tuple(VARIANTS),
    device: str = "cpu",
    rounds: int = 5,
    seconds: float = 0.5,
    starts: int = 1,
    free: int | None = None,
) -> Report:
    """A report on the step of `config`, its vocab_size known, called `name`.

    Args:
      seconds: how long each variant works in a round, at least.
      starts: how often each variant is started; stages are those of every start, rounds follow the last.
      free: bytes of memory for all processes together; None skips the check.

    Raises:
      UsageError: no such variant, or the processes do not fit into memory together.
    """
    own_settings, config, chosen = _own_settings(config), baseline(config), choose(variants)
    require_room(config, chosen, free)
    about: dict[str, list[dict[str, Any]]] = {each: [] for each in chosen}
    for start in range(starts):
        with tempfile.TemporaryDirectory(prefix="jaxgpt-ledger-") as cache, Contest(device) as contest:
            for each, variant in chosen.items():
                words = ["-m", "jaxgpt.profile.stages", json.dumps(spec(config, variant))]
                contest.enter(each, words, environment(variant, cache))
                about[each] += [contest.about[each]] if each in contest.about else []
            steps = contest.measure(rounds, seconds) if start == starts - 1 else {}
    figures = {each: _figures(about[each], contest.peak_bytes[each]) for each in steps}
    tokens = config.train.batch_size * config.model.block_size
    title = f"A training step of {name}, {tokens:,} tokens"
    return {
        "mode": f"the ledger of {name}",
        "facts": facts(device) | contest.facts(),
        "failed": contest.failed,
        "tables": [
            {"title": f"{title}: until the first is done", "rows": first_step_rows(figures)},
            {"title": f"{title}: each one after it", "rows": steady_rows(figures, steps)},
        ],
        "story": summary(name, tokens, figures, steps),
        "notes": [
            "; ".join(f"{each}: {variant.about}" for each, variant in chosen.items()),
            *own_settings,
            *NOTES,
            same_losses(figures),
            disturbance(contest.others),
        ],
        "about": about,
        "figures": figures,
        "steps_per_second": steps,
    }


def baseline(config: Config) -> Config:
    """The config of "jit", from which each other variant differs in one thing: float32, without remat."""
    return replace(config, model=replace(config.model, precision="float32", remat="none"))


def _own_settings(config: Config) -> list[str]:
    """A note on what `baseline` changes of `config`, if it does."""
    changed = [f"{name} {ours}" for name, ours, _ in differences(config, baseline(config))]
    return [f"the config's own {' and '.join(changed)} apply only to the variants named after them"] * bool(changed)


def require_not_varied(config: Config, recipe: Config) -> None:
    """Check that `config` does not set, beyond `recipe`, what the variants set.

    Raises:
      UsageError: it does; names the variants that show it.
    """
    measured_by = {
        "precision": "bfloat16",
        "remat": "remat matmuls, remat blocks",
        "scan_steps": "scan of 10, scan of 50",
    }
    varied = {name for name, *_ in differences(config, baseline(config))} | {"scan_steps"}
    for name, value, _ in differences(config, recipe):
        if name in measured_by.keys() & varied:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: the variants set {name}, so that each differs from {JIT} in one "
                f"thing; leave it out, and compare {JIT} with {measured_by[name]} (--variants)"
            )


def choose(names: Sequence[str]) -> dict[str, Variant]:
    """The variants of these names, in the ledger's order.

    Raises:
      UsageError: there is no such variant, or none is named.
    """
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"no variant {name!r}, expected some of {', '.join(map(repr, VARIANTS))}")
    if not names:
        raise UsageError("no variants are named: --variants jit eager")
    if "cache, full" in names:
        names = (*names, "cache, empty")  # which fills it
    return {name: variant for name, variant in VARIANTS.items() if name in names}


def require_room(config: Config, chosen: dict[str, Variant], free: int | None) -> None:
    """Check that all processes, each of which keeps its model, fit into `free` bytes together.

    Raises:
      UsageError: they do not.
    """
    from jaxgpt import memory

    each = memory.needed(config, 0).total + PROCESS_BYTES
    if free is not None and each * len(chosen) > free:
        raise UsageError(
            f"{len(chosen)} processes at a time need about {memory.size(each)} each; {memory.size(free)} are free: "
            "name fewer, as in --variants jit eager, or make the model smaller"
        )


def spec(config: Config, variant: Variant) -> dict[str, Any]:
    """Arguments of `stages.Stages`."""
    model = replace(config.model, **dict(variant.model))
    config = replace(config, model=model, train=replace(config.train, scan_steps=variant.steps, eval_every=0))
    return {"config": to_tree(config), "way": variant.way}


def environment(variant: Variant, cache: str) -> dict[str, str]:
    """Variables of the variant's process, which keep compiled programs in the folder `cache`, if it does."""
    if not variant.cache:
        return {}
    return {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def _figures(starts: list[dict[str, Any]], process_bytes: int) -> dict[str, Any]:
    """The figures of all starts of one variant; each stage as a series."""
    stages = {stage: series([start["stages"][stage] for start in starts]) for stage in STAGES}
    kept = {name: starts[-1][name] for name in ("programs", "dispatches", "faults", "loss")}
    step_bytes = starts[-1]["compiled_bytes"]
    return {"stages": stages, **kept, "step_bytes": step_bytes, "process_bytes": process_bytes or None}


def first_step_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"variant": name}
        | {f"{stage}, s": found["stages"].get(stage) for stage in STAGES}
        | {"in all, s": first_step_seconds(found), "programs": found["programs"]}
        for name, found in figures.items()
    ]


def steady_rows(figures: dict[str, Any], steps: Rates) -> list[dict[str, Any]]:
    """Args:
    steps: steps per second, round by round.
    """
    rows = []
    for name, found in figures.items():
        pays = None
        if EAGER in figures and name != EAGER:
            after = steps_to_pay_off(figures, steps, name, EAGER)
            pays = "never" if after is None else after
        dispatched = found["dispatches"]
        rows.append(
            {
                "variant": name,
                "steady, ms": series([1e3 / rate for rate in steps[name]]),
                "speed, of jit's": ratio(steps[name], steps[JIT]) if JIT in steps and name != JIT else None,
                "dispatches": int(dispatched) if dispatched and dispatched % 1 == 0 else dispatched,
                "page faults": None if found["faults"] is None else round(found["faults"]),
                "step, MB": found["step_bytes"] / 1e6 if found["step_bytes"] else None,
                "process, MB": found["process_bytes"] / 1e6 if found["process_bytes"] else None,
                "pays after, steps": pays,
            }
        )
    return rows


def same_losses(figures: dict[str, Any]) -> str:
    """A note: all variants that compute in float32 have the same first loss."""
    exact = [found["loss"] for name, found in figures.items() if name != "bfloat16"]
    if len(exact) < 2:
        return "the first loss: " + ", ".join(f"{found['loss']:.4f}" for found in figures.values())
    apart = max(exact) - min(exact)
    same = f"differs by {apart:.1g} at most" if apart else "is bit-identical in all"
    return f"the first loss of the {len(exact)} variants in float32 is {exact[0]:.4f}, and {same}"


def summary(name: str, tokens: int, figures: dict[str, Any], steps: Rates) -> str:
    """A paragraph: what compiling costs, in steps, and when it has paid for itself. Empty without "jit"."""
    if JIT not in figures:
        return ""
    stages = {stage: each["median"] for stage, each in figures[JIT]["stages"].items()}
    ms = {each: 1e3 / series(found)["median"] for each, found in steps.items()}
    before = first_step_seconds(figures[JIT])
    said = [
        f"A compiled step of {name} takes {ms[JIT]:.1f} ms ({1e3 * tokens / ms[JIT]:,.0f} tokens/s). Before the first "
        f"one, `jit` traces for {stages['trace']:.2f} s, lowers for {stages['lower']:.2f} s and compiles for "
        f"{stages['compile']:.2f} s: all in all as long as {1e3 * before / ms[JIT]:,.0f} steps."
    ]
    for other in (EAGER, "op by op"):
        if other in figures:
            after = steps_to_pay_off(figures, steps, JIT, other)
            pays = "never pays off" if after is None else f"has paid off after {after:,.0f} steps"
            said.append(
                f"Run {other}, a step takes {ms[other]:.1f} ms, {ms[other] / ms[JIT]:.1f} times as long, and the first "
                f"is done after {first_step_seconds(figures[other]):.1f} s: against it, compiling {pays}."
            )
    if "cache, full" in figures:
        cached = first_step_seconds(figures["cache, full"])
        said.append(f"With the compile cache the first step is done after {cached:.1f} s in place of {before:.1f} s.")
    return " ".join(said)


def first_step_seconds(figures: dict[str, Any]) -> float:
    """Seconds until the first step is done."""
    return float(sum(stage["median"] for stage in figures["stages"].values()))


def steps_to_pay_off(figures: dict[str, Any], steps: Rates, name: str, against: str) -> int | None:
    """`break_even` of one variant against another, by their medians, in whole steps."""
    extra = first_step_seconds(figures[name]) - first_step_seconds(figures[against])
    found = break_even(extra, *(1 / series(steps[each])["median"] for each in (against, name)))
    return None if found is None else round(found)


def break_even(extra: float, slow: float, fast: float) -> float | None:
    """Steps after which `extra` seconds at the start are won back by steps of `fast` in place of `slow` seconds; 0 if
    nothing has to be won back, None if it never is.

    >>> break_even(3.0, 0.5, 0.2), break_even(-1.0, 0.5, 0.2), break_even(3.0, 0.2, 0.5), break_even(-1.0, 0.2, 0.5)
    (10.0, 0.0, None, None)
    """
    if extra <= 0:
        return 0.0 if fast <= slow else None
    return extra / (slow - fast) if slow > fast else None
