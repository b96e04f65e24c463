"""The charts of a report, in the colours of the page's theme."""

import math
from collections.abc import Sequence

from jaxgpt.display.charts import Spec, dots
from jaxgpt.monitor.curves import curves, loss
from jaxgpt.monitor.facts import Facts
from jaxgpt.report.looks import Looks


def charts(runs: Sequence[Facts], looks: Sequence[Looks]) -> dict[str, Spec]:
    """Every chart that there is data for, by its name. The looks are those at each run, in the same order."""
    found = {"outcome": outcome(runs, looks), "loss": loss(runs, baselines(runs, looks))}
    found |= {name: curves(runs, name) for name in ("learning_rate", "grad_norm", "speed")}
    return {name: spec for name, spec in found.items() if spec}


def chosen(runs: Sequence[Facts], looks: Sequence[Looks]) -> int:
    """The index of the run whose weights are shown: of the runs with weights, that of the fewest bits per byte."""
    best = [facts.best.evaluation.bits_per_byte if facts.best else math.inf for facts in runs]
    return min(range(len(runs)), key=lambda i: (looks[i].passage is None, best[i]))


def same_tokens(runs: Sequence[Facts]) -> bool:
    """Whether all runs learn from the same tokens, and are evaluated on the same."""
    return len({(facts.corpus["sha256"], facts.held_out) for facts in runs}) == 1


def baselines(runs: Sequence[Facts], looks: Sequence[Looks]) -> list[tuple[str, float]]:
    """(name, nats per token) of the n-gram baselines, if all runs have the same tokens."""
    known = next((look.ngrams for look in looks if look.ngrams), {})
    return list(known.items()) if same_tokens(runs) else []


def outcome(runs: Sequence[Facts], looks: Sequence[Looks]) -> Spec | None:
    """The best loss of each run beside the n-gram baselines; bits per byte if tokens differ."""
    rows: list[Spec] = []
    same = same_tokens(runs)
    for facts in runs:
        if facts.best:
            best = facts.best.evaluation
            loss = best.loss if same else best.bits_per_byte
            error = 0.0 if math.isnan(best.standard_error) else best.standard_error * loss / (best.loss or 1)
            rows.append({"what": facts.name, "loss": loss, "kind": "run", "low": loss - error, "high": loss + error})
    rows += [{"what": name, "loss": value, "kind": "baseline"} for name, value in baselines(runs, looks)]
    rows.sort(key=lambda row: -row["loss"])
    return dots(rows, ["run", "baseline"], "nats per token" if same else "bits per byte") if rows else None
