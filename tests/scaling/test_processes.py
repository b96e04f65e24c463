"""A run in several processes is the run in one, and goes on in any number of them."""

import os
import signal

import numpy as np
import pytest

from jaxgpt.cli import run_verb
from tests.faults.groups import BOUND, curve, ended, members, new, on, train, wait_for_lines


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


@pytest.mark.parametrize(("processes", "devices", "mesh"), [(2, 2, "data=2,fsdp=2"), (4, 1, "auto")])
def test_several_processes_train_as_one_does(tmp_path, unbroken, processes, devices, mesh):
    out = finish(train(tmp_path, [*new(tmp_path, "many"), "--mesh", mesh], processes, devices))
    assert out.count("validation loss") == 7  # told by one process
    np.testing.assert_allclose(curve(tmp_path, "many"), unbroken, atol=BOUND, rtol=0)


def test_killed_it_goes_on_with_another_number_of_processes_and_devices(tmp_path, unbroken):
    """Two processes, one of them killed; one process, killed; then two again."""
    for processes, devices in ((2, 2), (1, 1)):
        before = len(curve(tmp_path, "two"))
        process = train(tmp_path, on(tmp_path, "two"), processes, devices)
        wait_for_lines(tmp_path, "two", before + 30, process)
        os.kill(members(process)[-1], signal.SIGKILL)
        finish(process, 137 if processes > 1 else -9)
    finish(train(tmp_path, on(tmp_path, "two"), 2, 1))
    np.testing.assert_allclose(curve(tmp_path, "two"), unbroken, atol=BOUND, rtol=0)


def test_a_signal_to_the_group_saves_and_ends_it(tmp_path):
    process = train(tmp_path, [*new(tmp_path, "two"), "--steps", "100000"], 2)
    wait_for_lines(tmp_path, "two", 30, process)
    process.send_signal(signal.SIGINT)
    out = finish(process, 130)
    assert "interrupted at step" in out
    assert out.count("Go on with") == 1


def test_what_cannot_be_joined_is_refused_before_anyone_waits(capsys):
    for words, said in (
        (["--coordinator", "localhost"], "expected HOST:PORT"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], "expected 0 to 1"),
        (["--num-processes", "2", "--process-id", "1"], "--coordinator HOST:PORT"),
    ):
        assert run_verb(["train", "gpt-demo", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_ends_the_first_process_ends_all(tmp_path):
    assert "nowhere.txt" in finish(train(tmp_path, ["gpt-demo", "--corpus", "nowhere.txt"], 2), 2)
