"""The server process: options that it refuses, 32 clients at once, and shutdown."""

import importlib.machinery
import importlib.util
import io
import itertools
import signal
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jaxgpt import cli
from tests.processes import serving
from tests.serve import load


def test_many_clients_lose_nothing_and_a_signal_stops_the_server_while_they_read(runs):
    with serving("cat", "--runs-dir", runs, "--max-tokens", 10**6) as (process, address):
        where = urlsplit(address)
        silent = [socket.create_connection((where.hostname, where.port)) for _ in range(200)]
        load.press(address, "cat", 32, 1, tokens=40)  # compiles, and fills caches
        before = load.resident(process.pid)
        tally = load.press(address, "cat", 32, 1, tokens=40)
        assert not tally.faults
        assert tally.texts >= 32
        assert {seed: len(texts) for seed, texts in tally.by_seed.items()} == {0: 1, 1: 1, 2: 1, 3: 1}
        assert load.resident(process.pid) < before + 4 * 2**20, "a text that is kept takes about 30 KiB"
        for client in silent:
            client.close()
        reading = [load.write(address, {"run": "cat", "prompt": "the", "tokens": 10**6}) for _ in range(3)]
        for text in reading:
            assert next(text)[0] == "start"
            assert next(text)[0] == "tokens"
        process.send_signal(signal.SIGTERM)
        for text in reading:
            *_, (name, tree) = text
            assert (name, tree["error"]) == ("end", "the server is stopping")
        assert process.wait(20) == 0
        assert process.stdout.read() == "Ctrl-C stops it.\n", "no traceback"


@pytest.mark.parametrize(
    ("growth", "code", "fault", "result"),
    [(0, 0, "", 0), (17 * 2**20, 0, "", 1), (0, 1, "", 1), (0, 0, "broken", 1)],
)
def test_serve_load_fails_if_the_server_leaks_exits_badly_or_loses_a_text(monkeypatch, growth, code, fault, result):
    """With a stand-in for a server of two runs."""
    path = str(Path(__file__).parents[2] / "scripts" / "serve_load")
    loader = importlib.machinery.SourceFileLoader("serve_load", path)
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader("serve_load", loader))
    loader.exec_module(script)

    class Server:
        pid = 0
        stdout = io.StringIO("new, old\nThe playground: http://localhost:1/\n")

        def __init__(self, *words, **how):
            pass

        def terminate(self):
            pass

        def wait(self, seconds):
            return code

    def press(address, run, clients, seconds, tokens):
        assert run == "old"
        time.sleep(0.05)
        return load.Tally(1, 1, 1.0, [0.1], {1: {(1,)}}, load.Counter([fault] if fault else []))

    sizes = itertools.count(0, growth)
    monkeypatch.setattr(script.subprocess, "Popen", Server)
    monkeypatch.setattr(load, "press", press)
    monkeypatch.setattr(load, "first_run", {"http://localhost:1/": "old"}.get)
    monkeypatch.setattr(load, "resident", lambda pid: next(sizes))
    monkeypatch.setattr("sys.argv", ["serve_load", "runs", "--clients", "1", "--seconds", "0.1", "--rounds", "1"])
    assert script.main() == result


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "no run 'none' in runs"),
        (["RUNS", "--host", "0.0.0.0"], "other machines can reach 0.0.0.0: set a token"),
        (["RUNS", "--host", "example.org"], "other machines can reach example.org"),
        (["RUNS", "--token", "short"], "the token is too weak"),
        (["RUNS", "--token", "a token with blanks in it"], "the token is too weak"),
        (["RUNS", "--port", "70000"], "port is 70000"),
        (["RUNS", "--places", "0"], "places is 0, expected 1 to 2147483647"),
        (["RUNS", "--max-tokens", "3000000000"], "max_tokens is 3000000000, expected 1 to 2147483647"),
        (["RUNS", "--host", "192.0.2.1", "--port", "0", "--token", "x" * 16], "try --host 127.0.0.1"),  # of RFC 5737
    ],
)
def test_it_refuses_to_start(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all/one").mkdir(parents=True)
    (tmp_path / "all/one/config.json").write_text("{}")
    assert cli.run_command(["serve", *(word.replace("RUNS", "all") for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_a_taken_port_is_refused(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.run_command(["serve", str(tmp_path), "--port", str(other.getsockname()[1])]) == 2
    said = capsys.readouterr().err
    assert "cannot listen on" in said
    assert "try --port 0" in said
