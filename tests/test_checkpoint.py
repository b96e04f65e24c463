import gc
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import files
from jaxgpt.checkpoint import CheckpointError, Checkpoints, DamagedError, best_step
from jaxgpt.run import Run
from jaxgpt.step import TrainState, init_state


def full(*_):
    raise OSError(28, "No space left on device")


def at(state, step):
    return TrainState(jnp.int32(step), jax.tree.map(lambda x: x + step, state.params), state.opt_state)


@pytest.fixture
def state(tiny):
    return init_state(tiny)


@pytest.mark.smoke
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 7), {})
    assert Checkpoints(tmp_path).latest == 7
    restored = Checkpoints(tmp_path).restore(7, state)
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 7))
    params = Checkpoints(tmp_path).restore_params(7, state.params)
    jax.tree.map(np.testing.assert_array_equal, params, restored.params)


def test_a_state_saved_as_float64_is_read_as_float32(tmp_path, state):
    """As jaxgpt once saved it where JAX_ENABLE_X64 was set."""
    with jax.enable_x64(True), Checkpoints(tmp_path, keep=2) as checkpoints:
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        checkpoints.save(at(wide, 5), {})
    jax.tree.map(np.testing.assert_array_equal, Checkpoints(tmp_path).restore(5, state), at(state, 5))
    params = Checkpoints(tmp_path).restore_params(5, state.params)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


def test_the_newest_and_the_best_are_kept(tmp_path, state):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 60: 4.0}
    run = Run(tmp_path)
    with Checkpoints(run.checkpoints, keep=2) as checkpoints, run.metrics_file.open("a", buffering=1) as metrics:
        assert checkpoints.latest is None
        for step in (10, 20, 30, 40, 50, 60):
            checkpoints.save(at(state, step), {})
            if step in losses:  # a step is saved before it is evaluated
                metrics.write(json.dumps({"step": step, "val_loss": losses[step]}) + "\n")
    assert checkpoints.steps == [20, 50, 60]
    assert checkpoints.latest == 60
    assert best_step([10, 20, 60], run.val_losses()) == 20
    assert best_step([40, 50], run.val_losses()) == 50, "none has a finite loss"


def test_a_step_is_saved_once(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {"config": 1})
        checkpoints.save(at(state, 5), {"config": 2})
        with pytest.raises(CheckpointError, match=r"step 5 was not saved in .*: Directory not empty"):
            checkpoints.settle()
    assert Checkpoints(tmp_path).manifest(5).about == {"config": 1}


def test_what_has_no_name_of_a_step_is_none(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {})
    for name in ("0040", "-3", "6.damaged", "x"):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).steps == [5]


def test_room_that_cannot_be_made_does_not_undo_the_save(tmp_path, state, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if path.name == "5":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {})
        checkpoints.save(at(state, 6), {})
    assert checkpoints.steps == [5, 6]


def test_what_ends_the_block_is_not_hidden_by_a_save_that_fails(tmp_path, state, monkeypatch):
    monkeypatch.setattr("jaxgpt.files.sync", full)

    def broken_off():
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(at(state, 5), {})
            raise KeyError("this comes first")

    with pytest.raises(KeyError) as caught:
        broken_off()
    assert "step 5 was not saved" in caught.value.__notes__[0]


def test_donating_the_state_after_save_does_no_harm(tmp_path, state):
    spend = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    expected = jax.tree.map(np.asarray, at(state, 5))
    saved = at(state, 5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(saved, {})
        spend(saved)
    restored = Checkpoints(tmp_path).restore(5, state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_what_a_killed_save_left_is_removed_by_the_next_writer_only(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {})
    for name in (".6.abcd.part", ".6.abcd.part.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / "5", tmp_path / name)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [5]
    assert len(list(tmp_path.iterdir())) == 3
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_multiples_of_keep_every_are_kept_too(tmp_path, state):
    with Checkpoints(tmp_path, keep=1, keep_every=20) as checkpoints:
        for step in range(10, 80, 10):
            checkpoints.save(at(state, step), {})
    assert Checkpoints(tmp_path).steps == [20, 40, 60, 70]


def test_what_does_not_fit_is_named(tmp_path, state, tiny, change):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {})
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 9 is not in .*, which has \[5\]"):
        checkpoints.restore(9, state)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(5, init_state(change(tiny, n_embd=32)))
    assert "params/h_0/attn/c_proj/bias: float32[16] in the checkpoint, float32[32] expected" in str(caught.value)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state.params)
    with pytest.raises(CheckpointError, match=r"float32\[16\] in the checkpoint, bfloat16\[16\] expected"):
        checkpoints.restore_params(5, half)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(path):
    data = bytearray(path.read_bytes())
    if not data:
        path.write_bytes(b"x")
        return
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] if data else b"x")


@pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "delete"])
def test_harm_to_any_file_is_seen_and_the_file_named(tmp_path, state, harm):
    with Checkpoints(tmp_path / "whole", keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {})
    names = files_in(tmp_path / "whole" / "5")
    assert "manifest.json" in names
    assert len(names) > 5
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        harm(copy / "5" / name)
        for load in (
            lambda c=copy: Checkpoints(c).restore(5, state),
            lambda c=copy: Checkpoints(c).restore_params(5, state.params),
        ):
            with pytest.raises(DamagedError) as caught:
                load()
            assert str(copy / "5" / name) in str(caught.value)
        shutil.rmtree(copy)


def test_a_damaged_step_is_set_aside_and_its_number_free_again(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for _ in range(2):
            checkpoints.save(at(state, 5), {})
            checkpoints.settle()
            checkpoints.set_aside(5)
        checkpoints.save(at(state, 5), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "5.damaged", "5.damaged1"]


def test_a_damaged_manifest_does_not_stop_later_saves_nor_lose_its_step(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {})
        checkpoints.settle()
        flip(tmp_path / "5" / "manifest.json")
        checkpoints.save(at(state, 6), {})
        checkpoints.save(at(state, 7), {})
    assert Checkpoints(tmp_path).steps == [5, 7]


@pytest.mark.skipif(os.name != "posix", reason="a limit on the size of files is a matter of POSIX")
def test_a_full_disk_is_one_line(tmp_path, state, caplog, monkeypatch):
    import resource

    late: list[object] = []  # Orbax closes its event loop at the first write that fails; later ones find it closed
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: late.append(raised.exc_type))
    before, later = resource.getrlimit(resource.RLIMIT_FSIZE), at(state, 5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        try:
            checkpoints.save(later, {})
            with pytest.raises(CheckpointError) as caught:
                checkpoints.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"step 5 was not saved in {tmp_path}: File too large"
    assert caplog.records == []
    n = -1
    while n != len(late):  # until no more come, which would be an error of the next test
        n = len(late)
        time.sleep(1)
    assert set(late) <= {RuntimeError}


def test_a_checkpoint_of_another_program_is_refused(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 5), {})
    path = tmp_path / "5" / "manifest.json"
    tree = files.unseal(path.read_bytes())
    path.write_text(files.seal({**tree, "program": "another"}))
    with pytest.raises(DamagedError, match="expected 'jaxgpt checkpoint 2', step 5, found 'another'"):
        Checkpoints(tmp_path).manifest(5)
    path.write_text(files.seal(tree))
    (tmp_path / "5").rename(tmp_path / "6")
    with pytest.raises(DamagedError, match="step 6, found 'jaxgpt checkpoint 2', step 5"):
        Checkpoints(tmp_path).manifest(6)


def test_a_failed_save_is_reported_leaves_nothing_and_does_not_stop_the_next(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr("jaxgpt.files.sync", full)
            checkpoints.save(at(state, 5), {})
            with pytest.raises(CheckpointError, match=r"step 5 was not saved in .*No space left on device"):
                checkpoints.settle()
        with monkeypatch.context() as patch:
            patch.setattr("jaxgpt.checkpoint.ocp.save_async", full)
            checkpoints.save(at(state, 6), {})
            with pytest.raises(CheckpointError, match=r"step 6 was not saved in .*No space left on device"):
                checkpoints.settle()
        assert list(tmp_path.iterdir()) == []
        checkpoints.save(at(state, 7), {})
        checkpoints.settle()
        assert checkpoints.steps == [7]


def test_a_folder_that_cannot_be_made_leaves_no_thread_behind(tmp_path, state):
    before = set(threading.enumerate())
    with Checkpoints(tmp_path / "runs" / "checkpoints", keep=1) as checkpoints:
        (tmp_path / "runs").rename(tmp_path / "moved")
        (tmp_path / "runs").touch()
        checkpoints.save(at(state, 5), {})
        with pytest.raises(CheckpointError, match=r"step 5 was not saved in .*: Not a directory"):
            checkpoints.settle()
    assert not {thread for thread in threading.enumerate() if thread.is_alive() and not thread.daemon} - before


def test_a_save_leaves_no_metrics_of_tensorstore_behind(tmp_path, state):
    """Each time that Orbax asks for them, TensorStore keeps them for good: some twenty lists a save."""

    def metrics():
        gc.collect()
        lists = (x for x in gc.get_objects() if type(x) is list and len(x) == 1 and type(x[0]) is dict)
        return sum("value" in x[0] or "count" in x[0] for x in lists)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        before = metrics()
        for step in range(5):
            checkpoints.save(at(state, step), {})
            checkpoints.settle()
    assert metrics() - before < 20
