"""SIGINT, SIGTERM and SIGHUP, polled by the training loop."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from jaxgpt import processes

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal received so far, 0 if none.

    The first signal is recorded and acknowledged on stderr; the second one has its usual effect. Ignored signals stay
    ignored, so a run under nohup outlives its terminal. Only the main thread can install handlers; in other threads the
    result is always 0. All processes must call the function equally often, and get a signal that any of them received.
    """
    received, main = 0, threading.current_thread() is threading.main_thread()
    handled = [number for number in SIGNALS if main and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in handled}

    def handle(number: int, frame: object) -> None:
        nonlocal received
        if received:  # during the sleep below
            return
        received = number
        with suppress(OSError):  # the terminal is gone
            os.write(2, b"\njaxgpt: finishing the steps under way, then saving; again to stop at once\n")
        # When a terminal closes, its shell and the kernel each send SIGHUP; a wrapper may pass on the SIGINT of Ctrl-C.
        time.sleep(0.05 if number == signal.SIGINT else 0.2)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in handled:
        signal.signal(number, handle)
    try:
        yield lambda: processes.any_process(received)
    finally:
        restore()
