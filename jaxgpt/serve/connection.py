"""Timeouts that uvicorn does not have: clients that send no request or do not read the response are disconnected."""

import asyncio
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.serve import limits


class Connections(dict[tuple[str, int], "Connection"]):
    """The open connections by client address, at most `most` of them.

    A connection is closed when its client has sent no complete request, or has read nothing of a response, for TIMEOUT
    seconds. A new connection beyond `most` closes the one whose client has been idle for longest, so that idle clients
    cannot lock out others.
    """

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def config(self, app: ASGIApp, **how: Any) -> uvicorn.Config:
        """The settings of a server whose connections these are."""

        async def tracked(scope: Scope, receive: Receive, send: Send) -> None:
            connection = self[scope["client"]]
            connection.set(answering=True)
            try:
                await app(scope, receive, send)
            finally:
                connection.set(answering=False)

        config = uvicorn.Config(tracked, http="h11", ws="none", lifespan="off", **how)
        config.load()
        made: Any = partial(Connection, self, config.http_protocol_class)
        config.http_protocol_class = made
        return config


class Connection(asyncio.Protocol):
    """Wraps uvicorn's protocol `kind`."""

    def __init__(self, others: Connections, kind: Any, **how: Any):
        self.others, self.http = others, kind(**how)
        self.answering = self.paused = False
        self.timer: asyncio.TimerHandle | None = None
        """Closes the connection; None while it is the server's turn."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.address = transport, transport.get_extra_info("peername")[:2]
        self.http.connection_made(transport)
        self.others[self.address] = self
        self.set()
        if len(self.others) > self.others.most:
            idle = [(other.timer.when(), other) for other in self.others.values() if other.timer]
            min(idle, key=lambda pair: pair[0])[1].close()  # of equal times, the first

    def connection_lost(self, error: Exception | None) -> None:
        self.close()
        self.http.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self.http.data_received(data)

    def pause_writing(self) -> None:
        self.http.pause_writing()
        self.set(paused=True)

    def resume_writing(self) -> None:
        self.http.resume_writing()
        self.set(paused=False)

    def set(self, **state: bool) -> None:
        """Start the timer when it becomes the client's turn: to send a request, or to read the response."""
        vars(self).update(state)
        if self.timer and self.answering and not self.paused:
            self.timer.cancel()
            self.timer = None
        elif not self.timer and not (self.answering and not self.paused) and not self.transport.is_closing():
            self.unread = self.transport.get_write_buffer_size()
            self.timer = asyncio.get_running_loop().call_later(limits.TIMEOUT, self.late)

    def late(self) -> None:
        self.timer = None
        if self.transport.get_write_buffer_size() < self.unread:  # it reads, if slowly
            self.set()
        else:
            self.close()

    def close(self) -> None:
        """At once: a graceful close would wait until the client has read the rest."""
        if self.timer:
            self.timer.cancel()
        self.others.pop(self.address, None)
        self.transport.abort()
