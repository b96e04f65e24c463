"""SIGINT, SIGTERM and SIGHUP as a question that the training loop asks."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from jaxgpt import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal which asked the process to stop, 0 if none did.

    The first signal is only noted, and answered on stderr; a second one acts as without this. Ignored ones stay so: a
    run under nohup outlives its terminal. Outside the main thread, where Python allows no handlers, none is noted. With
    several processes all must ask equally often, and all get the same answer: a signal to any is a signal to all.
    """
    received = 0
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def handle(number: int, frame: object) -> None:
        nonlocal received
        received = number
        with suppress(OSError):  # the terminal has gone
            os.write(2, b"\njaxgpt: finishing the steps under way, then saving; again to stop at once\n")
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else handle)
    try:
        yield lambda: processes.any_process(received)
    finally:
        restore()
