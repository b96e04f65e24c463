"""A socket, signals, and a clean end: what holds the application up."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxgpt.config import UsageError
from jaxgpt.serve.library import Library, Served
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.scheduler import Scheduler, warm
from jaxgpt.serve.writer import Writer
from jaxgpt.signals import SIGNALS
from jaxgpt.start import load_model

SHORTEST = 16
"""Characters of a token that is worth having."""


def serve(
    library: Library,
    host: str,
    port: int,
    limits: Limits,
    token: str = "",
    hosts: tuple[str, ...] = (),
    checkpoint: str = "best",
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until a signal asks for the end; then every text ends where it is, and all clients are told.

    Raises:
      UsageError: a host beyond this machine without a token, a poor token, or a port that cannot be had.
    """
    try:
        import uvicorn

        from jaxgpt.serve.app import application
        from jaxgpt.serve.connection import Connection
    except ImportError as error:
        from jaxgpt.config import MissingExtraError

        raise MissingExtraError("the playground", error.name or "starlette", "serve") from error
    require_token(host, token)
    listening = _listen(host, port)

    def load(run: Served) -> Writer:
        config, params, tokenizer = load_model(run, checkpoint)
        return Writer(config, params, tokenizer.vocab_size, limits.places)

    scheduler = Scheduler(load, limits)

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            with _noted(self._end):
                yield

        def _end(self) -> None:
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            scheduler.stop()
            await super().shutdown(sockets)

    app: Any = application(library, scheduler, {host, *hosts}, token)
    server = Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=limits.max_requests + 100,
            timeout_graceful_shutdown=5,
        )
    )
    if library.only:
        warm(scheduler, library.run(library.only))
    announce(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/")
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        scheduler.stop()
        scheduler.join()


def require_token(host: str, token: str) -> None:
    """Check that who can reach `host` is either on this machine or must show a token.

    Raises:
      UsageError: it is open to others without one, or the token is none.
    """
    if token and (len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError(f"the token is too easy: expected {SHORTEST} or more ASCII characters without blanks")
    if not token and not _is_loopback(host):
        raise UsageError(
            f"{host} can be reached by others: a token is needed, JAXGPT_TOKEN=$(openssl rand -hex 16) jaxgpt serve ..."
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UsageError(f"port is {port}, expected 0 (any that is free) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # from now on, who comes early is kept waiting, not refused
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(f"{host}:{port} cannot be listened on: {error.strerror}; try --port 0") from error


@contextmanager
def _noted(act: Callable[[], None]) -> Iterator[None]:
    """`act` on the first signal that asks for the end; a second one acts as it would have without this."""
    before = {
        number: handler or signal.SIG_DFL
        for number in SIGNALS
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }

    def note(number: int, frame: object) -> None:
        act()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
