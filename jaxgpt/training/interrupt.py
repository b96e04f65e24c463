"""SIGINT and SIGTERM as a question that the loop can ask."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruption() -> Iterator[Callable[[], int]]:
    """Yield a function that tells which signal asked for the end, 0 if none did.

    The first SIGINT or SIGTERM is only noted; a second one acts as it would have without this. Outside the main
    thread, where Python allows no handlers, nothing is noted.
    """
    received = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, frame: object) -> None:
        nonlocal received
        received = number
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
