import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxgpt.signals import SIGNALS, stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_is_recorded_and_second_one_takes_effect(number):
    handled = []

    def handle(*_):
        handled.append("second")

    before = signal.signal(number, handle)
    try:
        with stop_signals() as received:
            assert received() == 0
            os.kill(os.getpid(), number)
            assert received() == number
            assert handled == []
            os.kill(os.getpid(), number)
            assert handled == ["second"]
        assert signal.getsignal(number) is handle
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_sent_twice_at_once_counts_once(number, monkeypatch):
    handled, slept = [], []
    before = signal.signal(number, lambda *_: handled.append("second"))

    def send_again(seconds):
        slept.append(seconds)
        os.kill(os.getpid(), number)

    monkeypatch.setattr("jaxgpt.signals.time.sleep", send_again)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), number)
            assert received() == number
            assert handled == []
    finally:
        signal.signal(number, before)
    assert number == signal.SIGHUP or sum(slept) <= 0.05, (
        "a second Ctrl-C by a person comes later, and must take effect"
    )


def test_other_threads_record_no_signal():
    import threading

    found = []

    def poll():
        with stop_signals() as received:
            found.append(received())

    thread = threading.Thread(target=poll)
    thread.start()
    thread.join()
    assert found == [0]


def test_ignored_signal_stays_ignored():
    """As under nohup, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_restored_if_no_signal_comes():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_signals() as received:
        assert received() == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signal_is_recorded_if_its_terminal_is_gone(monkeypatch):
    def write(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("jaxgpt.signals.os", SimpleNamespace(write=write))
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received() == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handler_that_python_cannot_read_becomes_the_default_one(monkeypatch):
    """`getsignal` returns None for a handler of a library in C."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with monkeypatch.context() as patched:
            patched.setattr("jaxgpt.signals.signal.getsignal", lambda number: None)
            with stop_signals() as received:
                assert received() == 0
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ONE_OF_TWO = """
import sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxgpt.signals import stop_signals
with stop_signals() as received:
    for step in range(1, 2000):
        print("step", step, flush=True)
        if number := received():
            print("stopped at", step, "by", int(number), flush=True)
            break
        time.sleep(0.05)
"""


@pytest.mark.smoke
def test_all_processes_stop_after_the_same_step():
    """The signal goes to one of two processes; test_processes.py sends one to all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", ONE_OF_TWO, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    try:
        for process in both:  # until both are in the loop
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
