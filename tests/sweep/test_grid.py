"""Axes of a sweep give configs, or are refused with a hint."""

import itertools

import pytest

from jaxgpt.config import Config, ConfigError, UsageError, replaced
from jaxgpt.sweep import grid


def test_a_range_has_equal_ratios_and_its_ends():
    _, values = grid.parse("lr=3e-4:3e-2:6")
    assert (values[0], values[-1], len(values)) == (3e-4, 3e-2, 6)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert ratios == pytest.approx([100 ** (1 / 5)] * 5, rel=1e-3)
    assert grid.parse("warmup-steps=10:1000:3")[1] == [10, 100, 1000]
    assert grid.parse("dropout=0:0.4:3")[1] == [0.0, 0.2, 0.4]
    assert grid.parse("tie_weights=true,false")[1] == [True, False]


def test_members_are_every_combination_with_every_seed():
    axes = [grid.parse("n_embd=64,128"), grid.parse("lr=1e-3,1e-2")]
    members = grid.members(Config(), axes, 3)
    assert len(members) == 12
    assert [m.config.train.seed for m in members[:4]] == [1337, 1338, 1339, 1337]
    found = {(m.config.model.n_embd, m.config.optimizer.learning_rate, m.config.train.seed) for m in members}
    assert len(found) == 12
    assert members[-1].setting == {"n_embd": 128, "learning_rate": 1e-2}


def test_the_final_learning_rate_follows_the_peak():
    axes = [grid.parse("lr=1e-5,1e-2")]
    found = [m.config.optimizer.final_learning_rate for m in grid.members(Config(), axes, 1)]
    assert found == pytest.approx([1e-6, 1e-3])
    with pytest.raises(ConfigError, match=r"with learning_rate 1e-05: .*\n.*min_learning_rate is 0.0001"):
        grid.members(replaced(Config(), min_learning_rate=1e-4), axes, 1)
    assert grid.parse("min_learning_rate=1e-5,1e-4")[1] == [1e-5, 1e-4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_embd", "expected n_embd=VALUE,VALUE"),
        ("n_embed=64", "did you mean 'n_embd'"),
        ("corpus=a,b", "no setting 'corpus'"),
        ("seed=1,2", "no setting 'seed'"),
        ("keep=1,2", "no setting 'keep'"),
        ("keep_every=1,2", "no setting 'keep_every'"),
        ("eval_batches=1,2", "no setting 'eval_batches'"),
        ("on_save_error=stop,continue", "no setting 'on_save_error'"),
        ("n_embd=64,x", "values of type int"),
        ("n_embd=64.5,2", "values of type int"),
        ("lr=1:2", "LOW:HIGH:HOW-MANY"),
        ("lr=2:1:3", "LOW < HIGH"),
        ("lr=1:2:1", "at least 2 of them"),
        ("lr=1:2:10001", "LOW:HIGH:HOW-MANY"),  # more than a sweep may have members
        ("lr=1:inf:3", "LOW < HIGH"),
        ("lr=1e-3,0.001", "the same value twice"),
        ("tie_weights=yes,no", "values among true, false"),
        ("schedule=a:b:3", "values among cosine, linear, constant"),
    ],
)
def test_an_invalid_axis_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        grid.parse(text)


def test_a_combination_that_cannot_run_is_named():
    with pytest.raises(ConfigError, match=r"(?s)with n_embd 66, n_head 4: .*try --n-embd 68"):
        grid.members(Config(), [grid.parse("n_embd=64,66"), grid.parse("n_head=2,4")], 1)
    with pytest.raises(ConfigError, match=r"with schedule up: .*cosine, linear, constant"):
        grid.members(Config(), [grid.parse("schedule=linear,up")], 1)
    with pytest.raises(UsageError, match="given twice"):
        grid.members(Config(), [grid.parse("lr=1,2"), grid.parse("lr=3,4")], 1)
    with pytest.raises(UsageError, match="--seeds is 0: the sweep would have 0 members"):
        grid.members(Config(), [], 0)
    with pytest.raises(UsageError, match="20,000 members"):
        grid.members(Config(), [], 20_000)


def test_a_range_of_whole_numbers_is_rounded():
    assert grid.parse("n_layer=1:10:4") == ("n_layer", [1, 2, 5, 10])


def test_a_sweep_may_have_the_most_members(monkeypatch):
    monkeypatch.setattr(grid, "MAX_MEMBERS", 6)
    assert len(grid.members(Config(), [grid.parse("n_layer=1,2")], 3)) == 6
    with pytest.raises(UsageError, match="would have 8 members, expected 1 to 6"):
        grid.members(Config(), [grid.parse("n_layer=1,2")], 4)
