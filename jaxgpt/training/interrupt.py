"""SIGINT, SIGTERM and SIGHUP as a question that the loop can ask."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@contextmanager
def interruption() -> Iterator[Callable[[], int]]:
    """Yield a function that tells which signal asked for the end, 0 if none did.

    The first one is only noted, and answered on stderr; a second one acts as it would have without this. Outside the
    main thread, where Python allows no handlers, nothing is noted.
    """
    received = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, frame: object) -> None:
        nonlocal received
        received = number
        with suppress(OSError):  # a terminal that has gone
            os.write(2, b"\njaxgpt: finishing the steps under way, then saving; again to stop at once\n")
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) or signal.SIG_DFL for number in SIGNALS}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
