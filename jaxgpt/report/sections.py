"""The parts of a report, each from facts and looks to markup; what there is nothing to show in is empty."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jaxgpt
from jaxgpt.display.baselines import COUNTED, published
from jaxgpt.display.markup import Html, element, join, text
from jaxgpt.display.style import Spec
from jaxgpt.monitor.terminal import duration
from jaxgpt.recipes import RECIPES
from jaxgpt.report.facts import Facts, Score, differing, kinds, perplexity
from jaxgpt.report.looks import Looks

NOTHING = Html("")
TOLD = 500
"""Events of a diary that are told, the last ones."""


def title(runs: Sequence[Facts]) -> str:
    """What the report is about."""
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(facts.name for facts in runs)}"


def head(runs: Sequence[Facts]) -> Html:
    """Its name, and in two lines what was trained on what."""
    facts = runs[0]
    if len(runs) > 1:
        said = "Curves laid over each other, what differs, and how each came out."
    else:
        model, train = facts.config.model, facts.config.train
        kind = (
            "bigram table" if model.kind == "bigram" else f"GPT of {model.n_layer} x {model.n_embd} (layers x channels)"
        )
        tokens = facts.step * train.batch_size * model.block_size
        said = (
            f"{facts.n_params:,} parameters, a {kind}, trained on {facts.corpus['source']} for {facts.step:,} of "
            f"{train.steps:,} steps ({tokens:,} tokens)."
        )
    if any(each.running for each in runs):
        said += " It has not ended: these are its numbers so far."
    if killed := [each.resume for each in runs if each.cut_off]:
        said += f" Its process was killed: {killed[0]} goes on."
    return element("header", element("h1", title(runs)), element("p", said, class_="quiet"))


def outcome(runs: Sequence[Facts], charts: dict[str, Spec]) -> Html:
    """The best evaluation in every unit, beside what can be had without a model."""
    facts, best = runs[0], runs[0].best
    if not best:
        return section("Outcome", element("p", "The validation split was not scored yet."))
    wide = best.standard_error
    error = f"± {wide:.4f} nats per token" if wide is not None else "nats per token"
    numbers: list[tuple[str, str, str]] = [
        ("validation loss", f"{best.loss:.4f}", error),
        ("bits per character", f"{best.bits_per_char:.4f}", _error(best, best.bits_per_char)),
        ("bits per byte", f"{best.bits_per_byte:.4f}", _error(best, best.bits_per_byte)),
        ("perplexity", f"{perplexity(best.loss):.3f}", "exp of the loss, per token"),
    ]
    if facts.seconds is not None:
        speed = f"{facts.tokens_per_second:,.0f} tokens/s" if facts.tokens_per_second else "from start to end"
        numbers.append(("time" if facts.ended else "time, at least", duration(facts.seconds), speed))
    if (used := facts.utilisation) is not None:
        numbers.append(("utilisation", f"{used:.1%}", "of the published bfloat16 rate"))
    cells = [element("div", element("dt", a), element("dd", b, element("small", c))) for a, b, c in numbers]
    where = f"Scored on all {best.n_tokens:,} tokens of the validation split after {best.step:,} steps, each once."
    known = ["" if facts.changes else f" The recipe {facts.recipe} says: {RECIPES[facts.recipe].loss}."]
    if published(facts.corpus):
        known.append(" Published figures are by random batches, so they are not by the same ruler.")
    caption = (
        "Counted on the training split and scored on the validation split, as the model is: what is to be had "
        "without learning."
    )
    if facts.corpus["count"] > COUNTED:
        caption += f" Of each split, at most {COUNTED:,} tokens, in stretches evenly apart."
    return section(
        "Outcome",
        element("dl", *cells, class_="numbers"),
        element("p", where, *known, class_="quiet"),
        chart(charts, "outcome", caption),
        in_words(charts),
    )


def comparison(runs: Sequence[Facts], charts: dict[str, Spec]) -> Html:
    """One row a run, the best first, and the settings in which they differ."""
    names = ("run", "loss, nats per token", "bits/char", "bits/byte", "at step", "parameters", "tokens/s", "time")
    rows = []
    for facts in sorted(runs, key=lambda facts: facts.best.bits_per_byte if facts.best else float("inf")):
        best = facts.best
        error = f" ± {best.standard_error:.4f}" if best and best.standard_error is not None else ""
        scored = (f"{best.loss:.4f}{error}", f"{best.bits_per_char:.4f}", f"{best.bits_per_byte:.4f}") if best else ()
        speed = f"{facts.tokens_per_second:,.0f}" if facts.tokens_per_second else ""
        at = f"{best.step:,} of {facts.step:,}" if best else f"{facts.step:,}"
        rows.append((facts.name, *(scored or ("not scored yet", "", "")), at, f"{facts.n_params:,}", speed, facts.took))
    parts = [table(names, rows), chart(charts, "outcome", "The best evaluation of each run."), in_words(charts)]
    if len({facts.corpus["sha256"] for facts in runs}) > 1:
        parts.append(element("p", "They learn from different tokens: compare bits per byte, and those with care."))
    changed = differing(runs)
    settings = table(("setting", *(facts.name for facts in runs)), [(name, *values) for name, values in changed])
    none = element("p", "They differ in no setting.")
    return join(section("Outcome", *parts), section("What differs", settings if changed else none))


def curves(runs: Sequence[Facts], charts: dict[str, Spec]) -> Html:
    """Loss, learning rate, gradient norm and speed over steps."""
    whole = "Loss. Thin: each training step. Dots: the whole validation split, with its standard error as a band; a "
    whole += "ring is the best."
    if any(facts.noted for facts in runs):
        whole += " Upright lines: resumes, spikes, and what broke it off; the sign at the top of each says more."
    captions = {
        "learning_rate": "Learning rate",
        "grad_norm": "Norm of the gradient, before it is clipped",
        "speed": "Tokens per second of training, between saves",
    }
    over = [
        element("p", f"{facts.name} overfits after step {facts.overfits_from:,}: its last evaluation is worse than the "
                "best by more than its standard error.")
        for facts in runs
        if facts.overfits_from is not None
    ]  # fmt: skip
    small = [chart(charts, name, caption) for name, caption in captions.items()]
    shown = [chart(charts, "loss", whole), element("div", *small, class_="pair")]
    hint = "Hold Shift to zoom with the wheel and to drag; a double click goes back. Long curves are thinned, their "
    hint += "extremes kept."
    return section("Curves", element("p", hint, class_="quiet screen"), *over, *shown) if charts else NOTHING


def what_was_run(facts: Facts, several: bool) -> Html:
    """Recipe, command, data, versions, hardware, and every setting."""
    corpus, start = facts.corpus, facts.starts[-1] if facts.starts else {}
    differs = ", ".join(f"{field} {value} (the recipe: {was})" for field, was, value in facts.changes)
    dealt = " · ".join(
        f"{name} {start[key]}"
        for name, key in (("jaxgpt", "jaxgpt"), ("JAX", "jax"), ("Python", "python"))
        if key in start
    )
    on = start.get("device", "")
    if start.get("backend") == "cpu" and "cpu" in start:
        on = f"{start['cpu']}, {start['cores']} cores"
    elif facts.n_devices > 1:
        on = f"{facts.n_devices} x {on}"
    typed = [element("div", element("code", each["command"])) for each in facts.starts if "command" in each]
    data = facts.config.data
    few = 0 < data.val_tokens < corpus["count"] * data.val_fraction
    held_out = (f"{data.val_tokens:,}" if few else f"{data.val_fraction:.0%}") + " of them for validation"
    rows: list[tuple[str, Any]] = [
        ("recipe", f"{facts.recipe}: {RECIPES[facts.recipe].about}"),
        ("differs in", differs or "nothing"),
        ("the same again", element("code", facts.command)),
        ("typed", join(*typed)),
        ("text", f"{corpus['source']}, from {corpus['origin']}"),
        ("tokens", f"{corpus['count']:,}, {corpus['tokenizer']['kind']}, {held_out}"),
        ("SHA-256 of the tokens", element("code", corpus["sha256"])),
        ("SHA-256 of the text", element("code", corpus["source_sha256"])),
        ("versions", dealt),
        ("hardware", on),
        ("processes", start.get("processes", "")),
    ]
    listed = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows if value]
    settings = [
        (f"{section}.{name}", value)
        for section, values in vars(facts.config).items()
        for name, value in vars(values).items()
    ]
    return section(
        f"What was run{f': {facts.name}' if several else ''}",
        element("table", element("tbody", *listed)),
        element("details", element("summary", "Every setting"), table(("setting", "value"), settings)),
    )


def diary(facts: Facts, several: bool) -> Html:
    """Starts, resumes, saves, spikes and what else was noted."""
    if not facts.events:
        return NOTHING
    rows, usual = [], ("start", "save", "end", "import")
    all_kinds = kinds(facts.events)
    for event, kind in zip(facts.events[-TOLD:], all_kinds[-TOLD:], strict=True):
        speed = event.get("tokens_per_second")
        said = event.get("text") or event.get("origin") or (f"{speed:,.0f} tokens/s on the way here" if speed else "")
        name = kind if kind in usual else element("strong", kind)
        rows.append((event.get("time", ""), event.get("step", ""), name, said))
    loud = sum(kind not in usual for kind in all_kinds)
    summary = f"{len(facts.events):,} events, {loud:,} of them beyond starts, saves and ends"
    if len(facts.events) > TOLD:
        summary += f"; the last {TOLD} are told"
    shown = element("details", element("summary", summary), table(("time (UTC)", "step", "event", "told"), rows))
    return section(f"Diary{f': {facts.name}' if several else ''}", shown)


def missing(runs: Sequence[Facts], looks: Sequence[Looks]) -> Html:
    """What could not be shown, and why."""
    lines = [
        element("li", f"{facts.name}, {name}: {why}")
        for facts, look in zip(runs, looks, strict=True)
        for name, why in look.missing.items()
    ]
    return section("Left out", element("ul", *lines)) if lines else NOTHING


def footer() -> Html:
    """Who made it, and when."""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return text(
        f"Made by jaxgpt {jaxgpt.__version__} on {when}. This file needs no network and holds all that it shows."
    )


def section(name: str, *children: object) -> Html:
    """A part of the page under its heading."""
    return element("section", element("h2", name), *children)


def chart(charts: dict[str, Spec], name: str, caption: str) -> Html:
    """The place of a chart, if there is such a one."""
    if name not in charts:
        return NOTHING
    place = element("div", class_="chart", id=f"chart-{name}", role="img", aria_label=caption)
    return element("figure", element("figcaption", caption), place)


def in_words(charts: dict[str, Spec]) -> Html:
    """The values of the outcome for those who hear the page: of a chart they are told its caption alone."""
    if "outcome" not in charts:
        return NOTHING
    rows = charts["outcome"]["data"]["values"]
    said = (element("li", f"{row['what']}: {row['loss']:.4f} nats per token") for row in rows)
    return element("ul", *said, class_="unseen")


def table(names: Iterable[object], rows: Iterable[Iterable[object]], class_: str = "") -> Html:
    """A table that scrolls by itself where it is too wide."""
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in names)))
    lines = [element("tr", *(element("td", value) for value in row)) for row in rows]
    return element("div", element("table", head, element("tbody", *lines), class_=class_), class_="wide", tabindex=0)


def _error(score: Score, bits: float) -> str:
    """The standard error in bits: in the same proportion to them as that of the loss to the loss."""
    if score.standard_error is None or not score.loss:
        return ""
    return f"± {bits * score.standard_error / score.loss:.4f}"
