"""Each member of a sweep trains as `jaxgpt train` would, and members do not affect each other."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt.cli.runs import start_run
from jaxgpt.config import replaced
from jaxgpt.evaluation import Evaluation
from jaxgpt.sharding import one_device
from jaxgpt.step import Metrics, sharded_init
from jaxgpt.sweep import program as sweep
from jaxgpt.sweep.grid import Member
from jaxgpt.sweep.program import Program, split
from jaxgpt.train import fit

BOUND = 2e-5
"""In nats after 20 steps: float32 sums are taken in another order."""
CHANGES = (
    dict(seed=1),
    dict(
        seed=2**32 - 1, learning_rate=1e-2, min_learning_rate=0.0, weight_decay=0.0, warmup_steps=5, decay_steps=15,
        beta1=0.5, beta2=0.95, eps=1e-6, grad_clip=0.1,
    ),
    dict(learning_rate=3e-3, dropout=0.3, init_scale=2.0),
)  # fmt: skip
DIVERGING = dict(learning_rate=3e38, weight_decay=0.5)


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    return replaced(tiny_config, corpus=str(text), eval_batches=0)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Three runs by `fit`, each with its summary; and their corpus."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for i, change in enumerate(CHANGES):
        run, corpus = start_run(replaced(base, **change), f"run{i}", folder, folder / "data")
        found.append((run, fit(run, corpus)))
    return found, corpus


@pytest.fixture(scope="module")
def configs(runs):
    found = [run.config for run, _ in runs[0]]
    return [*found, replaced(found[0], seed=5), replaced(found[0], **DIVERGING)]


@pytest.fixture(scope="module")
def member_scores(configs, runs):
    """The scores of five members: the three runs, a fourth, and a fifth that diverges. A sixth is padding."""
    events = list(sweep.run([Member(config, {}) for config in configs], runs[1], jax.devices()[:2]))
    scores = [score for each in events for score in each]
    return [[score for score in scores if score.member == i] for i in range(len(configs))]


def test_initial_parameters_are_exactly_those_of_the_runs(configs):
    configs = configs[:4]
    (chunk,) = split(configs, 2)
    program = Program(chunk.base, jax.devices()[:2])
    states = program.init({name: sweep.column(configs, name) for name in chunk.names})
    for i in (1, 2):
        with jax.set_mesh(one_device()):
            alone = sharded_init(configs[i], one_device())
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), states, alone)


def test_each_member_matches_the_run_of_its_config(runs, member_scores):
    for (run, summary), scores in zip(runs[0], member_scores, strict=False):
        assert [score.step for score in scores] == [scored.step for scored in summary.scores] == [0, 10, 20]
        for score, scored in zip(scores, summary.scores, strict=True):
            assert score.val_loss == pytest.approx(scored.evaluation.loss, abs=BOUND)
            assert score.val_standard_error == pytest.approx(scored.evaluation.standard_error, rel=1e-3)
        losses = [line["loss"] for line in run.metrics() if "loss" in line]
        assert scores[1].train_loss == pytest.approx(np.mean(losses[5:10]), abs=BOUND)
        assert [score.done for score in scores] == [False, False, True]
    finals = [scores[-1].val_loss for scores in member_scores[:-1]]
    closest = min(abs(a - b) for i, a in enumerate(finals) for b in finals[:i])
    assert closest > 100 * BOUND, "the members differ too little for BOUND to show anything"


def test_a_member_that_diverges_is_reported(member_scores):
    first, second, last = member_scores[-1]
    assert first.val_loss
    assert not first.diverged
    assert second.val_loss is None
    assert second.diverged
    assert second.done
    assert second.step == 10, "after max_skipped steps, reported at the next score"
    assert last == second._replace(step=20, train_loss=last.train_loss), "it trains along with the others"


def test_members_side_by_side_match_members_in_turn(configs, runs, member_scores, monkeypatch):
    """With vmap, as on accelerators, and with windows that are gathered on the host."""
    monkeypatch.setattr(sweep, "DEVICE_TOKENS", 1)
    monkeypatch.setattr(sweep, "in_turn", lambda: False)
    members = [Member(replaced(config, eval_start=False), {}) for config in configs[:2]]
    events = list(sweep.run(members, runs[1], jax.devices()[:1]))
    for score, in_turn in zip(events[-1], member_scores, strict=False):
        assert score.member == in_turn[-1].member
        assert score.val_loss == pytest.approx(in_turn[-1].val_loss, abs=BOUND)


def test_a_member_ends_after_max_skipped_steps_in_a_row(configs, runs, monkeypatch):
    applied = np.ones((2, 20), bool)
    applied[0, [1, 2, 4, 5, 7, 8]] = False  # two in a row, three times
    applied[1, [1, 2, 3]] = False  # three in a row, then no more
    members = [Member(replaced(configs[0], max_skipped=3, seed=i), {"seed": i}) for i in range(2)]
    (chunk,), scans = split([member.config for member in members], 1), iter(np.split(applied, 4, axis=1))

    def steps(tokens, state, values, windows):
        ones, found = np.ones((2, 5), np.float32), next(scans)
        return state, Metrics(ones, ones, ones, found)

    sharding, state = Program(configs[0], jax.devices()[:1]).sharding, SimpleNamespace(params=None)
    monkeypatch.setattr(sweep, "evaluate", lambda *_: [Evaluation(1.0, 0.1, 1.0, 1.0, 100)] * 2)
    program = SimpleNamespace(sharding=sharding, init=lambda values: state, steps=steps)
    events = list(sweep.train(program, chunk, members, runs[1]))
    assert all(each.seed == each.setting["seed"] == each.member for event in events for each in event)
    assert [(each.member, each.step, each.diverged, each.done) for event in events for each in event] == [
        (0, 0, False, False), (1, 0, False, False), (0, 10, False, False), (1, 10, True, True), (0, 20, False, True),
        (1, 20, True, True),
    ]  # fmt: skip


def test_each_figure_of_a_score_has_its_name(base):
    member, result = Member(replaced(base, seed=7), {"n_embd": 16}), Evaluation(2.0, 0.1, 3.0, 4.0, 100)
    assert sweep.score(5, member, 20, result, 2.5, stopped=False)._asdict() == {
        "member": 5, "setting": {"n_embd": 16}, "seed": 7, "step": 20, "val_loss": 2.0, "val_standard_error": 0.1,
        "val_bits_per_char": 3.0, "val_bits_per_byte": 4.0, "train_loss": 2.5, "diverged": False, "done": True,
    }  # fmt: skip
