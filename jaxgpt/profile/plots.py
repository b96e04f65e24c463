"""Charts of a report of `ledger` and of the roofline of `inspect`."""

from jaxgpt.display.charts import INK, QUIET, Spec, category, chart, columns, label, layer, quantity, ticks
from jaxgpt.profile.ledger import JIT, STAGES
from jaxgpt.profile.report import Report

COLOURS = ("#0072b2", "#b87d00", "#009e73", "#b0568a", "#2f8fc4", "#d55e00", "#6a6a6a", "#000000")
"""The palette of Okabe and Ito (2008), for colour-blind readers, dark enough for white digits."""


def ledger(report: Report) -> Spec:
    """For each variant: its stages up to the first step, and its steady step, from the shortest to the longest."""
    figures, rates = report["figures"], report["steps_per_second"]
    names = list(figures)
    stages = [
        {"variant": name, "stage": stage, "order": i, "seconds": figures[name]["stages"][stage]["median"]}
        for name in names
        for i, stage in enumerate(STAGES)
        if stage in figures[name]["stages"]
    ]
    totals = [
        {"variant": name, "seconds": sum(row["seconds"] for row in stages if row["variant"] == name)} for name in names
    ]
    y: Spec = {"field": "variant", "type": "nominal", "sort": names, "title": None}
    bold = {"condition": {"test": f"datum.value === '{JIT}'", "value": "bold"}, "value": "normal"}
    named = {"labelFontWeight": bold, "labelLimit": 300, "ticks": False, "domain": False, "labelColor": INK}
    color = category("stage", list(STAGES), COLOURS, {"title": None})
    x = quantity("seconds", "seconds until the first step is done", zero=True)
    text = {"field": "seconds", "type": "quantitative", "format": ".1f"}
    order = {"field": "order", "type": "quantitative"}
    first = [
        layer(stages, "bar", {"x": x, "y": {**y, "axis": named}, "color": color, "order": order}, height={"band": 0.7}),
        layer(totals, "text", {"x": x, "y": {**y, "axis": named}, "text": text}, align="left", dx=5, color=INK),
    ]
    steady = []
    for name in names:
        times = sorted(1e3 / rate for rate in rates[name])
        middle = times[len(times) // 2]
        shown = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
        steady.append({"variant": name, "low": times[0], "middle": middle, "high": times[-1], "text": shown})
    low, high = min(row["low"] for row in steady), max(row["high"] for row in steady)
    domain = [low / 1.3, high * (high / low) ** 0.15 * 1.2]
    axis = {"values": ticks(*domain), "labelExpr": "format(datum.value, ',~g')"}
    x = quantity(
        "low", "ms of each step after it: median, least to greatest", axis, type="log", domain=domain, nice=False
    )
    y = {**y, "axis": {"labels": False, "ticks": False, "domain": False}}
    then = [
        layer(steady, "rule", {"x": x, "x2": {"field": "high"}, "y": y}, strokeWidth=3, color=QUIET, opacity=0.7),
        layer(steady, "point", {"x": {**x, "field": "middle"}, "y": y}, filled=True, size=60, opacity=1, color=INK),
        layer(
            steady,
            "text",
            {"x": {**x, "field": "high"}, "y": y, "text": {"field": "text"}},
            align="left",
            dx=6,
            color=INK,
        ),
    ]
    panels = [{"width": 400, "height": {"step": 32}, "layer": layers} for layers in (first, then)]
    return chart(hconcat=panels, title=report["tables"][0]["title"].partition(":")[0])


def roofline(report: Report) -> Spec:
    """The speed of each part against its FLOPs per byte, under the roof: circles forward, squares with the backward
    pass, numbered as in the legend."""
    found, title = report["roofline"], report["mode"].removeprefix("inspecting ")
    peak, bandwidth, works = found["peak_flops"], found["bandwidth"], found["works"]
    parts = list(dict.fromkeys(work["part"] for work in works))
    names = {part: f"{i}  {part}" for i, part in enumerate(parts, 1)}
    points = [
        {
            "part": names[work["part"]],
            "number": names[work["part"]].split()[0],
            "training": work["training"],
            "intensity": work["flops"] / work["bytes"],
            "rate": work["flops"] / work["seconds"] / 1e9,
        }
        for work in works
    ]
    ridge, top, across = peak / bandwidth, peak / 1e9, [point["intensity"] for point in points]
    low, high = min(ridge / 10, *across) / 1.6, max(ridge * 10, *across) * 1.6
    bottom = min(low / ridge * top, *(point["rate"] for point in points)) / 1.3
    axis = {"labelExpr": "format(datum.value, ',~g')"}
    x = quantity(
        "intensity", "FLOPs per byte of compulsory memory traffic", {**axis, "values": ticks(low, high)},
        type="log", domain=[low, high], nice=False,
    )  # fmt: skip
    y = quantity(
        "rate", "GFLOP/s", {**axis, "values": ticks(bottom, 2 * top)}, type="log", domain=[bottom, 2 * top], nice=False
    )
    color = category("part", list(names.values()), COLOURS, {"title": None, "orient": "right", "labelLimit": 300})
    roof = columns(intensity=[low, ridge, high], rate=[low / ridge * top, top, top])
    forward, training = ([point for point in points if point["training"] is each] for each in (False, True))
    number = {"x": x, "y": y, "text": {"field": "number"}}
    layers = [
        layer([{}], "rule", {"x": {"datum": ridge, "type": "quantitative"}}, color=QUIET, strokeDash=[6, 4]),
        layer(roof, "line", {"x": x, "y": y}, color=INK),
        layer(forward, "point", {"x": x, "y": y, "color": color}, filled=True, size=200, opacity=1),
        layer(
            training, "square", {"x": x, "y": y, "stroke": {**color, "legend": None}}, fill="white", size=200, opacity=1
        ),
        layer(forward, "text", number, color="white", fontSize=10, fontWeight="bold", dy=0.5),
        layer(training, "text", {**number, "color": {**color, "legend": None}}, fontSize=10, fontWeight="bold", dy=0.5),
    ]
    slope = {"datum": low * 1.4, "type": "quantitative"}, {"datum": low * 1.4 / ridge * top, "type": "quantitative"}
    floor = {"datum": ridge, "type": "quantitative"}, {"value": 412}
    layers += [
        label(
            f"matmuls: {top:,.0f} GFLOP/s", {"value": 598}, {"datum": top, "type": "quantitative"}, align="right", dy=-8
        ),
        label(f"memory: {bandwidth / 1e9:.1f} GB/s", *slope, align="left", dx=10, dy=8),
        label(f"ridge: {ridge:.1f}", *floor, align="left", dx=5),
    ]
    title = f"{title}: circles forward, squares with the backward pass"
    return chart(layer=layers, title=title, width=600, height=420)
