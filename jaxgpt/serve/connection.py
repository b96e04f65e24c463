"""A connection that keeps nobody waiting: who neither asks nor takes the answer makes room for others."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.serve import limits


class Connection(H11Protocol):
    """It is broken off when its client has sent no whole request, or taken nothing of an answer, for PATIENCE seconds.

    Where there are as many as there may be, the one whose client has been waited for the longest goes at once: silence
    shuts nobody out. Broken off, not closed: that would wait until the client has taken the rest.
    """

    due: asyncio.TimerHandle | None = None
    """When it is broken off; None while the client waits for the server."""
    untaken = 0
    """Bytes of the answer that the client had not taken when the count began."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.limit_concurrency and len(self.connections) >= self.limit_concurrency:
            others: Any = self.connections
            if waits := [each for each in others if each.due]:
                oldest = min(waits, key=lambda each: each.due.when())
                oldest.transport.abort()
                others.discard(oldest)  # now, not at the next turn of the loop: many may come in one
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def _watch(self) -> None:
        """Count the seconds while it is the client's turn: to ask for something, or to take what it is sent."""
        served = self.cycle and not self.cycle.response_complete and not self.flow.write_paused
        if served:
            self._end_watch()
        elif not self.due:
            self.untaken = self.transport.get_write_buffer_size()
            self.due = self.loop.call_later(limits.PATIENCE, self._late)

    def _end_watch(self) -> None:
        if self.due:
            self.due.cancel()
        self.due = None

    def _late(self) -> None:
        self.due = None
        if self.transport.get_write_buffer_size() < self.untaken:  # slow is not silent
            self._watch()
        else:
            self.transport.abort()
