"""Members of a sweep are the runs that `jaxgpt train` would make."""

import jax
import numpy as np
import pytest

from jaxgpt.config import replaced
from jaxgpt.scaling import sweep
from jaxgpt.scaling.sweep import Program, Scored
from jaxgpt.training.loop import fit
from jaxgpt.training.start import start
from jaxgpt.training.step import init_state

BOUND = 2e-5  # nats; of float32 sums in another order, over 20 steps
CHANGES = (
    dict(seed=1),
    dict(seed=2**32 - 1, learning_rate=1e-2, dropout=0.3, weight_decay=0.0, warmup_steps=5),
    dict(
        learning_rate=3e-3, min_learning_rate=0.0, dropout=0.2, beta1=0.5, beta2=0.95, eps=1e-6, decay_steps=15,
        grad_clip=0.1, init_scale=2.0,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Three runs by `fit`, and their configs."""
    folder = tmp_path_factory.mktemp("sweep")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    config = request.getfixturevalue("tiny_config")
    config = replaced(config, corpus=str(text), eval_batches=0)
    found = []
    for i, change in enumerate(CHANGES):
        run, corpus = start(replaced(config, **change), f"run{i}", folder, folder / "data")
        found.append((run, fit(run, corpus)))
    return [run.config for run, _ in found], found, corpus


@pytest.fixture(scope="module")
def swept(runs):
    configs, _, corpus = runs
    events = list(sweep.run(configs, corpus, jax.devices()[:2]))
    return [score for each in events if isinstance(each, list) for score in each]


def test_the_three_are_one_program(runs):
    (chunk,) = sweep.split(runs[0], 2)
    assert chunk.members == (0, 1, 2)
    assert chunk.size == 4
    assert {"seed", "dropout", "warmup_steps", "init_scale"} < set(chunk.names)


def test_initial_parameters_are_exactly_those_of_the_runs(runs):
    configs, devices = runs[0][:2], tuple(jax.devices()[:2])
    (chunk,) = sweep.split(configs, 2)
    program = Program(chunk.base, chunk.names, devices)
    states = program.init({name: sweep._column(configs, name) for name in chunk.names})
    for i, config in enumerate(configs):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), states, init_state(config))


def test_each_member_is_the_run_of_its_config(runs, swept):
    for i, (run, summary) in enumerate(runs[1]):
        mine = [score for score in swept if score.member == i]
        assert [score.step for score in mine] == [scored.step for scored in summary.scores] == [0, 10, 20]
        for score, scored in zip(mine, summary.scores, strict=True):
            assert score.evaluation.loss == pytest.approx(scored.evaluation.loss, abs=BOUND)
            assert score.evaluation.standard_error == pytest.approx(scored.evaluation.standard_error, rel=1e-3)
        losses = [line["loss"] for line in run.metrics() if "loss" in line]
        assert mine[1].train_loss == pytest.approx(np.mean(losses[5:10]), abs=BOUND)
        assert mine[-1].done
        assert not mine[1].done
    finals = [score.evaluation.loss for score in swept if score.step == 20]
    assert len({round(loss, 3) for loss in finals}) == 3, "the bound means nothing where all learn the same"
