"""The server process: its socket, signals and shutdown."""

import asyncio
import ipaddress
import socket
from typing import Any

import uvicorn

from jaxgpt.config import UsageError
from jaxgpt.serve.app import application
from jaxgpt.serve.connection import Connections
from jaxgpt.serve.library import Library, Served
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.scheduler import Scheduler
from jaxgpt.serve.writer import Job, Writer
from jaxgpt.start import load_model

SHORTEST = 16
"""Characters of a token, at least."""


def serve(
    library: Library,
    host: str,
    port: int,
    limits: Limits,
    token: str = "",
    hosts: tuple[str, ...] = (),
    checkpoint: str = "best",
) -> None:
    """Serve until SIGINT or SIGTERM; then end every text where it is, and return.

    Raises:
      UsageError: a host that others can reach without a token, a weak token, or an unavailable port.
    """
    require_token(host, token)
    listening = _listen(host, port)

    def load(run: Served) -> Writer:
        config, params, tokenizer = load_model(run, checkpoint)
        return Writer(config, params, tokenizer.vocab_size, limits.places)

    scheduler = Scheduler(load, limits)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            """Unlike uvicorn's, does not raise the signal again at the end: the exit code is 0."""
            self.force_exit, self.should_exit = self.should_exit, True
            scheduler.stop()

    app = application(library, scheduler, {host, *hosts}, token)
    how = {"log_level": "warning", "access_log": False, "proxy_headers": False, "server_header": False}
    config = Connections(limits.max_requests + 99).config(app, timeout_graceful_shutdown=5, **how)
    if library.only:  # load it and compile its programs before anyone asks
        scheduler.submit(Job(library.run(library.only), [0], tokens=2))
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    print(f"{', '.join(library.names)}\nThe playground: {address}\nCtrl-C stops it.", flush=True)
    try:
        asyncio.run(Server(config).serve(sockets=[listening]))
    finally:
        scheduler.stop()
        scheduler.join()


def require_token(host: str, token: str) -> None:
    """Raises UsageError for a weak token, or for none where `host` is reachable from other machines."""
    if token and (len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError(f"the token is too easy: expected {SHORTEST} or more ASCII characters without blanks")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not token and not loopback:
        raise UsageError(
            f"other machines can reach {host}: set a token, JAXGPT_TOKEN=$(openssl rand -hex 16) jaxgpt serve ..."
        )


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UsageError(f"port is {port}, expected 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # early clients wait until the server accepts
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; try --port 0") from error
