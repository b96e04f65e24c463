"""Checkpoints: save and restore, pruning, damaged files, failed saves."""

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


def raise_disk_full(*_):
    raise OSError(28, "No space left on device")


def at_step(state, step):
    return TrainState(jnp.int32(step), jax.tree.map(lambda x: x + step, state.params), state.opt_state)


@pytest.fixture
def state(tiny):
    return init_state(tiny)


@pytest.mark.smoke
def test_restore_returns_the_saved_state_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at_step(state, 7), {})
    assert Checkpoints(tmp_path).latest == 7
    restored = Checkpoints(tmp_path).restore(7, state)
    jax.tree.map(np.testing.assert_array_equal, restored, at_step(state, 7))
    params = Checkpoints(tmp_path).restore_params(7, state.params)
    jax.tree.map(np.testing.assert_array_equal, params, restored.params)


def test_float64_checkpoint_is_restored_as_float32(tmp_path, state):
    """Early versions saved float64 with JAX_ENABLE_X64."""
    with jax.enable_x64(True), Checkpoints(tmp_path, keep=2) as checkpoints:
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        checkpoints.save(at_step(wide, 5), {})
    jax.tree.map(np.testing.assert_array_equal, Checkpoints(tmp_path).restore(5, state), at_step(state, 5))
    params = Checkpoints(tmp_path).restore_params(5, state.params)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


def test_newest_and_best_steps_are_kept(tmp_path, state):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 60: 4.0}
    run = Run(tmp_path)
    with Checkpoints(run.checkpoints, keep=2) as checkpoints, run.metrics_file.open("a", buffering=1) as metrics:
        assert checkpoints.latest is None
        for step in (10, 20, 30, 40, 50, 60):
            checkpoints.save(at_step(state, step), {})
            if step in losses:  # a step is saved before it is evaluated
                metrics.write(json.dumps({"step": step, "val_loss": losses[step]}) + "\n")
    assert checkpoints.steps == [20, 50, 60]
    assert checkpoints.latest == 60
    assert best_step([10, 20, 60], run.val_losses()) == 20
    assert best_step([40, 50], run.val_losses()) == 50, "the newest, as none has a finite loss"


def test_saving_a_step_again_fails_and_keeps_the_first(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {"config": 1})
        checkpoints.save(at_step(state, 5), {"config": 2})
        with pytest.raises(CheckpointError, match=r"step 5 was not saved in .*: Directory not empty"):
            checkpoints.settle()
    assert Checkpoints(tmp_path).manifest(5).about == {"config": 1}


def test_folders_not_named_by_a_step_are_ignored(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
    for name in ("0040", "-3", "6.damaged", "x"):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).steps == [5]


def test_failed_pruning_does_not_fail_the_save(tmp_path, state, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if path.name == "5":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
        checkpoints.save(at_step(state, 6), {})
    assert checkpoints.steps == [5, 6]


def test_failed_save_does_not_hide_the_error_of_the_block(tmp_path, state, monkeypatch):
    monkeypatch.setattr("jaxgpt.files.sync", raise_disk_full)

    def fail_while_saving():
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(at_step(state, 5), {})
            raise KeyError("the error of the block")

    with pytest.raises(KeyError) as caught:
        fail_while_saving()
    assert "step 5 was not saved" in caught.value.__notes__[0]


def test_state_may_be_donated_after_save(tmp_path, state):
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    expected = jax.tree.map(np.asarray, at_step(state, 5))
    saved = at_step(state, 5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(saved, {})
        donate(saved)
    restored = Checkpoints(tmp_path).restore(5, state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_files_of_a_killed_save_are_removed_only_by_a_writer(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
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
            checkpoints.save(at_step(state, step), {})
    assert Checkpoints(tmp_path).steps == [20, 40, 60, 70]


def test_restore_names_a_missing_step_and_mismatched_arrays(tmp_path, state, tiny, change):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
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


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "delete"])
def test_damage_to_any_file_is_detected_and_the_file_named(tmp_path, state, damage):
    with Checkpoints(tmp_path / "whole", keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
    names = files_in(tmp_path / "whole" / "5")
    assert "manifest.json" in names
    assert len(names) > 5
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / "5" / name)
        for load in (
            lambda c=copy: Checkpoints(c).restore(5, state),
            lambda c=copy: Checkpoints(c).restore_params(5, state.params),
        ):
            with pytest.raises(DamagedError) as caught:
                load()
            assert str(copy / "5" / name) in str(caught.value)
        shutil.rmtree(copy)


def test_step_can_be_saved_again_after_it_is_set_aside(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for _ in range(2):
            checkpoints.save(at_step(state, 5), {})
            checkpoints.settle()
            checkpoints.set_aside(5)
        checkpoints.save(at_step(state, 5), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "5.damaged", "5.damaged1"]


def test_step_with_a_damaged_manifest_is_kept_and_later_saves_succeed(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
        checkpoints.settle()
        flip(tmp_path / "5" / "manifest.json")
        checkpoints.save(at_step(state, 6), {})
        checkpoints.save(at_step(state, 7), {})
    assert Checkpoints(tmp_path).steps == [5, 7]


def test_full_disk_is_reported_in_one_line(tmp_path, state, caplog, monkeypatch):
    import resource

    # Orbax closes its event loop at the first failed write: later writes find it closed, or are never awaited.
    late: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: late.append(raised.exc_type))
    before, later = resource.getrlimit(resource.RLIMIT_FSIZE), at_step(state, 5)
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
    del caught  # its traceback holds writes
    n = -1
    while n != len(late):  # wait until no more come: they would fail the next test
        n = len(late)
        time.sleep(1)
        gc.collect()
    assert set(late) <= {RuntimeError, RuntimeWarning}


def test_manifest_of_another_program_or_step_is_refused(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
    path = tmp_path / "5" / "manifest.json"
    tree = files.unseal(path.read_bytes())
    path.write_text(files.seal({**tree, "program": "another"}))
    with pytest.raises(DamagedError, match="expected 'jaxgpt checkpoint 2', step 5, found 'another'"):
        Checkpoints(tmp_path).manifest(5)
    path.write_text(files.seal(tree))
    (tmp_path / "5").rename(tmp_path / "6")
    with pytest.raises(DamagedError, match="step 6, found 'jaxgpt checkpoint 2', step 5"):
        Checkpoints(tmp_path).manifest(6)


def test_failed_save_is_reported_leaves_no_files_and_the_next_succeeds(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr("jaxgpt.files.sync", raise_disk_full)
            checkpoints.save(at_step(state, 5), {})
            with pytest.raises(CheckpointError, match=r"step 5 was not saved in .*No space left on device"):
                checkpoints.settle()
        with monkeypatch.context() as patch:
            patch.setattr("jaxgpt.checkpoint.ocp.save_async", raise_disk_full)
            checkpoints.save(at_step(state, 6), {})
            with pytest.raises(CheckpointError, match=r"step 6 was not saved in .*No space left on device"):
                checkpoints.settle()
        assert list(tmp_path.iterdir()) == []
        checkpoints.save(at_step(state, 7), {})
        checkpoints.settle()
        assert checkpoints.steps == [7]


def test_failure_to_create_the_folder_leaves_no_thread(tmp_path, state):
    before = set(threading.enumerate())
    with Checkpoints(tmp_path / "runs" / "checkpoints", keep=1) as checkpoints:
        (tmp_path / "runs").rename(tmp_path / "moved")
        (tmp_path / "runs").touch()
        checkpoints.save(at_step(state, 5), {})
        with pytest.raises(CheckpointError, match=r"step 5 was not saved in .*: Not a directory"):
            checkpoints.settle()
    assert not {thread for thread in threading.enumerate() if thread.is_alive() and not thread.daemon} - before


def test_saves_do_not_accumulate_tensorstore_metrics(tmp_path, state):
    """TensorStore leaks those that Orbax collects: some twenty lists per save."""

    def metrics():
        gc.collect()
        lists = (x for x in gc.get_objects() if type(x) is list and len(x) == 1 and type(x[0]) is dict)
        return sum("value" in x[0] or "count" in x[0] for x in lists)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        before = metrics()
        for step in range(5):
            checkpoints.save(at_step(state, step), {})
            checkpoints.settle()
    assert metrics() - before < 20


def test_failed_last_save_is_raised_at_the_end_of_the_block(tmp_path, state, monkeypatch):
    monkeypatch.setattr("jaxgpt.files.sync", raise_disk_full)
    with pytest.raises(CheckpointError, match="step 5 was not saved"), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})


def test_files_and_entries_of_a_saved_step_are_synced(tmp_path, state, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.fstat(file).st_ino))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 5), {})
    assert {path.stat().st_ino for path in (tmp_path / "5").rglob("*")} <= set(synced)
    assert synced[-1] == tmp_path.stat().st_ino


def test_step_saved_again_is_verified_again(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for about in {"try": 1}, {"try": 2}, {"try": 3}:
            checkpoints.save(at_step(state, 5), about)
            checkpoints.settle()
            assert checkpoints.verify(5).about == about
            aside = checkpoints.set_aside(5)
    assert aside.name == "5.damaged2"
