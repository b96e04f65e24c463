"""Members of a sweep are the runs that `jaxgpt train` would make, and none disturbs another."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt.config import replaced
from jaxgpt.scaling import sweep
from jaxgpt.scaling.sweep import Program
from jaxgpt.training import memory
from jaxgpt.training.loop import fit
from jaxgpt.training.memory import OutOfMemoryError
from jaxgpt.training.placement import ONE_DEVICE, fresh
from jaxgpt.training.start import start

BOUND = 2e-5
"""Nats; of float32 sums in another order, over 20 steps."""
CHANGES = (
    dict(seed=1),
    dict(
        seed=2**32 - 1, learning_rate=1e-2, min_learning_rate=0.0, weight_decay=0.0, warmup_steps=5, decay_steps=15,
        beta1=0.5, beta2=0.95, eps=1e-6, grad_clip=0.1,
    ),
    dict(learning_rate=3e-3, dropout=0.3, init_scale=2.0),
    dict(seed=3, beta2=0.999),
)  # fmt: skip
RUINED = dict(learning_rate=3e38, weight_decay=0.5)


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    return replaced(tiny_config, corpus=str(text), eval_batches=0)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Four runs by `fit`: each with its summary; and their corpus."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for i, change in enumerate(CHANGES):
        run, corpus = start(replaced(base, **change), f"run{i}", folder, folder / "data")
        found.append((run, fit(run, corpus)))
    return found, corpus


@pytest.fixture(scope="module")
def configs(runs):
    found = [run.config for run, _ in runs[0]]
    return [*found, replaced(found[0], **RUINED)]


@pytest.fixture(scope="module")
def swept(configs, runs):
    """The scores of the four, and of a fifth that comes to no number, by member; a sixth only fills a device up."""
    events = list(sweep.run(configs, runs[1], jax.devices()[:2]))
    scores = [score for each in events if isinstance(each, list) for score in each]
    return [[score for score in scores if score.member == i] for i in range(len(configs))]


def test_initial_parameters_are_exactly_those_of_the_runs(configs):
    configs = configs[:4]
    (chunk,) = sweep.split(configs, 2)
    program = Program(chunk.base, chunk.names, tuple(jax.devices()[:2]))
    states = program.init({name: sweep._column(configs, name) for name in chunk.names})
    for i in (1, 2):
        alone = fresh(configs[i], ONE_DEVICE)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), states, alone)


def test_each_member_is_the_run_of_its_config(runs, swept):
    for (run, summary), mine in zip(runs[0], swept, strict=False):
        assert [score.step for score in mine] == [scored.step for scored in summary.scores] == [0, 10, 20]
        for score, scored in zip(mine, summary.scores, strict=True):
            assert score.evaluation.loss == pytest.approx(scored.evaluation.loss, abs=BOUND)
            assert score.evaluation.standard_error == pytest.approx(scored.evaluation.standard_error, rel=1e-3)
        losses = [line["loss"] for line in run.metrics() if "loss" in line]
        assert mine[1].train_loss == pytest.approx(np.mean(losses[5:10]), abs=BOUND)
        assert [score.done for score in mine] == [False, False, True]
    finals = [mine[-1].evaluation.loss for mine in swept[:-1]]
    apart = min(abs(a - b) for i, a in enumerate(finals) for b in finals[:i])
    assert apart > 100 * BOUND, "the bound means nothing where all learn the same"


def test_a_member_that_comes_to_no_number_is_told_of(swept):
    first, second = swept[-1]
    assert first.evaluation
    assert second.evaluation is None
    assert second.done
    assert second.step == 10, "after max_skipped steps, told at the next score"


def test_members_of_one_shape_are_one_program(base):
    few = [
        replaced(base, seed=i, learning_rate=r, warmup_steps=w) for i in (0, 1) for r in (1e-3, 1e-2) for w in (1, 2)
    ]
    (chunk,) = sweep.split(few, 4)
    assert chunk.members == tuple(range(8))
    assert set(chunk.names) == {"seed", "learning_rate", "warmup_steps"}
    wider = [replaced(config, n_embd=32) for config in few]
    assert [each.members for each in sweep.split([*few, *wider], 4)] == [tuple(range(8)), tuple(range(8, 16))]
    # What a 0 switches off is no number: another program.
    off = [replaced(base, dropout=rate) for rate in (0.0, 0.1, 0.2)]
    assert [(each.members, each.names) for each in sweep.split(off, 4)] == [((0,), ()), ((1, 2), ("dropout",))]


def test_chunks_are_even_and_no_larger_than_fits(base, monkeypatch):
    many = [replaced(base, seed=i) for i in range(18)]
    chunks = sweep.split(many, 2)
    assert [(len(each.members), each.size) for each in chunks] == [(6, 6)] * 3
    assert [len(each.members) for each in sweep.split(many, 8, at_once=3)] == [3] * 6
    assert sweep.split(many[:3], 8)[0].devices == 3
    assert [(len(each.members), each.size) for each in sweep.split(many[:9], 2)] == [(6, 6), (3, 4)]
    need = memory.needed(base, 0, recomputed=False)
    state = need.parameters + need.optimizer_state
    monkeypatch.setattr(memory, "available", lambda: 2 * (need.total - state) + 5 * state)
    assert [len(each.members) for each in sweep.split(many[:8], 2)] == [4, 4], "the states of six do not fit"
    monkeypatch.setattr(memory, "available", lambda: 10)
    with pytest.raises(OutOfMemoryError, match=r"a training step needs at least.*--at-once 1$"):
        sweep.split(many, 2)
    need = memory.needed(base, 0, recomputed=True).total
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(memory, "available", lambda: 10 * need)
    assert [len(each.members) for each in sweep.split(many, 1)] == [3] * 6
    bigrams = [replaced(config, kind="bigram", vocab_size=0) for config in many]
    assert sweep.split(bigrams, 1), "before the text has said how large they are"


def test_what_is_finished_changes_no_program(base):
    """A setting in which the rest no longer differ is still mapped: as a constant it would be rounded otherwise."""
    some = [replaced(base, seed=i, beta2=beta2) for beta2 in (0.95, 0.999) for i in (0, 1)]
    whole, rest = sweep.split(some, 2, at_once=2), sweep.split(some, 2, 2, frozenset({0, 1}))
    assert [each.members for each in rest] == [each.members for each in whole[1:]] == [(2, 3)]
    assert rest[0].names == whole[1].names == ("beta2", "seed")
    assert sweep._program(rest[0].base) == sweep._program(whole[1].base)


def test_lengths_share_a_program_and_not_a_chunk(base):
    lengths = [dataclasses.replace(replaced(base, steps=n, decay_steps=n)) for n in (20, 40, 20)]
    chunks = sweep.split(lengths, 2)
    assert [each.members for each in chunks] == [(0, 2), (1,)]
    assert {each.names for each in chunks} == {("decay_steps",)}
    assert len({sweep._program(each.base) for each in chunks}) == 1


def test_side_by_side_is_one_after_another(configs, runs, swept, monkeypatch):
    """What accelerators do, vmap, on a CPU; here with windows that are taken on the host."""
    monkeypatch.setattr(sweep, "DEVICE_TOKENS", 1)
    monkeypatch.setattr(Program, "one_by_one", False)
    events = list(sweep.run([replaced(config, eval_start=False) for config in configs[:2]], runs[1], jax.devices()[:1]))
    for score, mine in zip(events[-1], swept, strict=False):
        assert score.member == mine[-1].member
        assert score.evaluation.loss == pytest.approx(mine[-1].evaluation.loss, abs=BOUND)
