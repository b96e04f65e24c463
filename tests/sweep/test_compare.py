"""Means, standard errors and intervals of differences, against values computed by hand."""

import math
import sys

import numpy as np
import pytest

from jaxgpt.sweep.grid import describe
from jaxgpt.sweep.program import Score
from jaxgpt.sweep.results import difference, outcomes
from jaxgpt.sweep.view import charts, progress, table, verdict


def score(rate, seed, step, loss, done=False):
    return Score(0, {"learning_rate": rate}, seed, step, loss, None, None, None, None, loss is None, done)


SCORES = [
    score(rate, seed, step, loss + (1 if step == 0 else 0), done=step == 10)
    for rate, losses in ((1e-3, (2.0, 2.2, 2.4)), (1e-2, (1.9, 2.1, 2.3)), (1e-1, (1.0, 1.0, None)))
    for seed, loss in enumerate(losses)
    for step in (0, 10)
    if loss is not None
] + [score(1e-1, 2, 5, None, done=True)]


def test_the_best_comes_first_and_diverged_settings_last():
    best, other, lost = outcomes(SCORES)
    assert [o.setting["learning_rate"] for o in (best, other, lost)] == [1e-2, 1e-3, 1e-1]
    assert best.mean == pytest.approx(2.1)
    assert best.standard_error == pytest.approx(0.2 / math.sqrt(3))
    assert best.curve == [pytest.approx((0, 3.1, 0.2 / math.sqrt(3))), pytest.approx((10, 2.1, 0.2 / math.sqrt(3)))]
    assert (lost.diverged, best.diverged) == (1, 0)
    assert math.isnan(lost.mean)


def outcome(rate, losses):
    return outcomes([score(rate, seed, 1, loss, True) for seed, loss in enumerate(losses)])[0]


def test_the_difference_is_paired_by_seed_and_has_a_t_interval():
    """Differences 0.1 and 0.3. With one degree of freedom, Student's t is Cauchy's, whose quantile is a tangent."""
    best, other = outcome(1, (1.0, 2.0)), outcome(2, (1.1, 2.3))
    for settings, pairs in ((2, 1), (8, 28)):
        mean, n, interval = difference(best, other, settings)
        margin = 0.1 * math.tan(math.pi * (0.5 - 0.05 / pairs / 2))
        assert (mean, n) == (pytest.approx(0.2), 2)
        assert interval == pytest.approx((0.2 - margin, 0.2 + margin))
    mean, _, interval = difference(best, outcome(3, (2.0, 1.0)))
    assert mean == 0.0
    assert interval == pytest.approx((-math.tan(math.pi * 0.475), math.tan(math.pi * 0.475)))
    assert difference(best, outcome(4, (1.5, 2.5)))[2] == pytest.approx((0.5, 0.5)), (
        "the same difference with every seed"
    )
    assert difference(outcome(1, (1.0, 2.0, 3.0)), other)[:2] == (pytest.approx(0.2), 2), "of the seeds that both have"


def test_interval_does_not_import_scipy_stats(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)  # its import takes half a second
    assert difference(outcome(1, (1.0, 2.0)), outcome(2, (1.1, 2.3)))[2]


def test_progress_is_one_line():
    found = [score(1e-3, 0, 500, 2.5), score(1e-3, 1, 500, None, done=True)]
    assert progress(found, 3) == "2 of 3 members: step 500, validation losses 2.5000, 1 diverged"
    assert progress(found[:1], 1).startswith("1 of 1 member: ")
    assert progress(found[1:], 3).endswith("validation losses none is finite, 1 diverged")


def test_a_single_seed_has_no_interval():
    single = outcome(1, (1.0,))
    assert math.isnan(single.standard_error)
    assert difference(single, outcome(2, (1.1, 2.3))) == (pytest.approx(0.1), 1, None)


def test_the_interval_is_corrected_for_the_choice_of_the_best():
    """8 equal settings with 4 seeds: at most 5% of sweeps may have an interval without 0."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        best, *others = sorted((outcome(i, rng.normal(2.0, 0.1, 4)) for i in range(8)), key=lambda o: o.mean)
        wrong += any(difference(best, other, 8)[2][0] > 0 for other in others)
    assert wrong / 400 <= 0.05


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([(2.0, 2.2), (2.1, 2.3)], "the next, learning_rate 1, is 0.1000 higher (95% interval 0.1000 to 0.1000: "),
        ([(2.0, 2.2), (2.1, 2.5)], "0.2000 higher (95% interval -1.0706 to 1.4706: Student's t, 2 seeds paired); 0 is"),
        (
            [(2.0, 2.2), (2.1, 2.5), (3.0, 3.0)],
            "Bonferroni over 3 pairs of settings",
        ),
        (
            [(2.0,), (2.1,)],
            "is 0.1000 higher; one seed gives no interval and does not show that it is worse: --seeds 4 --name OTHER",
        ),
        ([(2.0, 2.2), (1.0, None)], "; the next, learning_rate 1, diverged with 1 of 2 seeds"),
        ([(2.0, None), (None, 1.0)], "every setting diverged with at least one seed"),
    ],
)
def test_the_verdict_claims_no_more_than_the_seeds_show(losses, message):
    scores = [score(i, seed, 1, loss, True) for i, each in enumerate(losses) for seed, loss in enumerate(each)]
    found = verdict(outcomes(scores))
    assert message in found


def test_close_settings_have_distinct_names_and_curves():
    settings = [{"beta2": beta} for beta in (0.9999991, 0.9999995, 1e-5, 2.0)]
    assert [describe(each) for each in settings] == ["beta2 0.9999991", "beta2 0.9999995", "beta2 1e-05", "beta2 2"]
    found = outcomes([Score(0, each, 0, step, 3.0, *(None,) * 4, False, True) for each in settings for step in (1, 2)])
    scale = charts(found)["curves.png"]["layer"][1]["encoding"]["color"]["scale"]
    assert len(set(scale["domain"])) == 4, "each has a curve"


def test_a_diverged_setting_is_last_also_if_it_was_trained_first():
    found = outcomes(sorted(SCORES, key=lambda score: -score.setting["learning_rate"]))
    assert [each.setting["learning_rate"] for each in found] == [1e-2, 1e-3, 1e-1]


def test_the_table_has_the_figures_of_each_setting_in_its_row():
    header, *rows = table(outcomes(SCORES)).splitlines()
    assert header == "learning_rate   seeds   validation loss   ± s.e.   diverged"
    assert [row.split() for row in rows] == [
        ["0.01", "3", "2.1000", "0.1155"],
        ["0.001", "3", "2.2000", "0.1155"],
        ["0.1", "3", "-", "-", "1"],
    ]
    assert {len(row) for row in rows} == {len(header)}, "aligned"


def test_the_interval_of_the_verdict_is_corrected_for_the_number_of_settings():
    scores = [score(i, seed, 1, 2.0 + i * (1 + 2 * seed) / 10, True) for i in range(3) for seed in range(2)]
    margin = 0.1 * math.tan(math.pi * (0.5 - 0.05 / 3 / 2))
    assert f"is 0.2000 higher (95% interval {0.2 - margin:.4f} to {0.2 + margin:.4f}: " in verdict(outcomes(scores))


def test_the_verdict_counts_the_seeds_of_the_setting_that_diverged():
    scores = [score(1, seed, 1, 2.0, True) for seed in range(2)] + [score(2, i, 1, None, True) for i in range(3)]
    assert verdict(outcomes(scores)).endswith("learning_rate 2, diverged with 3 of 3 seeds")


def rows_of(part):
    """The rows of bars, of lines and of points, each with the fields of its y."""
    found = {}
    for layer in part["layer"]:
        encoding = layer["encoding"]
        found[layer["mark"]["type"]] = layer["data"]["values"], encoding["y"]["field"], encoding.get("y2")
    return found


def test_the_chart_of_settings_has_error_bars_and_a_line_through_the_best_of_each_value():
    """Two widths and two depths: the mean over three seeds is 3 for the best and 6 for the worst, its error 1."""
    settings = [{"n_embd": n, "n_layer": i} for n in (16, 32) for i in (1, 2)]
    found = outcomes(
        Score(0, each, seed, 1, 3.0 + i + (seed - 1) * math.sqrt(3), *(None,) * 4, False, True)
        for i, each in enumerate(settings)
        for seed in range(3)
    )
    panel = charts(found)["settings.png"]["hconcat"][0]
    (bars, low, high), (line, *_), (points, at, _) = (rows_of(panel)[mark] for mark in ("rule", "line", "point"))
    assert (low, high, at) == ("low", {"field": "high"}, "loss")
    expected = [(16, 3.0, 2.0, 4.0), (16, 4.0, 3.0, 5.0), (32, 5.0, 4.0, 6.0), (32, 6.0, 5.0, 7.0)]
    assert [tuple(row.values()) for row in points] == [pytest.approx(row, rel=1e-4) for row in expected]
    assert bars == points
    assert {row["x"]: round(row["loss"], 4) for row in line} == {16: 3.0, 32: 5.0}
    low, high = panel["layer"][2]["encoding"]["y"]["scale"]["domain"]
    assert low < 3.0 < 6.0 < high


def test_the_chart_of_curves_has_a_line_for_each_setting():
    found = outcomes(SCORES[:12])
    points, field, _ = rows_of(charts(found)["curves.png"])["point"]
    assert field == "loss"
    curves = [("learning_rate 0.01", 0, 3.1), ("learning_rate 0.01", 10, 2.1)]
    curves += [("learning_rate 0.001", 0, 3.2), ("learning_rate 0.001", 10, 2.2)]
    assert [(row["line"], row["x"], round(row["loss"], 4)) for row in points] == curves
