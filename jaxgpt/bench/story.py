"""What the numbers of a ledger mean on the machine where they were measured, in sentences made from them."""

from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.ruler import Rates, series

JIT = "jit"
"""The variant that the others are compared with."""
EAGER = "eager"
"""The one that compiling is paid for against."""
Figures = dict[str, Any]
"""Of one variant: `stages` (each a series of seconds), `programs`, `dispatches`, `faults`, `step_bytes`."""


def told(name: str, tokens: int, done: dict[str, Any], steps: Rates) -> str:
    """What the numbers mean here, in sentences; of each variant that is there."""
    if JIT not in done:
        return ""
    jit, ms = done[JIT], {each: 1e3 / series(found)["median"] for each, found in steps.items()}
    said = [
        f"Compiled, a step of {name} takes {ms[JIT]:.1f} ms ({1e3 * tokens / ms[JIT]:,.0f} tokens/s). Before the first "
        f"one, `jit` spends {_seconds(jit, 'trace')} tracing, {_seconds(jit, 'lower')} lowering and "
        f"{_seconds(jit, 'compile')} compiling: as much as {1e3 * before(jit) / ms[JIT]:,.0f} steps."
    ]
    for other in (EAGER, "op by op"):
        if other in done:
            said.append(_against_eager(other, done, steps, ms))
    if "cache, full" in done:
        full = done["cache, full"]
        said.append(
            f"What the cache keeps brings the first step from {before(jit):.1f} to {before(full):.1f} s: tracing and "
            f"lowering ({_seconds(full, 'trace')} and {_seconds(full, 'lower')}) are done again."
        )
    if "jit, donated" in done:
        saved = (jit["step_bytes"] or 0) - (done["jit, donated"]["step_bytes"] or 0)
        said.append(
            f"Donation takes {saved / 1e6:.1f} MB off a step's memory; its time is {_change(steps, 'jit, donated')}."
        )
    for each in [each for each in done if each.startswith("scan of ")]:
        said.append(f"A {each} steps is {_change(steps, each)}{_spared(jit, done[each])}.")
    for each in ("remat products", "remat blocks"):
        if each in done and done[each]["step_bytes"] and jit["step_bytes"]:
            share = done[each]["step_bytes"] / jit["step_bytes"]
            saved = f"needs {share:.0%} of the memory" if share < 1 else f"saves no memory here ({share:.0%})"
            said.append(f"{each.capitalize()} {saved}; the step is {_change(steps, each)}.")
    if "bfloat16" in done:
        said.append(f"In bfloat16 the step is {_change(steps, 'bfloat16')}.")
    for each in [each for each in done if each.startswith("torch")]:
        after = paid(done, steps, JIT, each)
        pays = "and is never paid for against it" if after is None else f"and is paid for after {after:,.0f} steps"
        said.append(f"Against {each} ({ms[each]:.1f} ms), compiled JAX is {_change(steps, JIT, each)}, {pays}.")
    return " ".join(said)


def _against_eager(other: str, done: dict[str, Any], steps: Rates, ms: dict[str, float]) -> str:
    figures, after = done[other], paid(done, steps, JIT, other)
    if after is None:
        pays = "so compiling is not paid for"
    elif after == 0:
        pays = "later than compiled, so compiling pays from the first step on"
    else:
        seconds = before(figures) + after * ms[other] / 1e3
        pays = f"so compiling has paid for itself after {after:,.0f} steps ({seconds:,.0f} s from the start)"
    handed = "" if figures["dispatches"] is None else f", in {figures['dispatches']:,.0f} programs,"
    return (
        f"Run {other}, the same step takes {ms[other]:.1f} ms{handed} {ms[other] / ms[JIT]:.1f} times as long. Its "
        f"first one was done after {before(figures):.1f} s, for {figures['programs']:,} small programs are compiled "
        f"for it: {pays}."
    )


def _spared(jit: Figures, scan: Figures) -> str:
    """What a scan does once for all of its steps."""
    spared = []
    if scan["dispatches"] is not None:
        spared.append(f"it hands over {scan['dispatches']:g} programs a step")
    if jit["faults"] and scan["faults"] is not None:
        faults = f"{scan['faults']:,.0f} page faults a step, {jit['faults']:,.0f} without it"
        spared.append(f"takes memory for temporaries once a program ({faults})")
    return f": {' and '.join(spared)}" if spared else ""


def _change(steps: Rates, name: str, against: str = JIT) -> str:
    """How much faster, round by round.

    >>> _change({"jit": [1.0, 1.0], "a": [1.25, 1.5], "b": [0.9, 1.1]}, "a")
    '1.38x as fast (1.25 to 1.50)'
    """
    found = ruler.ratio(steps[name], steps[against])
    if found["low"] <= 1 <= found["high"] and found["n"] > 1:
        return f"the same within the noise ({found['low']:.2f} to {found['high']:.2f}x as fast)"
    return f"{found['median']:.2f}x as fast ({found['low']:.2f} to {found['high']:.2f})"


def break_even(extra: float, slow: float, fast: float) -> float | None:
    """Steps after which `extra` seconds beforehand are paid for by steps of `fast` seconds in place of `slow` ones; 0
    if there is nothing to pay, None if it never is, or if what was won before is lost again.

    >>> break_even(3.0, 0.5, 0.2), break_even(-1.0, 0.5, 0.2), break_even(3.0, 0.2, 0.5), break_even(-1.0, 0.2, 0.5)
    (10.0, 0.0, None, None)
    """
    if extra <= 0:
        return 0.0 if fast <= slow else None
    return extra / (slow - fast) if slow > fast else None


def paid(done: dict[str, Any], steps: Rates, name: str, against: str = EAGER) -> int | None:
    """`break_even` of one variant against another, by their medians, as whole steps."""
    extra = before(done[name]) - before(done[against])
    found = break_even(extra, *(1 / series(steps[each])["median"] for each in (against, name)))
    return None if found is None else round(found)


def before(figures: dict[str, Any]) -> float:
    """Seconds until the first step is done."""
    return float(sum(stage["median"] for stage in figures["stages"].values()))


def _seconds(figures: dict[str, Any], stage: str) -> str:
    return f"{figures['stages'][stage]['median']:.2f} s"
