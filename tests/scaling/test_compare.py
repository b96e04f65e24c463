"""Means, standard errors and how sure the best is, against figures by hand."""

import math

import pytest

from jaxgpt.scaling.compare import confidence, outcomes


def line(rate, seed, step, loss, done=False):
    return dict(setting={"learning_rate": rate}, seed=seed, step=step, val_loss=loss, done=done)


LINES = [
    line(rate, seed, step, loss + (1 if step == 0 else 0), done=step == 10)
    for rate, losses in ((1e-3, (2.0, 2.2, 2.4)), (1e-2, (1.9, 2.1, 2.3)), (1e-1, (1.0, 1.0, None)))
    for seed, loss in enumerate(losses)
    for step in (0, 10)
    if loss is not None
] + [line(1e-1, 2, 5, None, done=True)]


def test_the_best_comes_first_and_what_diverged_last():
    best, other, lost = outcomes(LINES)
    assert [o.setting["learning_rate"] for o in (best, other, lost)] == [1e-2, 1e-3, 1e-1]
    assert best.mean == pytest.approx(2.1)
    assert best.standard_error == pytest.approx(0.2 / math.sqrt(3))
    assert best.curve == (pytest.approx((0, 3.1, 0.2 / math.sqrt(3))), pytest.approx((10, 2.1, 0.2 / math.sqrt(3))))
    assert (lost.diverged, best.diverged) == (1, 0)
    assert math.isnan(lost.mean)


def test_confidence_pairs_the_seeds():
    best, other, lost = outcomes(LINES)
    assert confidence(best, other) == 1.0, "ahead by as much in every seed, however far seeds are apart"
    assert confidence(best, lost) == 1.0
    same = outcomes([line(1, s, 1, x, True) for s, x in enumerate((1.0, 2.0))])[0]
    turned = outcomes([line(2, s, 1, x, True) for s, x in enumerate((2.0, 1.0))])[0]
    assert confidence(same, turned) == 0.5
    # Ahead by 0.1 and by 0.3: t = 0.2 / 0.1 with one degree of freedom, whose distribution is Cauchy's.
    ahead, behind = (
        outcomes([line(rate, seed, 1, loss, True) for seed, loss in enumerate(losses)])[0]
        for rate, losses in ((1, (1.0, 2.0)), (2, (1.1, 2.3)))
    )
    assert confidence(ahead, behind) == pytest.approx(0.5 + math.atan(2) / math.pi)
    assert confidence(behind, ahead) == pytest.approx(0.5 - math.atan(2) / math.pi)
    single = outcomes([line(1, 0, 1, 1.0, True)])[0]
    assert confidence(single, single) is None
    assert math.isnan(single.standard_error)
