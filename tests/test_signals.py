import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxgpt.signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_first_signal_is_noted_and_a_second_one_acts(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append("second"))
    try:
        with stop_signals() as asked:
            assert asked() == 0
            os.kill(os.getpid(), number)
            assert asked() == number
            assert heard == []
            os.kill(os.getpid(), number)
            assert heard == ["second"]
        assert signal.getsignal(number) is not before
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_sent_twice_at_once_counts_once(number, monkeypatch):
    heard, slept = [], []
    before = signal.signal(number, lambda *_: heard.append("second"))

    def again(seconds):
        slept.append(seconds)
        os.kill(os.getpid(), number)

    monkeypatch.setattr("jaxgpt.signals.time.sleep", again)
    try:
        with stop_signals() as asked:
            os.kill(os.getpid(), number)
            assert asked() == number
            assert heard == []
    finally:
        signal.signal(number, before)
    assert number == signal.SIGHUP or sum(slept) <= 0.05, "a person needs longer for a second Ctrl-C, which must act"


def test_in_another_thread_nothing_is_noted():
    import threading

    told = []

    def ask():
        with stop_signals() as asked:
            told.append(asked())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert told == [0]


def test_what_was_ignored_stays_ignored():
    """As under nohup, which a run is to outlive its terminal by."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


ONE_OF_TWO = """
import sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxgpt.signals import stop_signals
with stop_signals() as asked:
    for step in range(1, 2000):
        print("step", step, flush=True)
        if number := asked():
            print("stopped at", step, "by", int(number), flush=True)
            break
        time.sleep(0.05)
"""


@pytest.mark.smoke
def test_of_several_processes_all_stop_after_the_same_step():
    """A signal to one of two; test_processes.py sends another to all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", ONE_OF_TWO, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    try:
        for process in both:  # in the loop
            while (line := process.stdout.readline()) != "step 3\n":
                assert line, process.stderr.read()
        both[1].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=300)[0].splitlines()[-1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert ends[0] == ends[1]
    assert ends[0].startswith("stopped at ")
    assert ends[0].endswith("by 15")
