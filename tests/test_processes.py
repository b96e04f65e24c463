"""A run in several processes gives the losses of a run in one, and resumes in any number of them."""

import json
import os
import re
import signal
import socket
import textwrap
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxgpt.cli import join, run_command
from jaxgpt.processes import ProcessError, any_process, broadcast, on_primary, raise_in_all
from tests.faults.groups import BOUND, curve, members, new_run_args, resume_args, train, wait, wait_for_lines

BIGRAM = ("--kind", "bigram")
"""Options of a model that compiles fast."""


def finish(process, code=0):
    """Wait for `process`, require its exit code, and return its output."""
    found, out = wait(process)
    assert found == code, out
    return out


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The losses of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(train(folder, new_run_args(folder, "one")))
    return curve(folder, "one")


@pytest.fixture
def begin_with(monkeypatch):
    """begin_with(code): each process of a group runs `code` first, in which `process` is its number."""
    return lambda code: monkeypatch.setenv("BEGIN_WITH", textwrap.dedent(code))


@pytest.fixture
def in_process(monkeypatch):
    """in_process(i, other): this is process i of two, and the other one gives the value `other`; the values that this
    process gives are appended to the result."""
    given = []

    def enter(i, other):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: i)
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda own: given.append(own) or np.array([own, other])
        )
        return given

    return enter


@pytest.mark.slow
def test_several_processes_match_one(tmp_path, unbroken, begin_with):
    begin_with("from jaxgpt import data\ndata.DEVICE_TOKENS = 0")  # each process reads its shards from disk
    out = finish(train(tmp_path, [*new_run_args(tmp_path, "many"), "--mesh", "auto"], 4))
    assert out.count("validation loss") == 7  # only process 0 prints
    np.testing.assert_allclose(curve(tmp_path, "many"), unbroken, atol=BOUND, rtol=0)


@pytest.mark.slow
def test_resume_with_other_process_and_device_counts(tmp_path, unbroken):
    """Two processes that shard batch and state, one of them killed; then one process, killed; then two to the end."""
    for processes, devices, mesh in ((2, 2, "data=2,fsdp=2"), (1, 1, "auto")):
        before = len(curve(tmp_path, "two"))
        process = train(tmp_path, [*resume_args(tmp_path, "two"), "--mesh", mesh], processes, devices)
        wait_for_lines(tmp_path, "two", before + 30, process)
        os.kill(members(process)[-1], signal.SIGKILL)
        finish(process, 137 if processes > 1 else -9)
    out = finish(train(tmp_path, [*resume_args(tmp_path, "two"), "--mesh", "fsdp=2"], 2, 1))
    np.testing.assert_allclose(curve(tmp_path, "two"), unbroken, atol=BOUND, rtol=0)
    assert out.count("step    120  validation loss") == 1  # only process 0 prints


def test_signal_to_the_group_saves_and_ends_it(tmp_path):
    process = train(tmp_path, [*new_run_args(tmp_path, "four"), *BIGRAM, "--steps", "100000", "--mesh", "data=4"], 4)
    wait_for_lines(tmp_path, "four", 30, process)
    process.send_signal(signal.SIGINT)
    out = finish(process, 130)
    assert "interrupted at step" in out
    assert out.count("Resume with") == 1
    resume = r"jaxgpt train --run four --resume --mesh data=4 --coordinator 127\.0\.0\.1:\d+ --num-processes 4"
    assert re.search(f"Resume with: {resume}", " ".join(out.split()))


def test_signal_during_preparation_ends_the_waiting_processes(tmp_path, begin_with):
    begin_with("""
        import time
        from jaxgpt.cli import runs

        def slowly(*_, **__):
            print("preparing", flush=True)
            time.sleep(600)

        runs.start_run = slowly
    """)
    process = train(tmp_path, new_run_args(tmp_path, "two"), 2)
    while process.stdout.readline() != "preparing\n":
        assert process.poll() is None
    time.sleep(2)  # until the other process waits for process 0
    process.send_signal(signal.SIGINT)
    assert "jaxgpt: interrupted" in finish(process, 130)


def test_unexpected_error_in_one_process_is_reported_and_ends_all(tmp_path, begin_with):
    begin_with("""
        from jaxgpt import train
        due = train.due

        def torn(config, step):
            if step == 50 and process == 0:  # the other process waits in the next step
                raise ValueError("nobody foresaw this")
            return due(config, step)

        train.due = torn
    """)
    out = finish(train(tmp_path, [*new_run_args(tmp_path, "two"), *BIGRAM], 2), 1)
    assert "in torn\n" in out
    assert "ValueError: nobody foresaw this" in out
    last = json.loads((tmp_path / "runs" / "two" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "broken-off"
    assert last["text"] == "ValueError: nobody foresaw this"


def test_failed_save_in_one_process_fails_in_all(tmp_path, begin_with):
    begin_with("""
        import resource
        from jaxgpt import checkpoint
        from jaxgpt.checkpoint import Checkpoints
        save, settle, hard = Checkpoints.save, Checkpoints.settle, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        write = checkpoint.ocp.save_async

        def write_on_full_disk(path, state):
            if (state.step, process) in ((40, 1), (60, 0)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            return write(path, state)

        def save_without_folder(self, state, *rest):
            directory = self.directory
            if (state.step, process) == (80, 0):
                self.directory = directory / "no" / "folder"
            save(self, state, *rest)
            self.directory = directory

        def make_room(self, wait=True):
            try:
                settle(self, wait)
            finally:
                if wait:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        Checkpoints.save, Checkpoints.settle = save_without_folder, make_room
        checkpoint.ocp.save_async = write_on_full_disk
    """)
    out = " ".join(finish(train(tmp_path, [*new_run_args(tmp_path, "two"), *BIGRAM], 2)).split())
    for step, process, reason in ((40, 1, "File too large"), (60, 0, "File too large"), (80, 0, "No such file")):
        assert re.search(rf"step {step} was not saved in \S+: process {process}: {reason}", out), out
    assert (tmp_path / "runs" / "two" / "checkpoints" / "120").is_dir()


@pytest.mark.parametrize(("value", "other", "largest"), [(0, 2, 2), (3, 2, 3), (9, -1, 9)])
def test_processes_agree_on_the_largest_value_or_on_that_of_process_0(in_process, value, other, largest):
    in_process(1, other)
    assert any_process(value) == largest
    assert broadcast(value) == other


def test_an_error_in_one_process_is_raised_in_all(in_process):
    in_process(1, False)
    assert on_primary(lambda: pytest.fail("only process 0 acts")) is None
    raise_in_all(None)
    with pytest.raises(OSError, match="of this process"):
        raise_in_all(OSError("of this process"))
    in_process(1, True)
    for wait_for_others in (lambda: raise_in_all(None), lambda: on_primary(print)):
        with pytest.raises(ProcessError, match="another process failed"):
            wait_for_others()


def test_any_error_of_process_0_ends_the_wait_of_the_others(in_process):
    given = in_process(0, False)
    with pytest.raises(ZeroDivisionError):
        on_primary(lambda: 1 // 0)
    assert given == [True]


def test_collective_timeout_is_a_week_by_default(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_collective_timeout_seconds=5")
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append((*args, os.environ["XLA_FLAGS"])))
    monkeypatch.setattr(join, "any_process", lambda value: value)
    monkeypatch.setattr(join, "_wait_for_port", lambda host, port: None)
    join.join("localhost:1", 2, 1)
    [(*args, flags)] = calls
    assert args == ["localhost:1", 2, 1]
    assert flags.split() == [f"--xla_cpu_collective_timeout_seconds={seconds}" for seconds in (7 * 24 * 3600, 5)]


def test_bad_cluster_options_are_refused(capsys):
    for words, message in (
        (["--coordinator", "localhost"], "expected HOST:PORT"),
        (["--coordinator", "localhost:99999", "--num-processes", "2", "--process-id", "1"], "expected HOST:PORT"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], "expected 0 to 1"),
        (["--num-processes", "2", "--process-id", "1"], "--coordinator HOST:PORT"),
    ):
        assert run_command(["train", "gpt-demo", *words]) == 2
        assert message in capsys.readouterr().err


def test_missing_process_0_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(join, "CONNECT_SECONDS", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # no process listens there
        words = ["train", "gpt-demo", "--coordinator", address, "--num-processes", "2", "--process-id", "1"]
        assert run_command(words) == 2
    err = capsys.readouterr().err
    assert f"process 1 of 2 waits for the others at {address}" in err
    assert f"no process 0 at {address} for 0 s (" in err
    assert "give the address of process 0, --coordinator HOST:PORT" in err


def test_error_in_process_0_ends_all(tmp_path):
    assert "nowhere.txt" in finish(train(tmp_path, ["gpt-demo", "--corpus", "nowhere.txt"], 2), 2)
