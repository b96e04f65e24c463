"""The faults of `scripts/faults`, fewer of them, and those that take a process and a signal or a full disk."""

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


def typed(words, folder):
    """Exit code and output of `jaxgpt *words`, typed in `folder`, in this process: it has to be refused."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            code = cli.run_command(words)
        except SystemExit as done:
            code = done.code
    return code, out.getvalue()


@pytest.mark.slow
def test_nothing_is_lost_to_kills(tmp_path):
    count = trials.kills(tmp_path, 10, seed=1)
    assert count.failures == [], count.notes
    assert count.tried == count.good >= 10


def test_no_harm_to_a_file_goes_unseen(tmp_path):
    count = trials.corruptions(tmp_path, 150, seed=3)
    assert count.failures == []
    assert count.tried == count.good >= 150


def test_bad_input_is_refused_in_words_and_writes_nothing(tmp_path):
    count = bad_input.inputs(tmp_path, typed)
    assert count.failures == []
    assert count.tried == count.good > 100


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="memory and open files are counted in /proc")
def test_a_long_run_does_not_grow(tmp_path, as_a_user):
    count = trials.soak(tmp_path, steps=100, every=5)
    assert count.failures == []


def test_the_trials_see_what_they_are_to_see(tmp_path):
    """A run whose newest step has gone, or whose lines have, does not pass."""
    run = trials.new_run(tmp_path, "one", trials.short(trials.SMALL))
    trials.spawn(run).join()
    assert trials.wrong(run, 20) is None
    assert "step 25 is gone" in trials.wrong(run, 25)
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole[: whole.rindex(b'{"step": 20, "val_loss"') - 5])
    assert "lines up to step 20 are missing" in trials.wrong(run, 20)
    run.metrics_file.write_bytes(whole + b'{"step": 20, "loss": 1}\n')
    assert trials.wrong(run, 20) == "a line is missing or there twice"
    run.metrics_file.write_bytes(whole)
    (run.checkpoints / "20" / "state" / "_METADATA").unlink()
    assert "_METADATA is missing" in trials.wrong(run, 20)


# Processes that are asked to stop, crowded out, or stand in each other's way.


def latest(run):
    return Checkpoints(run.checkpoints).latest or 0


LONG = ("--steps", 100_000)


def test_a_second_signal_stops_at_once_with_the_last_save_intact(tmp_path):
    """A second Ctrl-C; a second SIGTERM ends a process as SIGKILL does (test_signals.py)."""
    run = trials.new_run(tmp_path, "one")
    process = resume(run, *LONG, "--scan-steps", 8_000, "--eval-every", 8_000)  # a chunk that takes long
    wait_for(lambda: run.metrics_file.exists() and run.metrics(), process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first signal is only noted"
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    assert time.monotonic() - began < 30
    assert trials.wrong(run, 0) is None
    with run.lock():  # nothing holds it any more
        pass


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="a limit of another process is a matter of Linux")
def test_a_disk_that_is_full_for_a_while(tmp_path):
    """Files may not grow beyond 2 KiB for a while, which no checkpoint fits in; the lines of metrics neither."""

    def fill(process):
        before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
        return lambda: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)

    run = trials.new_run(tmp_path, "one")
    process = resume(run, *LONG, "--on-save-error", "continue")
    wait_for(lambda: latest(run) >= 10, process)
    make_room = fill(process)
    wait_for(lambda: any(event["event"] == "save-failed" for event in run.events()), process)
    full = latest(run)
    make_room()
    wait_for(lambda: latest(run) > full, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143, out
    assert "was not saved" in out or "metrics.jsonl cannot be written" in out, out
    assert "and the next save tries again: make room" in out
    assert trials.wrong(run, 10) is None

    stopped = latest(run)
    process = resume(run, *LONG, "--on-save-error", "stop")
    wait_for(lambda: latest(run) > stopped, process)
    fill(process)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert "oo large" in out, out
    assert "is saved, and the run ends: make room" in out
    assert trials.wrong(run, stopped) is None

    whole = trials.new_run(tmp_path, "whole")
    stop = latest(run)
    for each in (run, whole):
        out, _ = resume(each, "--steps", stop + 5).communicate(timeout=300)
        assert f"step {stop + 5:,}" in out, out
    assert compare(Run(whole.path), Run(run.path)).difference is None
    assert not any(run.checkpoints.glob(".*.part*"))


def test_two_writers(tmp_path):
    run = trials.new_run(tmp_path, "one", replaced(trials.SMALL, steps=1000))
    first = trials.spawn(run)
    try:
        while latest(run) < 5:
            assert first.is_alive(), "it ended early"
            time.sleep(0.02)
        code, out = typed(["train", "--run", "one", "--resume"], tmp_path)
        assert code == 2, out
        assert f"run 'one' is in use by process {first.pid} on " in out
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    with run.lock():  # nothing holds it any more
        pass


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """The time of day leaps by days, both ways, every two hundred looks. A leap may fail a save, as Orbax measures its
    patience by that clock; that is told, and the next save, or the second try at the end, is whole."""
    straight, jumpy = (trials.new_run(tmp_path, name) for name in ("straight", "jumpy"))
    resume(straight, "--steps", 40).communicate(timeout=300)
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "looks = itertools.count()\n"  # which threads may ask for at once
        "honest = time.time\n"
        "time.time = lambda: honest() + 86400 * (0, -400, 30, 7, -2)[next(looks) // 200 % 5]\n"
        "time.gmtime = lambda s=None, gmtime=time.gmtime: gmtime(time.time() if s is None else s)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "clock"), prepend=os.pathsep)
    for steps in (20, 40):
        out, _ = resume(jumpy, "--steps", steps).communicate(timeout=300)
        assert f"step {steps}" in out, out
    days = [event["time"][:10] for event in jumpy.events()]
    assert days != sorted(days), "the clock did jump"
    assert compare(Run(straight.path), Run(jumpy.path)).difference is None


def test_a_run_folder_that_cannot_be_written_to(tmp_path):
    run = trials.new_run(tmp_path, "one", trials.short(trials.SMALL))
    trials.spawn(run).join()
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()  # as root may write anywhere, something else stands in the way
    code, out = typed(["train", "--run", "one", "--resume", "--steps", "30"], tmp_path)
    assert code == 2, out
    assert "cannot be written to" in out
    assert trials.wrong(run, 20) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is a matter of Linux")
def test_a_log_on_a_full_disk_ends_no_run(tmp_path):
    run = trials.new_run(tmp_path, "one", trials.short(trials.SMALL))
    words = [sys.executable, "-m", "jaxgpt", "train", "--run", "one", "--resume"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert latest(run) == 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that Orbax 0.12 leaves behind
def test_what_is_looked_at_while_it_trains_is_always_there(tmp_path):
    """Checkpoints make room all the time; a reader finds one at every look."""
    run = trials.new_run(tmp_path, "one", replaced(trials.SMALL, keep=1, steps=800, eval_every=100))
    process, seen = trials.spawn(run), set()
    while process.is_alive():
        if latest(run):
            seen.add(load_checkpoint(run, ("best", "last")[len(seen) % 2])[0])
    assert process.exitcode == 0
    assert len(seen) > 3
    gc.collect()  # what was left behind where a step made room in the middle of a read ends here, in no other test
