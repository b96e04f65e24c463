"""Facts to charts: Vega-Lite specifications as plain values. Their colours are names of the page's, so that a chart
follows the theme of the page; a picture has them filled in."""

import math
from collections.abc import Sequence

from jaxgpt.display.baselines import published
from jaxgpt.display.oneline import visible
from jaxgpt.display.style import INK, MARK, QUIET, SERIES, WARN, ZOOM, Spec, by_run, chart, step_axis, tooltip
from jaxgpt.report.facts import Facts, Points
from jaxgpt.report.looks import Attention, Embedding, Looks

MAPPED = 30_000
"""Weights in a picture of attention, at most."""
APART = 200
"""Marks of a kind along the axis of steps, at most."""


def charts(runs: Sequence[Facts], looks: Sequence[Looks]) -> dict[str, Spec]:
    """Every chart that there is something to show in, by its name.

    Args:
      looks: of each run, in the same order.
    """
    found = {"outcome": outcome(runs, looks), "loss": loss(runs, looks)}
    found |= {name: curves(runs, name) for name in ("learning_rate", "grad_norm", "speed")}
    if embedding := looks[asked(runs, looks)].embedding:
        found["embedding"] = plane(embedding)
    return {name: spec for name, spec in found.items() if spec}


def asked(runs: Sequence[Facts], looks: Sequence[Looks]) -> int:
    """Which run's weights are looked at closely: those of fewest bits per byte, of the runs that have any."""
    best = [facts.best.bits_per_byte if facts.best else math.inf for facts in runs]
    return min(range(len(runs)), key=lambda i: (looks[i].embedding is None, best[i]))


def outcome(runs: Sequence[Facts], looks: Sequence[Looks]) -> Spec | None:
    """The best loss of each run beside what guessing and counting give, and what others have published."""
    rows: list[Spec] = []
    for facts in runs:
        if facts.best:
            error = facts.best.standard_error or 0
            said = {"low": facts.best.loss - error, "high": facts.best.loss + error}
            rows.append({"what": facts.name, "loss": facts.best.loss, "kind": "run", **said})
    rows += [{"what": what, "loss": value, "kind": "limit"} for what, value in _limits(runs, looks)]
    rows += [{"what": who, "loss": value, "kind": "published"} for who, value in _published(runs)]
    if not rows:
        return None
    rows.sort(key=lambda row: -row["loss"])
    y: Spec = {"field": "what", "type": "nominal", "sort": [row["what"] for row in rows], "title": None}
    y["axis"] = {"labelLimit": 220, "ticks": False, "domain": False, "grid": True}
    color: Spec = {"field": "kind", "type": "nominal", "legend": None}
    color["scale"] = {"domain": ["run", "limit", "published"], "range": [MARK, QUIET, WARN]}
    x: Spec = {"field": "loss", "type": "quantitative", "title": "nats per token"}
    x |= {"scale": {"zero": False, "padding": 30}, "axis": {"tickCount": 6}}
    told = [{"field": "what", "title": "what"}, {"field": "loss", "format": ".4f", "title": "nats per token"}]
    return chart(
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.4},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
                "encoding": {"x": x, "tooltip": told},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 9, "dy": -1, "color": INK},
                "encoding": {"x": x, "text": {"field": "loss", "format": ".3f"}, "color": {"value": INK}},
            },
        ],
        data={"values": rows},
        encoding={"y": y, "color": color},
        height=26 * len({row["what"] for row in rows}),
    )


WHAT = {
    "uniform": "guessing, all tokens alike",
    "unigram": "counting tokens",
    "bigram": "counting pairs of tokens",
}


def loss(runs: Sequence[Facts], looks: Sequence[Looks]) -> Spec | None:
    """Training and validation loss of every run, the best evaluation marked, and from where it overfits."""
    train = _rows(runs, "loss")
    scores = [
        {"run": facts.name, "step": score.step, "value": score.loss}
        | {"low": score.loss - (score.standard_error or 0), "high": score.loss + (score.standard_error or 0)}
        for facts in runs
        for score in facts.scores
    ]
    if not train and not scores:
        return None
    best = [_mark(facts) for facts in runs if facts.best]
    over = [_mark(facts) for facts in runs if facts.overfits_from is not None]
    rules = [{"what": what, "value": value} for what, value in _limits(runs, looks)]
    last = max((row["step"] for row in [*train, *scores]), default=1)
    x, noted = step_axis(last), [row for facts in runs for row in _noted(facts, last)]
    sign: Spec = {"x": x, "color": {"condition": {"test": "datum.kind === 'resume'", "value": QUIET}, "value": WARN}}
    sign["tooltip"] = [{"field": name} for name in ("run", "step", "kind", "told")]
    y = {"field": "value", "type": "quantitative", "title": "loss, nats per token", "scale": {"zero": False}}
    color = by_run(runs)
    layers: list[Spec] = [
        {
            "data": {"values": rules},
            "mark": {"type": "rule", "strokeDash": [2, 4], "color": QUIET},
            "encoding": {"y": y},
        },
        {
            "data": {"values": rules},
            "mark": {"type": "text", "align": "right", "dy": -6, "color": QUIET, "fontSize": 11},
            "encoding": {"y": y, "x": {"value": {"expr": "width"}}, "text": {"field": "what"}},
        },
        {"data": {"values": noted}, "mark": {"type": "rule", "opacity": 0.4}, "encoding": sign},
        {
            "data": {"values": noted},
            "mark": {"type": "point", "shape": "triangle-down", "filled": True, "size": 90, "opacity": 0.9},
            "encoding": {**sign, "y": {"value": 6}},
        },
        {
            "data": {"values": train},
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.55, "interpolate": "linear"},
            "encoding": {"x": x, "y": y, "color": {"value": QUIET} if len(runs) == 1 else color},
        },
        {
            "data": {"values": scores},
            "mark": {"type": "area", "opacity": 0.18},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color},
        },
        {
            "data": {"values": scores},
            "mark": {"type": "line", "strokeWidth": 2.5, "point": {"size": 45, "filled": True}, "clip": False},
            "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip(".4f")},
        },
        {
            "data": {"values": over},
            "mark": {"type": "rule", "color": WARN, "strokeDash": [5, 3], "strokeWidth": 1.5},
            "encoding": {"x": x},
        },
        {
            "data": {"values": best},
            "mark": {"type": "point", "shape": "circle", "size": 190, "strokeWidth": 2, "filled": False},
            "encoding": {"x": x, "y": y, "color": color},
        },
        {
            "data": {"values": best if len(runs) == 1 else []},
            "mark": {"type": "text", "align": "right", "dx": -8, "dy": -16, "color": INK, "fontWeight": 600},
            "encoding": {"x": x, "y": y, "text": {"field": "said"}},
        },
    ]
    layers[4]["params"] = [ZOOM]
    return chart(layer=[layer for layer in layers if layer["data"]["values"]], height=340)


def curves(runs: Sequence[Facts], field: str) -> Spec | None:
    """One value of every step, or of every save; gradient norms on a logarithmic axis."""
    rows = _rows(runs, field)
    if not rows:
        return None
    values = [row["value"] for row in rows]
    scale: Spec = {"zero": field == "speed"}
    axis: Spec = {"tickCount": 5, "format": ".1~e" if field == "learning_rate" else "~s"}
    if field == "grad_norm" and min(values) > 0:
        scale, axis = {"type": "log", "nice": False}, {"values": ticks(min(values), max(values)), "format": "~g"}
    return chart(
        data={"values": rows},
        params=[ZOOM],
        mark={"type": "line", "strokeWidth": 1.5, "point": field == "speed"},
        encoding={
            "x": step_axis(max(row["step"] for row in rows)),
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": scale, "axis": axis},
            "color": by_run(runs, legend=False),
            "tooltip": tooltip(".4~g"),
        },
        height=170,
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, few of them.

    >>> ticks(0.6, 4.2), ticks(0.01, 900)
    ([1.0, 2.0], [0.01, 0.1, 1.0, 10.0, 100.0])
    """
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    parts = (1, 2, 5) if high < 100 * low else (1,)
    return [n * power for power in powers for n in parts if low <= n * power <= high]


def plane(embedding: Embedding) -> Spec:
    """Tokens where the two principal components of their embeddings put them."""
    first, second = embedding.projection.shares
    rows = [
        {"token": visible(token)[:12], "x": round(float(x), 4), "y": round(float(y), 4), "kind": kind(token)}
        | {"near": ", ".join(visible(name)[:12] for name, _ in near)}
        for token, (x, y), near in zip(embedding.tokens, embedding.projection.points, embedding.near, strict=True)
    ]
    axis = {"labels": False, "ticks": False, "grid": False}
    color = {"field": "kind", "type": "nominal", "scale": {"domain": list(KINDS), "range": SERIES}}
    color["legend"] = {"columns": 3}
    return chart(
        data={"values": rows},
        params=[ZOOM],
        mark={"type": "text", "fontSize": 15, "fontWeight": 500, "font": "ui-monospace, monospace", "clip": True},
        encoding={
            "x": {"field": "x", "type": "quantitative", "axis": axis, "title": f"first, {first:.0%} of variance"},
            "y": {"field": "y", "type": "quantitative", "axis": axis, "title": f"second, {second:.0%}"},
            "text": {"field": "token"},
            "color": color,
            "tooltip": [{"field": "token", "title": "token"}, {"field": "near", "title": "nearest"}],
        },
        height=420,
    )


KINDS = ("vowels", "other letters", "capitals", "digits", "the rest")


def kind(token: str) -> str:
    """What a token is coloured as.

    >>> [kind(token) for token in ("a", " the", "The", "7", ".")]
    ['vowels', 'other letters', 'capitals', 'digits', 'the rest']
    """
    word = token.strip()
    if word[:1].isupper():
        return "capitals"
    if word.isalpha():
        return "vowels" if word in ("a", "e", "i", "o", "u") else "other letters"
    return "digits" if word.isdigit() else "the rest"


def maps(attention: Attention) -> Spec:
    """Attention by layer and head, for pictures: the page draws it by itself."""
    weights, (L, H, T, _) = attention.weights, attention.weights.shape
    T = min(T, int((2 * MAPPED / (L * H)) ** 0.5))
    rows = [
        {"layer": layer + 1, "head": head + 1, "t": t, "s": s, "w": round(float(weights[layer, head, t, s]), 4)}
        for layer in range(L)
        for head in range(H)
        for t in range(T)
        for s in range(t + 1)
    ]
    axis = {"labels": False, "ticks": False, "grid": False}
    places = {name: {"field": name, "type": "ordinal", "axis": axis, "title": None} for name in ("s", "t")}
    return chart(
        data={"values": rows},
        mark="rect",
        encoding={
            "row": {"field": "layer", "type": "ordinal"},
            "column": {"field": "head", "type": "ordinal"},
            "x": places["s"],
            "y": places["t"],
            "color": {"value": MARK},
            "opacity": {"field": "w", "type": "quantitative", "legend": None, "scale": {"range": [0, 1]}},
        },
        autosize="pad",
        width=130,
        height=130,
        config={"facet": {"spacing": 6}},
    )


def _rows(runs: Sequence[Facts], field: str) -> list[Spec]:
    points: list[tuple[str, Points]] = [(facts.name, getattr(facts, field)) for facts in runs]
    return [
        {"run": name, "step": step, "value": float(f"{value:.6g}")} for name, each in points for step, value in each
    ]


def _mark(facts: Facts) -> Spec:
    """The best evaluation of a run, and what is said of it."""
    assert facts.best
    said = f"best, {facts.best.loss:.3f}" + ("; it overfits from here" if facts.overfits_from is not None else "")
    return {"run": facts.name, "step": facts.best.step, "value": facts.best.loss, "said": said}


def _limits(runs: Sequence[Facts], looks: Sequence[Looks]) -> list[tuple[str, float]]:
    """(what, nats per token) of guessing and counting, where all runs learn from the same tokens."""
    known = next((look.limits for look in looks if look.limits), None)
    return [(WHAT[name], value) for name, value in vars(known).items()] if known and _alike(runs) else []


def _published(runs: Sequence[Facts]) -> Sequence[tuple[str, float]]:
    """What is known of the tokens, where all runs learn from the same."""
    return published(runs[0].corpus) if _alike(runs) else ()


def _alike(runs: Sequence[Facts]) -> bool:
    return len({facts.corpus["sha256"] for facts in runs}) == 1


def _noted(facts: Facts, last: int) -> list[Spec]:
    """What was noted of a run up to the step `last`; of those of a kind that no eye could part, the first."""
    rows: dict[tuple[str, int], Spec] = {}
    for step, kind, told in facts.noted:
        if step <= last:
            row = {"run": facts.name, "step": step, "kind": kind, "told": told}
            rows.setdefault((kind, APART * step // max(1, last)), row)
    return list(rows.values())
