"""SIGINT, SIGTERM and SIGHUP as a question that the training loop asks."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jaxgpt import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def handlers() -> dict[int, Any]:
    """The handler of each of SIGNALS, without the ignored ones, which stay so: a run under nohup outlives its
    terminal."""
    found = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    return {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal which asked the process to stop, 0 if none did.

    The first signal is only noted, and answered on stderr; a second one acts as without this. Outside the main thread,
    where Python allows no handlers, none is noted. With several processes (`jax.distributed`) all must ask equally
    often, and all get the same answer: a signal to any of them is a signal to all.
    """
    received = 0

    def asked() -> int:
        return processes.any_process(received)

    def note(number: int, frame: object) -> None:
        nonlocal received
        received = number
        with suppress(OSError):  # the terminal has gone
            os.write(2, b"\njaxgpt: finishing the steps under way, then saving; again to stop at once\n")
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = handlers() if threading.current_thread() is threading.main_thread() else {}
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
