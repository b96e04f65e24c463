"""Charts of one or more runs over steps: the loss, and other values of each step."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxgpt.display.charts import INK, QUIET, SERIES, WARM, Spec, category, chart, layer, quantity
from jaxgpt.monitor.facts import Facts

DASHES = ([1, 0], [7, 3], [2, 2])


def loss(runs: Sequence[Facts], baselines: Sequence[tuple[str, float]] = ()) -> Spec | None:
    """Training and validation loss of every run, its best evaluation, and its resumes, spikes and failures.

    Args:
      baselines: (name, nats per token) of horizontal lines.
    """
    train, scores, best = _rows(runs, "loss"), list[Spec](), list[Spec]()
    for facts in runs:
        for step, evaluation in facts.scores:
            error = 0.0 if math.isnan(evaluation.standard_error) else evaluation.standard_error
            row: Spec = {"run": facts.name, "step": step, "value": evaluation.loss}
            scores.append(row | {"low": evaluation.loss - error, "high": evaluation.loss + error})
        if facts.best:
            step, value = facts.best.step, facts.best.evaluation.loss
            best.append({"run": facts.name, "step": step, "value": value, "text": f"best, {value:.3f}"})
    if not train and not scores:
        return None
    last = max(row["step"] for row in [*train, *scores])
    marks: list[Spec] = [
        {"run": facts.name, "step": step, "kind": kind, "text": text}
        for facts in runs
        for step, kind, text in facts.incidents
        if step <= last  # some belong to lines that were dropped
    ]
    rules = [{"what": what, "value": value} for what, value in baselines]
    x, y = _steps(last), quantity("value", "loss, nats per token")
    usual = [row["high"] for row in scores] + [value for facts in runs for _, value in facts.loss[:1]]
    top = max(1.5 * max(usual), *(value for _, value in baselines), 0.0)
    if max((row["value"] for row in train), default=0.0) > top:  # a spike would flatten all the rest
        y["scale"]["domainMax"] = top
    at: Spec = {"x": x, "y": y, **_by_run(runs)}
    mark: Spec = {"x": x, "color": {"condition": {"test": "datum.kind === 'resume'", "value": QUIET}, "value": WARM}}
    mark["tooltip"] = [{"field": name} for name in ("run", "step", "kind", "text")]
    name: Spec = {"y": y, "x": {"value": {"expr": "width"}}, "text": {"field": "what"}}
    thin = {**at, "color": {"value": QUIET}} if len(runs) == 1 else at
    note = {"align": "right", "dx": -8, "dy": -16, "color": INK, "fontWeight": 600}
    layers = [
        layer(rules, "rule", {"y": y}, strokeDash=[2, 4], color=QUIET),
        layer(rules, "text", name, align="right", dy=-6, color=QUIET, fontSize=11),
        layer(marks, "rule", mark, opacity=0.4),
        layer(marks, "point", {**mark, "y": {"value": 6}}, shape="triangle-down", filled=True, size=90, opacity=0.9),
        layer(train, "line", thin, strokeWidth=1, opacity=0.55, point=_has_single_point(train), clip=True),
        layer(scores, "area", {**at, "y": {**y, "field": "low"}, "y2": {"field": "high"}}, opacity=0.18),
        layer(scores, "line", {**at, "tooltip": _tooltip(".4f")}, strokeWidth=2.5, point={"size": 45, "filled": True}),
        layer(best, "point", at, shape="circle", size=190, strokeWidth=2, filled=False),
        layer(best if len(runs) == 1 else [], "text", {"x": x, "y": y, "text": {"field": "text"}}, **note),
    ]
    return chart(layer=[each for each in layers if each["data"]["values"]], height=340)


def curves(runs: Sequence[Facts], field: str) -> Spec | None:
    """One field of every run's facts over steps: learning_rate, grad_norm (on a logarithmic axis) or speed."""
    rows = _rows(runs, field)
    if not rows:
        return None
    values = [row["value"] for row in rows]
    y = quantity("value", axis={"tickCount": 5, "format": ".5~e" if field == "learning_rate" else "~s"})
    y["scale"]["zero"] = field == "speed"
    if field == "grad_norm" and min(values) > 0:
        y["scale"] = {"type": "log", "nice": False}
        y["axis"] = {"tickCount": 5, "format": "~g"}
    x = _steps(max(row["step"] for row in rows))
    encoding = {"x": x, "y": y, **_by_run(runs, legend=False), "tooltip": _tooltip(".4~g")}
    mark = {"type": "line", "strokeWidth": 1.5, "point": field == "speed" or _has_single_point(rows)}
    return chart(data={"values": rows}, mark=mark, encoding=encoding, height=170)


def _rows(runs: Sequence[Facts], field: str) -> list[Spec]:
    return [
        {"run": facts.name, "step": step, "value": float(f"{value:.6g}")}
        for facts in runs
        for step, value in getattr(facts, field)
    ]


def _has_single_point(rows: list[Spec]) -> bool:
    """Whether a run has one point only, of which a line shows nothing."""
    return 1 in Counter(row["run"] for row in rows).values()


def _steps(last: int) -> Spec:
    whole = "datum.value % 1 ? '' : format(datum.value, ',d')"
    axis = {"tickCount": 8, "labelSeparation": 6, "labelExpr": whole}
    return quantity("step", "step", axis, domain=[0, last], nice=False, padding=8)


def _by_run(runs: Sequence[Facts], legend: bool = True) -> Spec:
    """The channels that tell runs apart: colours and, where these repeat, dashes."""
    if len(runs) == 1:
        return {"color": {"value": SERIES[0]}}
    names = [facts.name for facts in runs]
    columns = max(1, 90 // (max(map(len, names)) + 5))  # of a chart as wide as about 90 characters
    shown = {"title": None, "columns": columns, "labelLimit": 600} if legend else None
    found = {"color": category("run", names, SERIES, shown)}
    if len(runs) > len(SERIES):
        found["strokeDash"] = category("run", names, [dash for dash in DASHES for _ in SERIES], shown)
    return found


def _tooltip(form: str) -> list[dict[str, Any]]:
    step = {"field": "step", "type": "quantitative", "format": ",d"}
    return [{"field": "run"}, step, {"field": "value", "type": "quantitative", "format": form}]
