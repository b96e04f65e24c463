"""Timeouts of connections, with a stand-in for the application."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from unittest import mock

import pytest
import uvicorn

from jaxgpt.serve import limits
from jaxgpt.serve.connection import Connections
from tests.serve import load

ASKED = b"GET /%s HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def app(scope, receive, send):
    """Answers /more endlessly, /late late, and anything else at once."""
    more = scope["path"] == "/more"
    if scope["path"] == "/late":
        await asyncio.sleep(0.6)
    runs = {"runs": [{"name": "broken", "problem": "none"}, {"name": "good"}, {"name": "old"}]}
    body = b"x" * 2**23 if more else json.dumps(runs).encode()
    headers = [] if more else [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    gone = asyncio.create_task(left(receive))
    while True:
        await send({"type": "http.response.body", "body": body, "more_body": more})
        if gone.done() or not more:
            gone.cancel()
            await asyncio.sleep(0.05)  # starlette also returns later than it sends
            return
        await asyncio.sleep(0)


async def left(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.fixture
def server(monkeypatch):
    """A server with at most 4 connections and a timeout of 0.3 s."""
    monkeypatch.setattr(limits, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections = Connections(4)
        server = uvicorn.Server(connections.config(app, log_level="critical"))
        server.connections = connections
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        server.address = listening.getsockname()
        try:
            yield server
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@contextlib.contextmanager
def connected(server, said=b""):
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(said)
        yield client


def disconnected(client):
    """Whether the server closes the connection."""
    try:
        while client.recv(2**16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_idle_clients_do_not_lock_out_others(server, monkeypatch):
    """At the limit, an idle connection is closed for each new one."""
    monkeypatch.setattr(limits, "TIMEOUT", 60)
    with contextlib.ExitStack() as stack:
        for i in range(12):
            stack.enter_context(connected(server, b"GET /" * (i % 2)))
        for _ in range(3):
            assert load.first_run(f"http://127.0.0.1:{server.address[1]}/") == "good"
        assert len(server.connections) <= 4


def test_a_connection_that_is_closed_as_its_request_arrives_logs_no_error(capsys):
    """The limit is reached between the request and the first step of its answer."""

    async def main():
        config = Connections(1).config(app)
        state = uvicorn.server.ServerState()
        first, second = (config.http_protocol_class(config=config, server_state=state, app_state={}) for _ in range(2))
        closed, other = (mock.Mock(**{"is_closing.return_value": False}) for _ in range(2))
        first.connection_made(closed)
        first.data_received(ASKED % b"")
        second.connection_made(other)
        closed.abort.assert_called_once()
        await asyncio.gather(*state.tasks)
        second.close()

    asyncio.run(main())
    assert capsys.readouterr().err == ""


def test_a_client_that_sends_no_complete_request_is_disconnected(server):
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        for said in (b"", b"GET / HTTP/1.1\r\nhost: loc", ASKED % b"" + b"GET"):
            stack.enter_context(connected(server, said))
        last = stack.enter_context(connected(server, ASKED % b"late"))
        assert last.recv(2**16).startswith(b"HTTP/1.1 200 OK"), "a client that waits for the server is not disconnected"
        assert 0.5 < time.monotonic() - began < 5
        assert len(server.connections) == 1
        assert disconnected(last)


def test_a_request_that_arrives_before_the_last_response_has_ended_is_answered(server):
    """Two in one packet: the second response begins before the application returns from the first."""
    with connected(server, ASKED % b"" + ASKED % b"late") as client:
        received = b""
        while received.count(b"200 OK") < 2 and (data := client.recv(2**16)):
            received += data
    assert received.count(b"200 OK") == 2


def test_a_body_after_the_response_keeps_no_connection_open(server):
    """Its bytes come one by one after the response, and none of them begins a new request."""
    with connected(server, b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n") as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5:
                client.sendall(b"x")
                time.sleep(0.02)
        assert 0.2 < time.monotonic() - began < 5


def test_a_client_that_reads_nothing_is_disconnected_and_a_slow_one_is_not(server):
    """The slow client reads less than one chunk of the response per timeout."""
    with connected(server, ASKED % b"more") as stuck, connected(server, ASKED % b"more") as slow:
        began = time.monotonic()
        while time.monotonic() - began < 1:
            assert slow.recv(2**17)
            time.sleep(0.02)
        assert len(server.connections) == 1, "the stuck one is gone"
        assert disconnected(stuck)
