"""The server as a process: what it refuses to start with, 32 clients at once, and how it ends."""

import signal

import pytest

from jaxgpt import cli
from jaxgpt.serve import load
from tests.processes import serving


def test_many_clients_lose_nothing_and_a_signal_ends_it_while_they_read(runs):
    with serving("cat", "--runs-dir", runs, "--max-tokens", 10**6) as (process, address):
        load.press(address, "cat", 32, 0.1, tokens=40)  # what must be compiled
        before = load.resident(process.pid)
        tally = load.press(address, "cat", 32, 2, tokens=40)
        assert not tally.faults
        assert tally.texts >= 32
        assert {seed: len(texts) for seed, texts in tally.by_seed.items()} == {0: 1, 1: 1, 2: 1, 3: 1}
        assert load.resident(process.pid) < before + 30 * 2**20
        reading = [load.write(address, {"run": "cat", "prompt": "the", "tokens": 10**6}) for _ in range(3)]
        for text in reading:
            assert next(text)[0] == "start"
            assert next(text)[0] == "tokens"
        process.send_signal(signal.SIGTERM)
        for text in reading:
            *_, (name, told) = text
            assert (name, told["error"]) == ("end", "the server is stopping")
        assert process.wait(20) == 0
        assert process.stdout.read() == "Ctrl-C ends it.\n", "no traceback"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "no run 'none' in runs"),
        (["RUNS", "--host", "0.0.0.0"], "0.0.0.0 can be reached by others: a token is needed"),
        (["RUNS", "--host", "example.org"], "example.org can be reached by others"),
        (["RUNS", "--token", "short"], "the token is too easy"),
        (["RUNS", "--token", "a token with blanks in it"], "the token is too easy"),
        (["RUNS", "--port", "70000"], "port is 70000"),
        (["RUNS", "--places", "0"], "places is 0, expected 1 or more"),
    ],
)
def test_what_it_does_not_start_with(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all/one").mkdir(parents=True)
    (tmp_path / "all/one/config.json").write_text("{}")
    assert cli.run_verb(["serve", *(word.replace("RUNS", "all") for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path, capsys):
    import socket

    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.run_verb(["serve", str(tmp_path), "--port", str(other.getsockname()[1])]) == 2
    assert "cannot be listened on" in capsys.readouterr().err
