"""SIGINT, SIGTERM and SIGHUP as a question that the loop can ask."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jaxgpt import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def heard() -> dict[int, Any]:
    """Each of SIGNALS with its handler now, but for those that are ignored and are to stay so: a run under nohup
    outlives its terminal."""
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    return {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}


@contextmanager
def interruption() -> Iterator[Callable[[], int]]:
    """Yield a function that tells which signal asked for the end, 0 if none did.

    The first one is only noted, and answered on stderr; a second one acts as it would have without this. Outside the
    main thread, where Python allows no handlers, nothing is noted.

    With several processes (`jax.distributed`) all must ask equally often, and all get the same answer: a signal to any
    of them is a signal to all.
    """
    received = 0

    def asked() -> int:
        return processes.most(received)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: object) -> None:
        nonlocal received
        received = number
        with suppress(OSError):  # a terminal that has gone
            os.write(2, b"\njaxgpt: finishing the steps under way, then saving; again to stop at once\n")
        for each, handler in before.items():
            signal.signal(each, handler)

    before = heard()
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
