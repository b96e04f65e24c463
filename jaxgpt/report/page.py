"""The report as one HTML file that needs no network and no other file. The markup is in page.html."""

import base64
import hashlib
import math
import time
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jaxgpt
from jaxgpt.config import MissingExtraError
from jaxgpt.display.baselines import COUNTED
from jaxgpt.display.charts import Spec, script
from jaxgpt.display.text import count, fixed
from jaxgpt.monitor.facts import Facts, differing, kinds
from jaxgpt.recipes import RECIPES
from jaxgpt.report.charts import chosen, same_tokens
from jaxgpt.report.looks import TEMPERATURE, Looks, Sample

NEWEST = 500
"""Most events that are listed: the last ones."""
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters, which are invalid in a page -> their symbols."""


def page(runs: Sequence[Facts], looks: Sequence[Looks], charts: dict[str, Spec], refresh: int = 0) -> str:
    """The HTML of a report, with the looks at each run and `charts.charts`; it reloads itself after `refresh` seconds,
    if not 0."""
    which, scripts = chosen(runs, looks), (script(), _file("page.js"))
    return environment().get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(facts.name for facts in runs)}",
        allowed=" ".join(map(_source_hash, scripts)),
        of_run=f": {runs[which].name}" if len(runs) > 1 else "",
        missing=[f"{facts.name}, {name}: {why}" for facts, each in zip(runs, looks, strict=True)
                 for name, why in each.missing.items()],
        runs=runs, look=looks[which], charts=charts, refresh=refresh, newest=NEWEST, temperature=TEMPERATURE,
        samples=samples(runs, looks), same_tokens=same_tokens(runs), recipes=RECIPES, counted=COUNTED,
        differing=[(name, *each) for name, each in differing(runs)], numbers=numbers, comparison=comparison,
        configuration=configuration, settings=settings, events=events, version=jaxgpt.__version__,
        time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        css=_file("page.css"), scripts=scripts,
    )  # fmt: skip


@cache
def environment() -> Any:
    """The environment of the templates, which escape every value that is not marked as safe. Raises MissingExtraError
    if jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("a report", "jinja2", "report") from error
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, finalize=_printable, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"number": lambda n: f"{n:,}", "count": count, "fixed": fixed}
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


def _printable(value: object) -> str:
    """A value as text, with symbols for control characters, and U+FFFD for lone surrogates."""
    if hasattr(value, "__html__"):
        return value  # type: ignore[return-value]
    return str(value).translate(CONTROLS).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def numbers(facts: Facts) -> list[tuple[str, str, str]]:
    """(name, value, note) of the best evaluation in every unit, and of time and speed."""
    assert facts.best
    best, speed, used = facts.best.evaluation, facts.tokens_per_second, facts.utilization
    error = best.standard_error / best.loss if best.loss else math.nan
    units = (
        ("validation loss", best.loss, "nats per token"),
        ("bits per character", best.bits_per_char, ""),
        ("bits per byte", best.bits_per_byte, ""),
    )
    rows = [
        *((name, fixed(x), ("" if math.isnan(error) else f"± {fixed(x * error)} ") + unit) for name, x, unit in units),
        ("perplexity", fixed(math.exp(min(best.loss, 700)), 3), "exp of the loss, per token"),
        ("time", facts.took, "from start to end"),
        ("speed", f"{speed:,.0f}" if speed else "", "tokens/s of training"),
        ("utilization", "" if used is None else f"{used:.1%}", "of the published bfloat16 rate"),
    ]
    return [(name, value, note.strip()) for name, value, note in rows if value]


def comparison(runs: Sequence[Facts]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """A table with a row for each run, the best first."""
    names = ("run", "loss, nats per token", "bits/char", "bits/byte", "at step", "parameters", "tokens/s", "time")
    rows: list[Sequence[str]] = []
    for facts in sorted(runs, key=lambda facts: facts.best.evaluation.bits_per_byte if facts.best else math.inf):
        scored, speed = ("not evaluated yet", "", "", f"{facts.step:,}"), facts.tokens_per_second
        if facts.best:
            step, best = facts.best
            loss = fixed(best.loss) + ("" if math.isnan(best.standard_error) else f" ± {fixed(best.standard_error)}")
            bits = fixed(best.bits_per_char), fixed(best.bits_per_byte)
            scored = (loss, *bits, f"{step:,} of {facts.step:,}")
        rows.append((facts.name, *scored, f"{facts.n_params:,}", f"{speed:,.0f}" if speed else "", facts.took))
    return names, rows


def samples(runs: Sequence[Facts], looks: Sequence[Looks]) -> list[tuple[str, Sample]]:
    """(heading, sample) of every step of one run, or of the last step of each of several."""
    found = []
    for facts, look in zip(runs, looks, strict=True):
        losses = {step: evaluation.loss for step, evaluation in facts.scores}
        for sample in look.samples if len(runs) == 1 else look.samples[-1:]:
            loss = f", validation loss {fixed(losses[sample.step], 3)}" if sample.step in losses else ""
            name = "" if len(runs) == 1 else f"{facts.name}, "
            found.append((f"{name}after {count(sample.step, 'step')}{loss}", sample))
    return found


def configuration(facts: Facts) -> list[tuple[str, list[Any], bool]]:
    """(name, lines, whether they are code) of the recipe, commands, data, versions and hardware."""
    corpus, start = facts.corpus, facts.starts[-1] if facts.starts else {}
    kind, device = corpus["tokenizer"]["kind"], start.get("device", "")
    if start.get("backend") == "cpu" and "cpu" in start:
        device = f"{start['cpu']}, {count(start['cores'], 'core')}"
    elif start.get("devices", 1) > 1:
        device = f"{start['devices']} x {device}"
    changes = [f"{field} {value} (recipe: {was})" for field, was, value in facts.changes]
    versions = [f"{name} {start[name.lower()]}" for name in ("jaxgpt", "JAX", "Python") if name.lower() in start]
    rows: list[tuple[str, list[Any], bool]] = [
        ("recipe", [f"{facts.recipe}: {RECIPES[facts.recipe].about}"], False),
        ("differences", [", ".join(changes) or "none"], False),
        ("command", [facts.command], True),
        ("as typed", [start["command"] for start in facts.starts if "command" in start], True),
        ("text", [f"{corpus['source']}, from {corpus['origin']}"], False),
        ("tokens", [f"{corpus['count']:,}, {kind}, {facts.held_out:,} of them for validation"], False),
        ("SHA-256 of the tokens", [corpus["sha256"]], True),
        ("SHA-256 of the text", [corpus["source_sha256"]], True),
        ("versions", [" · ".join(versions)], False),
        ("hardware", [device], False),
        ("processes", [start.get("processes")], False),
    ]
    return [row for row in rows if any(row[1])]


def settings(facts: Facts) -> list[tuple[str, Any]]:
    """Every setting, as section.name."""
    sections = vars(facts.config).items()
    return [(f"{section}.{name}", value) for section, values in sections for name, value in vars(values).items()]


def events(facts: Facts) -> list[tuple[Any, ...]]:
    """Time, step, kind and details of each event."""
    rows = []
    for event, kind in zip(facts.events, kinds(facts.events), strict=True):
        speed = event.get("tokens_per_second")
        details = event.get("text") or event.get("origin") or (f"{speed:,.0f} tokens/s so far" if speed else "")
        rows.append((event.get("time", ""), event.get("step", ""), kind, details))
    return rows


def _source_hash(script: str) -> str:
    """The source by which a Content-Security-Policy allows a script; no other script runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _file(name: str) -> str:
    return resources.files("jaxgpt.report").joinpath(name).read_text("utf-8")
