"""A run in several processes is the run in one, and goes on in any number of them."""

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

from jaxgpt.cli import join, run_command
from tests.faults.groups import BOUND, curve, ended, members, new, on, train, wait_for_lines

PAIRS = ("--kind", "bigram")
"""A model that compiles in no time."""


def finish(process, code=0):
    found, out = ended(process)
    assert found == code, out
    return out


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The losses of a run of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(train(folder, new(folder, "one")))
    return curve(folder, "one")


@pytest.fixture
def begin_with(monkeypatch):
    """begin_with(code): what each process of a group, of number `process`, runs before all else."""
    return lambda code: monkeypatch.setenv("BEGIN_WITH", textwrap.dedent(code))


@pytest.mark.slow
def test_several_processes_train_as_one_does(tmp_path, unbroken, begin_with):
    begin_with("from jaxgpt import data\ndata.DEVICE_TOKENS = 0")  # from disk, each what is its own
    out = finish(train(tmp_path, [*new(tmp_path, "many"), "--mesh", "auto"], 4))
    assert out.count("validation loss") == 7  # told by one process
    np.testing.assert_allclose(curve(tmp_path, "many"), unbroken, atol=BOUND, rtol=0)


@pytest.mark.slow
def test_killed_it_goes_on_with_another_number_of_processes_and_devices(tmp_path, unbroken):
    """Two processes that share batch and parameters, one of them killed; one process, killed; then two to the end."""
    for processes, devices, mesh in ((2, 2, "data=2,fsdp=2"), (1, 1, "auto")):
        before = len(curve(tmp_path, "two"))
        process = train(tmp_path, [*on(tmp_path, "two"), "--mesh", mesh], processes, devices)
        wait_for_lines(tmp_path, "two", before + 30, process)
        os.kill(members(process)[-1], signal.SIGKILL)
        finish(process, 137 if processes > 1 else -9)
    out = finish(train(tmp_path, [*on(tmp_path, "two"), "--mesh", "fsdp=2"], 2, 1))
    np.testing.assert_allclose(curve(tmp_path, "two"), unbroken, atol=BOUND, rtol=0)
    assert out.count("step    120  validation loss") == 1  # told by one process


def test_a_signal_to_the_group_saves_and_ends_it(tmp_path):
    process = train(tmp_path, [*new(tmp_path, "four"), *PAIRS, "--steps", "100000", "--mesh", "data=4"], 4)
    wait_for_lines(tmp_path, "four", 30, process)
    process.send_signal(signal.SIGINT)
    out = finish(process, 130)
    assert "interrupted at step" in out
    assert out.count("Resume with") == 1
    resume = r"jaxgpt train --run four --resume --mesh data=4 --coordinator 127\.0\.0\.1:\d+ --num-processes 4"
    assert re.search(f"Resume with: {resume}", " ".join(out.split()))


def test_a_signal_while_process_0_prepares_ends_those_that_wait_for_it(tmp_path, begin_with):
    begin_with("""
        import time
        from jaxgpt.cli import runs

        def slowly(*_, **__):
            print("preparing", flush=True)
            time.sleep(600)

        runs.start = slowly
    """)
    process = train(tmp_path, new(tmp_path, "two"), 2)
    while process.stdout.readline() != "preparing\n":
        assert process.poll() is None
    time.sleep(2)  # until the other waits
    process.send_signal(signal.SIGINT)
    assert "jaxgpt: interrupted" in finish(process, 130)


def test_an_error_that_nobody_foresaw_in_one_process_is_reported_and_ends_all(tmp_path, begin_with):
    begin_with("""
        from jaxgpt import train
        due = train.due

        def torn(config, step):
            if step == 50 and process == 0:  # the others go on to a step, which this one would answer otherwise
                raise ValueError("nobody foresaw this")
            return due(config, step)

        train.due = torn
    """)
    out = finish(train(tmp_path, [*new(tmp_path, "two"), *PAIRS], 2), 1)
    assert "in torn\n" in out
    assert "ValueError: nobody foresaw this" in out
    last = json.loads((tmp_path / "runs" / "two" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "broken-off"
    assert last["text"] == "ValueError: nobody foresaw this"


@pytest.mark.skipif(os.name != "posix", reason="a limit on the size of files is a matter of POSIX")
def test_a_save_that_fails_in_one_process_fails_at_once_in_all(tmp_path, begin_with):
    begin_with("""
        import resource
        from jaxgpt.checkpoint import Checkpoints
        save, settle, hard = Checkpoints.save, Checkpoints.settle, resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def save_on_full_disk(self, state, *rest):
            there = self.directory
            if (state.step, process) == (80, 0):
                self.directory = there / "no" / "folder"
            save(self, state, *rest)
            self.directory = there
            if (state.step, process) in ((40, 1), (60, 0)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

        def make_room(self, wait=True):
            try:
                settle(self, wait)
            finally:
                if wait:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        Checkpoints.save, Checkpoints.settle = save_on_full_disk, make_room
    """)
    out = " ".join(finish(train(tmp_path, [*new(tmp_path, "two"), *PAIRS], 2)).split())
    for step, process, reason in ((40, 1, "File too large"), (60, 0, "File too large"), (80, 0, "No such file")):
        assert re.search(rf"step {step} was not saved in \S+: process {process}: {reason}", out), out
    assert (tmp_path / "runs" / "two" / "checkpoints" / "120").is_dir()


def test_processes_wait_for_each_other_for_days(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_collective_timeout_seconds=5")
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: given.append((*args, os.environ["XLA_FLAGS"])))
    monkeypatch.setattr(join, "any_process", lambda value: value)
    monkeypatch.setattr(join, "_wait_for_port", lambda host, port: None)
    join.join("localhost:1", 2, 1)
    [(*args, flags)] = given
    assert args == ["localhost:1", 2, 1]
    assert flags.split() == [f"--xla_cpu_collective_timeout_seconds={seconds}" for seconds in (7 * 24 * 3600, 5)]


def test_what_cannot_be_joined_is_refused_before_anyone_waits(capsys):
    for words, said in (
        (["--coordinator", "localhost"], "expected HOST:PORT"),
        (["--coordinator", "localhost:99999", "--num-processes", "2", "--process-id", "1"], "expected HOST:PORT"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], "expected 0 to 1"),
        (["--num-processes", "2", "--process-id", "1"], "--coordinator HOST:PORT"),
    ):
        assert run_command(["train", "gpt-demo", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_process_0_that_is_nowhere_is_reported_and_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(join, "CONNECT_SECONDS", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # where nobody listens
        words = ["train", "gpt-demo", "--coordinator", address, "--num-processes", "2", "--process-id", "1"]
        assert run_command(words) == 2
    err = capsys.readouterr().err
    assert f"process 1 of 2 waits for the others at {address}" in err
    assert f"no process 0 at {address} for 0 s (" in err
    assert "give the address of process 0, --coordinator HOST:PORT" in err


def test_what_ends_the_first_process_ends_all(tmp_path):
    assert "nowhere.txt" in finish(train(tmp_path, ["gpt-demo", "--corpus", "nowhere.txt"], 2), 2)
