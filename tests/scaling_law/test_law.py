"""The fit recovers a known law."""

import json
import math

import numpy as np
import pytest

from jaxgpt.config import UsageError
from jaxgpt.scaling_law import law
from jaxgpt.scaling_law.law import Fit, Law, best, fit
from jaxgpt.scaling_law.view import law_chart
from jaxgpt.scaling_law.view import lines as lines_of

TRUE = Law(E=1.1, A=40.0, B=60.0, a=0.42, b=0.31)
N, D = (
    np.repeat(x.ravel(), 2)
    for x in np.meshgrid([9e3, 3e4, 9e4, 2e5, 4.6e5, 1e6], [1.25e5, 2.5e5, 5e5, 1e6, 2e6])
)  # fmt: skip


def points(losses):
    return list(zip(N, D, losses, strict=True))


def test_the_fit_is_exact_without_noise():
    found = fit(points(TRUE.loss(N, D)), resamples=2)
    assert found.law == pytest.approx(TRUE, rel=1e-6)
    assert found.error < 1e-9
    lines = list(lines_of(found, points(N), [1.5e12, 1e12, 1e15]))
    assert lines[-3].startswith("  1.5e+12  "), "a budget is printed as it was given"
    assert lines[-2].startswith("  1e+12")
    assert "extrapolated" not in lines[-2]
    assert lines[-1].endswith(", extrapolated")


def test_the_intervals_contain_the_law_despite_noise():
    noise = np.random.Generator(np.random.Philox(3)).standard_normal(len(N))
    found = fit(points(TRUE.loss(N, D) * np.exp(0.005 * noise)), resamples=60)
    for name, true, low, high in zip(Law._fields, TRUE, *found.interval(lambda law: law), strict=True):
        assert low < true < high, name
        assert high - low < 0.9 * true, "the interval is too wide to show anything"
    assert found.error == pytest.approx(0.005, rel=0.3)
    low, high = found.interval(lambda law: law.optimum(1e13)[0])
    assert low < TRUE.optimum(1e13)[0] < high


def test_an_outlier_moves_the_fit_little():
    losses = TRUE.loss(N, D)
    losses[7] *= 1.5
    assert best(N, D, losses, [(0.3, 0.3)]) == pytest.approx(TRUE, rel=0.05)


def test_the_optimum_has_the_least_loss_for_its_budget():
    size, tokens = TRUE.optimum(1e14)
    assert 6 * size * tokens == pytest.approx(1e14)
    sizes = np.geomspace(size / 10, size * 10, 1001)
    assert sizes[np.argmin(TRUE.loss(sizes, 1e14 / 6 / sizes))] == pytest.approx(size, rel=0.01)


def test_too_few_or_bad_runs_are_refused():
    with pytest.raises(UsageError, match=r"0 runs of 0 sizes"):
        fit([])
    with pytest.raises(UsageError, match=r"5 runs of 5 sizes and 1 amounts"):
        fit([(n, 9, 3.0) for n in range(1, 6)])
    with pytest.raises(UsageError, match="no loss above 0"):
        fit(points(np.where(N > 5e5, np.nan, 3.0)))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (1.5 + 20 / N**0.35 + (1e5 / D) ** 3.2, ["b"]),  # steeper than any exponent of the fit
        (40 / N**0.42 + 60 / D**0.31, ["E"]),  # without an irreducible loss
    ],
    ids=["steep", "endless"],
)
def test_a_coefficient_that_the_runs_do_not_determine_is_marked(losses, expected):
    found = {line.split()[0]: line for line in lines_of(fit(points(losses), resamples=2), points(losses), [1e12])}
    marked = [name for name in Law._fields if "at a bound of the fit" in found[name]]
    assert marked == expected


def test_optimum_beyond_the_runs_is_marked():
    """The optimum of a budget within those of the runs may need more tokens than any run had."""
    found = fit(points(TRUE.loss(N, D)), resamples=2)
    near, far = list(lines_of(found, points(N), [1e11, 1e12]))[-2:]
    assert TRUE.optimum(1e11)[1] < 2e6 < TRUE.optimum(1e12)[1]
    assert far.endswith(", beyond the sizes or tokens of the runs")
    assert "beyond" not in near


def test_resampled_residuals_are_centred_and_scaled_for_the_five_coefficients(monkeypatch):
    seen, residuals = [], np.linspace(-0.02, 0.05, 10)
    found = Law(2.0, 0.0, 0.0, 1.0, 1.0)
    monkeypatch.setattr(law, "best", lambda N, D, losses, starts: seen.append(losses) or found)
    fit([(10 + i, 100 + i, 2 * float(np.exp(residual))) for i, residual in enumerate(residuals)])
    drawn = {round(float(x), 9) for x in np.log(np.stack(seen[1:]) / 2).ravel()}
    assert drawn == {round(float(x), 9) for x in (residuals - residuals.mean()) * math.sqrt(10 / 5)}


def test_two_amounts_of_tokens_are_too_few():
    with pytest.raises(UsageError, match="6 runs of 3 sizes and 2 amounts of tokens"):
        fit([(N, D, 3.0) for N in (10, 20, 30) for D in (100, 200)])


SPREAD = Fit(TRUE, tuple(TRUE._replace(E=1 + i / 100, B=TRUE.B + i / 10) for i in range(101)), 0.005)
"""The true law, with laws around it."""


def test_the_written_intervals_hold_nine_tenths_of_the_laws_and_the_runs_are_named():
    written = json.loads(SPREAD.to_json([(10, 20, 3.0)]))
    assert written["intervals_90%"]["E"] == pytest.approx([1.05, 1.95])
    assert written["intervals_90%"]["B"] == pytest.approx([60.5, 69.5])
    assert written["law"] == TRUE._asdict()
    assert written["runs"] == [{"N": 10, "D": 20, "loss": 3.0}]
    assert written["error"] == 0.005


def test_the_line_of_a_budget_has_the_best_size_its_interval_and_its_loss():
    size, tokens = TRUE.optimum(1e12)
    low, high = sorted(SPREAD.resampled[i].optimum(1e12)[0] for i in (5, 95))
    *_, line = lines_of(SPREAD, points(N), [1e12])
    found = f"{size:,.0f} parameters ({low:,.0f} to {high:,.0f}), {tokens:,.0f} tokens"
    assert " ".join(line.split()).startswith(f"1e+12 {found}, loss {TRUE.loss(size, tokens):.3f}")


def test_the_chart_of_a_law_has_its_curves_its_runs_and_the_band_of_the_least_loss():
    runs = [(int(n), int(d), loss) for n, d, loss in points(TRUE.loss(N, D) + 0.01)]
    curves, measured, band, least, *_ = law_chart(SPREAD, runs)["layer"]
    for row in curves["data"]["values"][::20]:
        size = int(row["N"].replace(",", ""))
        assert row["loss"] == pytest.approx(TRUE.loss(size, row["flops"] / 6 / size), rel=1e-4)
    expected = [(f"{n:,}", 6 * n * d, loss) for n, d, loss in runs]
    found = [tuple(row.values()) for row in measured["data"]["values"]]
    assert [name for name, *_ in found] == [name for name, *_ in expected]
    assert [figures for _, *figures in found] == [pytest.approx(figures, rel=1e-4) for _, *figures in expected]
    for row in band["data"]["values"]:
        assert row["best"] == pytest.approx(TRUE.loss(*TRUE.optimum(row["flops"])), rel=1e-4)
        low, high = (SPREAD.resampled[i].loss(*SPREAD.resampled[i].optimum(row["flops"])) for i in (5, 95))
        assert (row["loss"], row["high"]) == pytest.approx((low, high), rel=1e-4)
    assert (band["encoding"]["y"]["field"], band["encoding"]["y2"]) == ("loss", {"field": "high"})
    assert least["encoding"]["y"]["field"] == "best"
