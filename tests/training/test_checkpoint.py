import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.training.checkpoint import CheckpointError, Checkpoints, abstract, load_params
from jaxgpt.training.step import TrainState, init_state


def at(state, step):
    return TrainState(jnp.int32(step), jax.tree.map(lambda x: x + step, state.params), state.opt_state)


@pytest.fixture
def state(tiny):
    return init_state(tiny)


@pytest.mark.smoke
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 7), 1.5)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 7
        restored = checkpoints.restore(7, abstract(jax.eval_shape(lambda: state)))
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 7))
    params = load_params(tmp_path, 7, abstract(state.params))
    jax.tree.map(np.testing.assert_array_equal, params, restored.params)


def test_the_newest_and_the_best_are_kept(tmp_path, state):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: float("nan"), 45: float("-inf"), 50: None, 60: 4.0}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest is checkpoints.best is None
        for step, loss in losses.items():
            checkpoints.save(at(state, step), loss)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [20, 50, 60]
        assert checkpoints.latest == 60
        assert checkpoints.best == 20


def test_a_run_that_was_never_evaluated_has_its_newest_as_best(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), None)
        checkpoints.wait()
        assert checkpoints.best == 5


def test_saving_a_step_again_changes_nothing(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), 1.0)
        checkpoints.save(at(state, 5), 2.0)
        checkpoints.wait()
        assert checkpoints.steps == [5]


def test_donating_the_state_after_save_does_no_harm(tmp_path, state):
    spend = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    expected = jax.tree.map(np.asarray, at(state, 5))
    saved = at(state, 5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(saved, None)
        spend(saved)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(5, abstract(state))
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_reading_leaves_an_unfinished_save_of_another_process_alone(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), None)
    unfinished = tmp_path / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", unfinished)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [5]
    assert unfinished.exists()


def test_what_cannot_be_read_is_named(tmp_path, state, tiny, change):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), None)
    other = init_state(change(tiny, n_embd=32))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=f"step 9 in {tmp_path} cannot be read"):
            checkpoints.restore(9, abstract(state))
        with pytest.raises(CheckpointError, match="step 5"):
            checkpoints.restore(5, abstract(other))
    shutil.rmtree(tmp_path / "5" / "state")
    with pytest.raises(CheckpointError, match="step 5"):
        load_params(tmp_path, 5, abstract(state.params))


def test_a_failed_save_is_told(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:

        class Failed:
            def result(self):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._checkpointer, "save_async", lambda *_, **__: Failed())
        checkpoints.save(at(state, 5), None)
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoints.wait()

        def refuse(*_, **__):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(checkpoints._checkpointer, "save_async", refuse)
        with pytest.raises(CheckpointError, match=r"step 5 was not saved.*Read-only"):
            checkpoints.save(at(state, 5), None)
