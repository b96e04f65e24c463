"""Settings of uvicorn, and timeouts that it lacks: idle clients, and those that stop reading, are disconnected."""

import asyncio
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.serve import limits


class Connections(dict["Connection", None]):
    """The open connections in order of arrival, at most `max_connections` of them.

    A connection is closed when its client has sent no complete request, or has read nothing of a response, for TIMEOUT
    seconds. If there are too many, the one whose client has been idle for longest is closed, so that idle clients
    cannot lock out others.
    """

    def __init__(self, max_connections: int):
        super().__init__()
        self.max_connections = max_connections

    def config(self, app: ASGIApp, log_level: str = "warning") -> uvicorn.Config:
        """The settings of a server of `app` whose connections these are."""
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level=log_level,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        config.load()
        wrapped: Any = partial(Connection, self, config.http_protocol_class)
        config.http_protocol_class = wrapped
        return config


class Connection(asyncio.Protocol):
    """Wraps uvicorn's `protocol`."""

    def __init__(self, others: Connections, protocol: Any, **options: Any):
        self.others, self.http = others, protocol(**options)
        self.http.app = partial(self.answer, self.http.app)
        self.answering, self.paused = 0, False
        self.timer: asyncio.TimerHandle | None = None
        """Closes the connection; None while the client waits for the server."""

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self.set(answering=self.answering + 1)
        try:
            await app(scope, receive, send)
        finally:  # the next response may have begun
            self.set(answering=self.answering - 1)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.http.connection_made(transport)
        self.others[self] = None
        self.set()
        if len(self.others) > self.others.max_connections:
            idle = [(other.timer.when(), other) for other in self.others if other.timer]
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

    def set(self, **state: int) -> None:
        """Start the timer when the client must act: send a request, or read the response; else stop it."""
        vars(self).update(state)
        waits = self.answering > 0 and not self.paused
        if self.timer and waits:
            self.timer.cancel()
            self.timer = None
        elif not self.timer and not waits and not self.transport.is_closing():
            self.unread = self.transport.get_write_buffer_size()
            self.timer = asyncio.get_running_loop().call_later(limits.TIMEOUT, self.time_out)

    def time_out(self) -> None:
        self.timer = None
        if self.transport.get_write_buffer_size() < self.unread:  # the client reads, if slowly
            self.set()
        else:
            self.close()

    def close(self) -> None:
        """Close at once: a graceful close would wait until the client has read the rest."""
        if self.timer:
            self.timer.cancel()
        self.others.pop(self, None)
        self.transport.abort()
