"""Settings of uvicorn, and timeouts that it lacks: idle clients, and those that stop reading, are disconnected."""

import asyncio
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.serve import limits


def config(app: ASGIApp, max_connections: int, log_level: str = "warning") -> uvicorn.Config:
    """The settings of a server that has at most `max_connections` open connections, each a `Connection`."""
    return uvicorn.Config(
        app,
        http=partial(Connection, max_connections),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_level=log_level,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


class Connection(H11Protocol):
    """A connection that is closed when its client has sent no complete request, or has read nothing of a response, for
    TIMEOUT seconds.

    If there are more than `max_connections`, the one whose client has been idle for longest is closed, so that idle
    clients cannot lock out others.
    """

    def __init__(self, max_connections: int, **options: Any):
        super().__init__(**options)
        self.max_connections = max_connections
        self.answering = self.paused = False
        self.timer: asyncio.TimerHandle | None = None
        """Closes the connection; None while the client waits for the server."""
        self.app, self.inner = self.track, self.app

    async def track(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.set(answering=True)
        try:
            await self.inner(scope, receive, send)
        finally:
            self.set(answering=False)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.set()
        connections: Any = self.connections  # all that are open
        if len(connections) > self.max_connections:
            idle = [other for other in connections if other.timer]
            min(idle, key=lambda other: (other.timer.when(), other is self)).close()

    def connection_lost(self, error: Exception | None) -> None:
        self.close()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.set(paused=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.set(paused=False)

    def set(self, **state: bool) -> None:
        """Start the timer when the client must act: send a request, or read the response; else stop it."""
        vars(self).update(state)
        waits = self.answering and not self.paused
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
            self.timer = None
        self.transport.abort()
