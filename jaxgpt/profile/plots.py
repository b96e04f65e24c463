"""The charts of `ledger`, and the roofline of `inspect`."""

from jaxgpt.config import UsageError
from jaxgpt.display.charts import INK, PALETTE, QUIET, Spec, category, chart, columns, label, layer, quantity
from jaxgpt.profile.ledger import STAGES, rows
from jaxgpt.profile.report import Report


def ledger(report: Report) -> Spec:
    """For each variant: its stages until the first step is done, and the time of later steps with its range."""
    figures = report["figures"]
    first = [
        {"variant": name, "stage": stage, "order": i, "seconds": seconds}
        for name, found in figures.items()
        for i, (stage, seconds) in enumerate(found["stages"].items())
    ]
    steady = [{"variant": row["variant"], **row["steady, ms"]} for row in rows(figures)[1]]
    y: Spec = {"field": "variant", "type": "nominal", "sort": list(figures), "title": None}
    bars = {
        "x": quantity("seconds", "seconds until the first step is done", zero=True),
        "y": {**y, "axis": {"labelLimit": 300, "ticks": False, "domain": False, "labelColor": INK}},
        "color": category("stage", list(STAGES), PALETTE, {"title": None}),
        "order": {"field": "order", "type": "quantitative"},
    }
    y["axis"] = {"labels": False, "ticks": False, "domain": False}
    axis, title = {"tickCount": 5, "format": ",~g"}, "ms of each step after it: median, minimum to maximum"
    x = quantity("low", title, axis, type="log", nice=False, padding=20)
    steps = [
        layer(steady, "rule", {"x": x, "x2": {"field": "high"}, "y": y}, strokeWidth=3, color=QUIET, opacity=0.7),
        layer(steady, "point", {"x": {**x, "field": "median"}, "y": y}, filled=True, size=60, opacity=1, color=INK),
    ]
    stages, size = layer(first, "bar", bars, height={"band": 0.7}), {"width": 400, "height": {"step": 32}}
    return chart(hconcat=[{**size, "layer": [stages]}, {**size, "layer": steps}], title=report["mode"])


def roofline(report: Report) -> Spec:
    """FLOP/s of each part against its FLOPs per byte, under the roof: circles forward, squares backward, diamonds
    neither, with the numbers of the legend. Raises a UsageError if the profile has no part."""
    peak, bandwidth, rows = (report["roofline"][name] for name in ("peak, GFLOP/s", "bandwidth, GB/s", "rows"))
    rows = [row for row in rows if row["MFLOP"]]
    if not rows:
        raise UsageError("--roofline has nothing to draw: JAX's profiler reported no operation of the step")
    names = {name: f"{i}  {name}" for i, name in enumerate(dict.fromkeys(row["part"] for row in rows), 1)}
    points = [
        {**row, "part": names[row["part"]], "number": names[row["part"]].split()[0], "pass": row["pass"] or "neither"}
        for row in rows
    ]
    ridge, across = peak / bandwidth, [row["FLOP/byte"] for row in rows]
    low, high = min(ridge / 10, *across) / 1.6, max(ridge * 10, *across) * 1.6
    roof = columns(**{"FLOP/byte": [low, ridge, high], "GFLOP/s": [low * bandwidth, peak, peak]})
    log: Spec = {"axis": {"tickCount": 5, "format": ",~g"}, "type": "log", "nice": False}
    at = {
        "x": quantity("FLOP/byte", "FLOPs per byte of memory traffic", **log),
        "y": quantity("GFLOP/s", "GFLOP/s", **log, padding=20),
    }
    color = category("part", list(names.values()), PALETTE, {"title": None, "orient": "right", "labelLimit": 300})
    shape = category("pass", ["forward", "backward", "neither"], ("circle", "square", "diamond"))
    text = f"{peak:,.0f} GFLOP/s of matmuls, {bandwidth:.1f} GB/s of memory, ridge at {ridge:.1f}"
    layers = [
        layer(roof, "line", at, color=INK),
        layer(points, "point", {**at, "color": color, "shape": shape}, size=200, opacity=1, fill="white"),
        layer(points, "text", {**at, "text": {"field": "number"}}, color=INK, fontSize=10, fontWeight="bold"),
        label(text, 592, 410),
    ]
    title = f"{report['mode']}: circles forward, squares backward, diamonds neither"
    return chart(layer=layers, title=title, width=600, height=420)
