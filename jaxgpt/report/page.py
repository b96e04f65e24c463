"""Facts and looks to one HTML file that needs nothing else: no network, no other file."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from jaxgpt.display import vega
from jaxgpt.display.markup import Html, data, join, text
from jaxgpt.display.style import Spec
from jaxgpt.report import closeups, sections
from jaxgpt.report.charts import asked
from jaxgpt.report.facts import Facts
from jaxgpt.report.looks import Attention, Looks


def page(runs: Sequence[Facts], looks: Sequence[Looks], charts: dict[str, Spec], refresh: int = 0) -> str:
    """The whole report.

    Args:
      looks: of each run, in the same order.
      charts: as `charts.charts` makes them of both.
      refresh: the page loads itself again after so many seconds; 0: never.
    """
    which = asked(runs, looks)
    closely = looks[which]
    blocks = [data(charts, "charts")]
    if closely.passage:
        passage = closely.passage
        losses, likely = [round(loss, 3) for loss in passage.losses], [_short(each) for each in passage.likely]
        blocks.append(data({"tokens": passage.tokens, "losses": losses, "likely": likely}, "passage-data"))
    if closely.attention:
        blocks.append(data(packed(closely.attention), "attention-data"))
    return Template(_file("page.html")).substitute(
        title=text(sections.title(runs)),
        allowed=" ".join(f"'sha256-{_sha256(script)}'" for script in (vega.script(), _file("page.js"))),
        refresh=f'<meta http-equiv="refresh" content="{int(refresh)}">' if refresh else "",
        css=_file("page.css"),
        body=body(runs, looks, charts, which),
        footer=sections.footer(),
        data=join(*blocks),
        vega=vega.script(),
        script=_file("page.js"),
    )


def body(runs: Sequence[Facts], looks: Sequence[Looks], charts: dict[str, Spec], which: int) -> Html:
    """All of it, the outcome first.

    Args:
      which: the run whose passage, attention and embeddings are shown.
    """
    of = "" if len(runs) == 1 else f": {runs[which].name}"
    closely = looks[which]
    return join(
        sections.head(runs),
        sections.outcome(runs, charts) if len(runs) == 1 else sections.comparison(runs, charts),
        sections.curves(runs, charts),
        closeups.samples(runs, looks),
        closeups.passage(closely, of),
        closeups.attention(closely, of),
        closeups.embedding(closely, charts, of),
        *(sections.what_was_run(each, len(runs) > 1) for each in runs),
        *(sections.diary(each, len(runs) > 1) for each in runs),
        sections.missing(runs, looks),
    )


def packed(attention: Attention) -> dict[str, Any]:
    """Attention as page.js reads it: a byte for each weight up to the diagonal, by layer, head and row."""
    L, H, T, _ = attention.weights.shape
    whole = np.rint(255 * attention.weights).astype(np.uint8)
    weights = whole[:, :, *np.tril_indices(T)].tobytes()
    tokens = attention.tokens
    return {"layers": L, "heads": H, "size": T, "tokens": tokens, "weights": base64.b64encode(weights).decode()}


def _short(likely: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(token, round(chance, 4)) for token, chance in likely]


def _sha256(script: str) -> str:
    """As a Content-Security-Policy names a script: no other one runs, whatever got into the page."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _file(name: str) -> str:
    return resources.files("jaxgpt.report").joinpath(name).read_text("utf-8")
