"""The server process: its socket, signals and shutdown."""

import asyncio
import errno
import ipaddress
import os
import re
import socket
from typing import Any

import uvicorn

from jaxgpt.config import UsageError
from jaxgpt.run import Run
from jaxgpt.serve.app import application
from jaxgpt.serve.cli import Serve
from jaxgpt.serve.library import Library
from jaxgpt.serve.scheduler import Scheduler
from jaxgpt.serve.writer import Job, Writer
from jaxgpt.start import load_model

SHORTEST = 16
"""Least length of a token."""


def serve(options: Serve) -> None:
    """Serve until SIGINT or SIGTERM, then end all texts and return.

    Raises:
      UsageError: no such run; a limit below 1; an invalid host; a weak token, or none although other machines can reach
        the host; or an unavailable port.
    """
    host, limits = options.host.strip("[]"), options.limits.check()
    require_host("--host", host)
    for name in options.allow_host:
        require_host("--allow-host", name)
    library = Library.at(options.served, options.runs_dir)
    token = options.token or os.environ.get("JAXGPT_TOKEN", "")
    require_token(host, token)
    listening = _listen(host, options.port)

    def load(run: Run) -> Writer:
        config, params, tokenizer = load_model(run, options.checkpoint)
        return Writer(config, params, tokenizer.vocab_size, limits.places)

    scheduler = Scheduler(load, limits)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            """Like uvicorn's, but does not raise the signal again at the end, so that the exit code is 0."""
            self.force_exit, self.should_exit = self.should_exit, True
            scheduler.stop()

    app = application(library, scheduler, {host, *options.allow_host}, token)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=512,  # connections; more get 503, before the usual limit of 1,024 open files
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    if library.only:  # load it and compile its programs before the first request
        scheduler.submit(Job(library.run(library.only), [0], tokens=2))
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    print(f"{', '.join(library.names)}\nThe playground: {address}\nCtrl-C stops it.", flush=True)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        scheduler.stop()
        scheduler.join()


def require_host(option: str, host: str) -> None:
    """Raise a UsageError unless `host` is an IP address or a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
            wanted = "an IP address, or a name in ASCII without scheme and port"
            raise UsageError(f"{option} is {host!r}, expected {wanted}") from None


def require_token(host: str, token: str) -> None:
    """Raise UsageError if the token is weak, or missing although other machines can reach `host`."""
    if token and (len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError(f"the token is too weak: expected {SHORTEST} or more ASCII characters without spaces")
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
        option = "--port 0" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host 127.0.0.1"
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; try {option}") from error
