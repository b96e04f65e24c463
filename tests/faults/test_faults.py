"""The trials of `scripts/faults`, fewer of them, and runs with signals, full disks, two writers or a wrong clock."""

import contextlib
import gc
import io
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from jaxgpt import cli
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import replaced
from jaxgpt.run import Run
from jaxgpt.start import load_checkpoint
from jaxgpt.verify.resume import compare
from tests.faults import bad_input, trials
from tests.processes import resume, wait_for


def run_in_process(args, folder):
    """Run `jaxgpt *args` in `folder`, in this process: the exit code and the output."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            code = cli.run_command(args)
        except SystemExit as done:
            code = done.code
    return code, out.getvalue()


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    count = trials.kills(tmp_path, 10, seed=1)
    assert count.failures == [], count.notes
    assert count.tried == count.good >= 10


def test_all_damage_to_files_is_detected(tmp_path):
    count = trials.corruptions(tmp_path, 150, seed=3)
    assert count.failures == []
    assert count.tried == count.good >= 150


def test_bad_input_is_refused_without_a_traceback_or_a_write(tmp_path):
    count = bad_input.bad_inputs(tmp_path, run_in_process)
    assert count.failures == []
    assert count.tried == count.good > 100


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc, to measure memory and open files")
def test_a_long_run_leaks_no_memory_or_files(tmp_path, optimized_subprocesses):
    count = trials.soak(tmp_path, steps=100, every=5)
    assert count.failures == []


def test_find_damage_finds_each_kind_of_damage(tmp_path):
    """A lost step, missing and duplicated lines of metrics, and a damaged checkpoint."""
    run = trials.new_run(tmp_path, "one", trials.short(trials.SMALL))
    trials.spawn(run).join()
    assert trials.find_damage(run, 20) is None
    assert "step 25 is gone" in trials.find_damage(run, 25)
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole[: whole.rindex(b'{"step": 20, "val_loss"') - 5])
    assert "lines up to step 20 are missing" in trials.find_damage(run, 20)
    run.metrics_file.write_bytes(whole + b'{"step": 20, "loss": 1}\n')
    assert trials.find_damage(run, 20) == "a line is missing or duplicated"
    run.metrics_file.write_bytes(whole)
    (run.checkpoints / "20" / "state" / "_METADATA").unlink()
    assert "_METADATA is missing" in trials.find_damage(run, 20)


# Signals, full disks, two writers, the clock, unwritable folders.


def latest(run):
    """The newest saved step, 0 if there is none."""
    return Checkpoints(run.checkpoints).latest or 0


LONG = ("--steps", 100_000)


def test_a_second_signal_ends_the_run_at_once_and_keeps_the_last_save(tmp_path):
    """A second Ctrl-C; test_signals.py tests a second SIGTERM."""
    run = trials.new_run(tmp_path, "one")
    process = resume(run, *LONG, "--scan-steps", 8_000, "--eval-every", 8_000)  # chunks take seconds
    wait_for(lambda: run.metrics_file.exists() and run.metrics(), process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "after the first signal, the chunk continues"
    saved = latest(run)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    assert latest(run) == saved, "it did not wait for the chunk, whose end is saved"
    assert trials.find_damage(run, 0) is None
    with run.lock():  # the lock is free again
        pass


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux, to limit another process")
def test_a_run_survives_a_full_disk(tmp_path):
    """For a while, files cannot grow beyond 2 KiB, so neither checkpoints nor metrics can be written."""

    def fill_disk(process):
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
        return lambda: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)

    run = trials.new_run(tmp_path, "one")
    process = resume(run, *LONG, "--on-save-error", "continue")
    wait_for(lambda: latest(run) >= 10, process)
    free_disk = fill_disk(process)
    wait_for(lambda: any(event["event"] == "save-failed" for event in run.events()), process)
    before = latest(run)
    free_disk()
    wait_for(lambda: latest(run) > before, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143, out
    assert "was not saved" in out or "metrics.jsonl cannot be written" in out, out
    assert "and the next save tries again: make room" in out
    assert trials.find_damage(run, 10) is None

    stopped = latest(run)
    process = resume(run, *LONG, "--on-save-error", "stop")
    wait_for(lambda: latest(run) > stopped, process)
    fill_disk(process)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert "File too large" in out, out
    assert "is saved, and the run ends: make room" in out
    assert trials.find_damage(run, stopped) is None

    uninterrupted = trials.new_run(tmp_path, "uninterrupted")
    stop = latest(run)
    for each in (run, uninterrupted):
        out, _ = resume(each, "--steps", stop + 5).communicate(timeout=300)
        assert f"step {stop + 5:,}" in out, out
    assert compare(Run(uninterrupted.path), Run(run.path)).difference is None
    assert not any(run.checkpoints.glob(".*.part*"))


def test_a_second_writer_is_refused(tmp_path):
    run = trials.new_run(tmp_path, "one", replaced(trials.SMALL, steps=1000))
    first = trials.spawn(run)
    try:
        while latest(run) < 5:
            assert first.is_alive(), "the run ended early"
            time.sleep(0.02)
        code, out = run_in_process(["train", "--run", "one", "--resume"], tmp_path)
        assert code == 2, out
        assert f"run 'one' is in use by process {first.pid} on " in out
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    with run.lock():  # the lock is free again
        pass


def test_a_jumping_clock_changes_no_result(tmp_path, monkeypatch):
    """Every two hundred readings, the time of day jumps by days, forward or back. A jump may fail a save, because Orbax
    measures timeouts by that clock; the failure is reported, and the next save, or the retry at the end, succeeds."""
    straight, jumping = (trials.new_run(tmp_path, name) for name in ("straight", "jumping"))
    resume(straight, "--steps", 40).communicate(timeout=300)
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "readings = itertools.count()\n"  # atomic, as several threads read the clock
        "true_time = time.time\n"
        "time.time = lambda: true_time() + 86400 * (0, -400, 30, 7, -2)[next(readings) // 200 % 5]\n"
        "time.gmtime = lambda s=None, gmtime=time.gmtime: gmtime(time.time() if s is None else s)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "clock"), prepend=os.pathsep)
    for steps in (20, 40):
        out, _ = resume(jumping, "--steps", steps).communicate(timeout=300)
        assert f"step {steps}" in out, out
    days = [event["time"][:10] for event in jumping.events()]
    assert days != sorted(days), "the clock must have jumped"
    assert compare(Run(straight.path), Run(jumping.path)).difference is None


def test_a_resume_of_an_unwritable_run_is_refused(tmp_path):
    run = trials.new_run(tmp_path, "one", trials.short(trials.SMALL))
    trials.spawn(run).join()
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()  # blocks the lock even for root, who may write anywhere
    code, out = run_in_process(["train", "--run", "one", "--resume", "--steps", "30"], tmp_path)
    assert code == 2, out
    assert "cannot be written to" in out
    assert trials.find_damage(run, 20) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_for_stdout_does_not_end_the_run(tmp_path):
    run = trials.new_run(tmp_path, "one", trials.short(trials.SMALL))
    args = [sys.executable, "-m", "jaxgpt", "train", "--run", "one", "--resume"]
    with open("/dev/full", "w") as full:
        env = os.environ | {"PYTHONUNBUFFERED": ""}  # so that the last lines fail at the end, too
        done = subprocess.run(args, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert latest(run) == 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax 0.12 abandons
def test_a_checkpoint_can_be_loaded_at_any_time_during_training(tmp_path):
    """The run deletes old checkpoints all the time; a reader always finds one."""
    run = trials.new_run(tmp_path, "one", replaced(trials.SMALL, keep=1, steps=800, eval_every=100))
    process, seen = trials.spawn(run), set()
    while process.is_alive():
        if latest(run):
            seen.add(load_checkpoint(run, ("best", "last")[len(seen) % 2])[0])
    assert process.exitcode == 0
    assert len(seen) > 3
    gc.collect()  # finalize reads of deleted checkpoints in this test, not in another
