"""The charts of `ledger`, and the roofline of `inspect`."""

from jaxgpt.config import UsageError
from jaxgpt.display.charts import INK, PALETTE, QUIET, Spec, category, chart, columns, label, layer, quantity
from jaxgpt.profile.ledger import STAGES
from jaxgpt.profile.report import Report
from jaxgpt.profile.roofline import pass_of
from jaxgpt.profile.timing import series


def ledger(report: Report) -> Spec:
    """For each variant: its stages until the first step is done, and the time of later steps with its range."""
    figures, rates = report["figures"], report["steps_per_second"]
    first = [
        {"variant": name, "stage": stage, "order": i, "seconds": seconds}
        for name, found in figures.items()
        for i, (stage, seconds) in enumerate(found["stages"].items())
    ]
    steady = [{"variant": name, **series([1e3 / rate for rate in found])} for name, found in rates.items()]
    y: Spec = {"field": "variant", "type": "nominal", "sort": list(figures), "title": None}
    bars = {
        "x": quantity("seconds", "seconds until the first step is done", zero=True),
        "y": {**y, "axis": {"labelLimit": 300, "ticks": False, "domain": False, "labelColor": INK}},
        "color": category("stage", list(STAGES), PALETTE, {"title": None}),
        "order": {"field": "order", "type": "quantitative"},
    }
    y |= {"axis": {"labels": False, "ticks": False, "domain": False}}
    ends = [min(row["low"] for row in steady) / 1.3, max(row["high"] for row in steady) * 1.3]
    axis = {"tickCount": 5, "format": ",~g"}
    x = quantity(
        "low", "ms of each step after it: median, minimum to maximum", axis, type="log", domain=ends, nice=False
    )
    steps = [
        layer(steady, "rule", {"x": x, "x2": {"field": "high"}, "y": y}, strokeWidth=3, color=QUIET, opacity=0.7),
        layer(steady, "point", {"x": {**x, "field": "median"}, "y": y}, filled=True, size=60, opacity=1, color=INK),
    ]
    size: Spec = {"width": 400, "height": {"step": 32}}
    stages = layer(first, "bar", bars, height={"band": 0.7})
    return chart(hconcat=[{**size, "layer": [stages]}, {**size, "layer": steps}], title=report["mode"])


def roofline(report: Report) -> Spec:
    """FLOP/s of each part against its FLOPs per byte, under the roof: circles forward, squares backward, diamonds
    neither, with the numbers of the legend. Raises a UsageError if the profile has no part."""
    found = report["roofline"]
    peak, bandwidth = found["peak_flops"] / 1e9, found["bandwidth"] / 1e9
    parts = [part for part in found["parts"] if part["flops"] and part["seconds"]]
    if not parts:
        raise UsageError("--roofline has nothing to draw: JAX's profiler reported no operation of the step")
    names = {name: f"{i}  {name}" for i, name in enumerate(dict.fromkeys(part["name"] for part in parts), 1)}
    points = [
        {
            "part": names[part["name"]],
            "number": names[part["name"]].split()[0],
            "pass": pass_of(part["name"], part["backward"]) or "neither",
            "intensity": part["flops"] / part["bytes"],
            "rate": part["flops"] / part["seconds"] / 1e9,
        }
        for part in parts
    ]
    ridge, across = peak / bandwidth, [point["intensity"] for point in points]
    low, high = min(ridge / 10, *across) / 1.6, max(ridge * 10, *across) * 1.6
    bottom = min(low * bandwidth, *(point["rate"] for point in points)) / 1.3

    def log(field: str, title: str, *ends: float) -> Spec:
        axis = {"tickCount": 5, "format": ",~g"}
        return quantity(field, title, axis, type="log", domain=list(ends), nice=False)

    at = {
        "x": log("intensity", "FLOPs per byte of memory traffic", low, high),
        "y": log("rate", "GFLOP/s", bottom, max(2 * peak, *(point["rate"] for point in points))),
    }
    color = category("part", list(names.values()), PALETTE, {"title": None, "orient": "right", "labelLimit": 300})
    shape = category("pass", ["forward", "backward", "neither"], ("circle", "square", "diamond"))
    roof = columns(intensity=[low, ridge, high], rate=[low * bandwidth, peak, peak])
    text = f"{peak:,.0f} GFLOP/s of matmuls, {bandwidth:.1f} GB/s of memory, ridge at {ridge:.1f}"
    layers = [
        layer(roof, "line", at, color=INK),
        layer(points, "point", {**at, "color": color, "shape": shape}, size=200, opacity=1, fill="white"),
        layer(points, "text", {**at, "text": {"field": "number"}}, color=INK, fontSize=10, fontWeight="bold"),
        label(text, 592, 410),
    ]
    title = f"{report['mode']}: circles forward, squares backward, diamonds neither"
    return chart(layer=layers, title=title, width=600, height=420)
