"""The charts of a report. Their colours are the page's CSS variables, so that they follow its theme."""

import math
from collections.abc import Sequence
from typing import Any

from jaxgpt.diagnostics.plots import attention_maps
from jaxgpt.display.baselines import published
from jaxgpt.display.charts import ACCENT, INK, MONO, QUIET, SERIES, WARM, Spec, category, chart, layer, quantity
from jaxgpt.display.text import visible
from jaxgpt.monitor.curves import ZOOM, curves, loss
from jaxgpt.monitor.facts import Facts
from jaxgpt.report.looks import Attention, Embedding, Looks

MAPPED = 30_000
"""Weights in a picture of attention, at most."""
LIMITS = {"uniform": "uniform", "unigram": "unigram counts", "bigram": "bigram counts"}


def charts(runs: Sequence[Facts], looks: Sequence[Looks]) -> dict[str, Spec]:
    """Every chart that there is data for, by its name.

    Args:
      looks: of each run, in the same order.
    """
    found = {"outcome": outcome(runs, looks), "loss": loss(runs, limits(runs, looks))}
    found |= {name: curves(runs, name) for name in ("learning_rate", "grad_norm", "speed")}
    if embedding := looks[chosen(runs, looks)].embedding:
        found["embedding"] = plane(embedding)
    return {name: spec for name, spec in found.items() if spec}


def chosen(runs: Sequence[Facts], looks: Sequence[Looks]) -> int:
    """The run whose weights are shown: the lowest bits per byte among those that have weights."""
    best = [facts.best.bits_per_byte if facts.best else math.inf for facts in runs]
    return min(range(len(runs)), key=lambda i: (looks[i].embedding is None, best[i]))


def same_tokens(runs: Sequence[Facts]) -> bool:
    return len({facts.corpus["sha256"] for facts in runs}) == 1


def limits(runs: Sequence[Facts], looks: Sequence[Looks]) -> list[tuple[str, float]]:
    """(name, nats per token) of the n-gram baselines, if all runs learn from the same tokens."""
    known = next((look.limits for look in looks if look.limits), None)
    return [(LIMITS[name], value) for name, value in vars(known).items()] if known and same_tokens(runs) else []


def outcome(runs: Sequence[Facts], looks: Sequence[Looks]) -> Spec | None:
    """The best loss of each run beside the n-gram baselines and published figures."""
    rows: list[Spec] = []
    for facts in runs:
        if facts.best:
            error = facts.best.standard_error or 0
            ends = {"low": facts.best.loss - error, "high": facts.best.loss + error}
            rows.append({"what": facts.name, "loss": facts.best.loss, "kind": "run", **ends})
    rows += [{"what": name, "loss": value, "kind": "limit"} for name, value in limits(runs, looks)]
    if same_tokens(runs):
        rows += [{"what": name, "loss": value, "kind": "published"} for name, value in published(runs[0].corpus)]
    if not rows:
        return None
    rows.sort(key=lambda row: -row["loss"])
    y: Spec = {"field": "what", "type": "nominal", "sort": [row["what"] for row in rows], "title": None}
    y["axis"] = {"labelLimit": 220, "ticks": False, "domain": False, "grid": True}
    x = quantity("loss", "nats per token", {"tickCount": 6}, padding=30)
    color = category("kind", ["run", "limit", "published"], (ACCENT, QUIET, WARM))
    tooltip = [{"field": "what", "title": "what"}, {"field": "loss", "format": ".4f", "title": "nats per token"}]
    text = {"x": x, "text": {"field": "loss", "format": ".3f"}, "color": {"value": INK}}
    marks: list[tuple[dict[str, Any], Spec]] = [
        ({"type": "rule", "strokeWidth": 3, "opacity": 0.4}, {"x": {**x, "field": "low"}, "x2": {"field": "high"}}),
        ({"type": "point", "filled": True, "size": 110, "opacity": 1}, {"x": x, "tooltip": tooltip}),
        ({"type": "text", "align": "left", "dx": 9, "dy": -1}, text),
    ]
    return chart(
        layer=[{"mark": mark, "encoding": encoding} for mark, encoding in marks],
        data={"values": rows},
        encoding={"y": y, "color": color},
        height=26 * len({row["what"] for row in rows}),
    )


def plane(embedding: Embedding) -> Spec:
    """Tokens at the two principal components of their embeddings."""
    first, second = embedding.shares
    rows = [
        {"token": visible(token)[:12], "x": round(float(x), 4), "y": round(float(y), 4), "kind": kind(token)}
        | {"near": ", ".join(visible(name)[:12] for name, _ in near)}
        for token, (x, y), near in zip(embedding.tokens, embedding.points, embedding.near, strict=True)
    ]
    axis = {"labels": False, "ticks": False, "grid": False}
    encoding: Spec = {
        "x": quantity("x", f"first, {first:.0%} of variance", axis, zero=True),
        "y": quantity("y", f"second, {second:.0%}", axis, zero=True),
        "text": {"field": "token"},
        "color": category("kind", list(KINDS), SERIES, {"columns": 3, "title": None}),
        "tooltip": [{"field": "token", "title": "token"}, {"field": "near", "title": "nearest"}],
    }
    words = layer(rows, "text", encoding, fontSize=15, fontWeight=500, font=MONO, clip=True)
    return chart(**words, params=[ZOOM], height=420)


KINDS = ("vowels", "other letters", "capitals", "digits", "the rest")


def kind(token: str) -> str:
    """Which of KINDS a token is.

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
    """Attention by layer and head, for files: the page draws it by itself."""
    L, H, T, _ = attention.weights.shape
    T = min(T, int((2 * MAPPED / (L * H)) ** 0.5))
    return chart(hconcat=[attention_maps(attention.weights[:, :, :T, :T])])
