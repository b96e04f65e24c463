"""The server process: options that it refuses, 32 clients at once, and shutdown."""

import importlib.machinery
import importlib.util
import io
import itertools
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from jaxgpt import cli
from jaxgpt.config import UsageError
from jaxgpt.serve import server
from tests.processes import serving
from tests.serve import load


def test_many_clients_get_complete_texts_and_a_signal_stops_the_server(runs):
    with serving("cat", "--runs-dir", runs, "--max-tokens", 10**6) as (process, address):
        where = urlsplit(address)
        silent = [socket.create_connection((where.hostname, where.port)) for _ in range(200)]
        load.run_clients(address, "cat", 32, 1, tokens=40)  # compile, and fill caches
        before = load.resident_bytes(process.pid)
        tally = load.run_clients(address, "cat", 32, 1, tokens=40)
        assert not tally.errors
        assert tally.texts >= 32
        assert {seed: len(texts) for seed, texts in tally.by_seed.items()} == {0: 1, 1: 1, 2: 1, 3: 1}
        assert load.resident_bytes(process.pid) < before + 4 * 2**20, "a text that is kept takes about 30 KiB"
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
    ("growth", "code", "error", "result"),
    [(0, 0, "", 0), (17 * 2**20, 0, "", 1), (0, 1, "", 1), (0, 0, "broken", 1)],
)
def test_serve_load_fails_if_the_server_leaks_exits_badly_or_loses_a_text(monkeypatch, growth, code, error, result):
    """With a stand-in for a server of two runs."""
    path = str(Path(__file__).parents[2] / "scripts" / "serve_load")
    loader = importlib.machinery.SourceFileLoader("serve_load", path)
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader("serve_load", loader))
    loader.exec_module(script)

    class Server:
        pid = 0
        stdout = io.StringIO("new, old\nThe playground: http://localhost:1/\n")

        def __init__(self, *args, **kwargs):
            pass

        def terminate(self):
            pass

        def wait(self, seconds):
            return code

    def run_clients(address, run, clients, seconds, tokens):
        assert run == "old"
        time.sleep(0.05)
        return load.Tally(1, 1, 1.0, [0.1], {1: {(1,)}}, load.Counter([error] if error else []))

    sizes = itertools.count(0, growth)
    monkeypatch.setattr(script.subprocess, "Popen", Server)
    monkeypatch.setattr(load, "run_clients", run_clients)
    monkeypatch.setattr(load, "first_run", {"http://localhost:1/": "old"}.get)
    monkeypatch.setattr(load, "resident_bytes", lambda pid: next(sizes))
    monkeypatch.setattr("sys.argv", ["serve_load", "runs", "--clients", "1", "--seconds", "0.1", "--rounds", "1"])
    assert script.main() == result


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none"], "no run 'none' in runs"),
        (["RUNS", "--host", "0.0.0.0"], "other machines can reach 0.0.0.0: set a token"),
        (["RUNS", "--host", "example.org"], "other machines can reach example.org"),
        (["RUNS", "--host", "127.0.0.1:80"], "--host is '127.0.0.1:80', expected an IP address, or a name in ASCII"),
        (["RUNS", "--host", ""], "--host is '', expected an IP address"),
        (["RUNS", "--allow-host", "https://my.name"], "--allow-host is 'https://my.name', expected an IP address"),
        (["RUNS", "--token", "short"], "the token is too weak"),
        (["RUNS", "--token", "a token with blanks in it"], "the token is too weak"),
        (["RUNS", "--port", "70000"], "port is 70000"),
        (["RUNS", "--places", "0"], "places is 0, expected 1 to 2147483647"),
        (["RUNS", "--max-tokens", "3000000000"], "max_tokens is 3000000000, expected 1 to 2147483647"),
        (["RUNS", "--host", "192.0.2.1", "--port", "0", "--token", "x" * 16], "try --host 127.0.0.1"),  # of RFC 5737
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all/one").mkdir(parents=True)
    (tmp_path / "all/one/config.json").write_text("{}")
    assert cli.run_command(["serve", *(word.replace("RUNS", "all") for word in args)]) == 2
    assert message in capsys.readouterr().err


def test_a_server_loads_the_checkpoint_asked_for_and_writes_only_ids_of_its_vocabulary(library, monkeypatch):
    loaded = []

    class Loading:
        """Loads the run of a job at once, and serves nothing."""

        def __init__(self, load, limits):
            self.load = load

        def submit(self, job):
            self.load(job.run)
            raise UsageError("enough")

    def load_model(run, checkpoint="best"):
        return SimpleNamespace(vocab_size=16), checkpoint, SimpleNamespace(vocab_size=11)

    monkeypatch.setattr(server, "_listen", lambda host, port: None)
    monkeypatch.setattr(server, "Scheduler", Loading)
    monkeypatch.setattr(server, "load_model", load_model)
    monkeypatch.setattr(server, "Writer", lambda *args: loaded.extend(args[1:]))
    for checkpoint in ("last", "best"):
        words = ["serve", str(library.folder / "one"), "--checkpoint", checkpoint, "--places", "3"]
        assert cli.run_command(words) == 2
    assert loaded == ["last", 11, 3, "best", 11, 3]


def test_a_taken_port_is_refused(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.run_command(["serve", str(tmp_path), "--port", str(other.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "cannot listen on" in error
    assert "try --port 0" in error
