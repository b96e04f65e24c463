"""The responses of the application, in process."""

import asyncio
import dataclasses
import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt.cli.options import parse
from jaxgpt.run import Run, RunError
from jaxgpt.serve.app import _events, application, described
from jaxgpt.serve.batch import Drawn, Settings
from jaxgpt.serve.cli import Serve
from jaxgpt.serve.library import Library
from jaxgpt.serve.requests import to_write
from jaxgpt.serve.scheduler import Scheduler
from jaxgpt.serve.writer import End, Job, Looked, Piece, Writer
from jaxgpt.start import load_model
from jaxgpt.tokenizer import ByteTokenizer
from tests.serve.client import JSON, Call, call
from tests.serve.conftest import LIMITS


def test_text_equals_that_of_the_writer_and_continues_from_any_token(app, library):
    """The writer's text equals that of `generate`: tests/serve/test_writer.py."""
    config, params, tokenizer = load_model(library.run("one"))
    request = {"run": "one", "prompt": "the cat", "tokens": 30, "temperature": 0.9, "top_k": 5, "seed": 3}
    answer = call(app, "POST", "/api/write", request)
    assert answer.status == 200
    (first, started), *_, (last, ended) = answer.events
    assert (first, last, ended) == ("start", "end", {"text": "", "error": ""})
    assert "".join(text for _, text in started["prompt"]) == "the cat"
    ids = tokenizer.encode("the cat").tolist()
    writer, pieces = Writer(config, params, tokenizer.vocab_size, LIMITS.places), []
    job = Job(library.run("one"), ids, 30, Settings(0.9, 5, 1.0, 0.0), seed=3, put=pieces.append)
    while not writer.turn([job]):
        pass
    assert answer.ids == [i for piece in pieces for i in piece.drawn.token.tolist()]
    tokens = [each for name, tree in answer.events if name == "tokens" for each in tree["tokens"]]
    assert "".join(each["text"] for each in tokens) == tokenizer.decode(answer.ids)
    for each in tokens:
        assert {other["id"]: other["p"] for other in each["likely"]}.get(each["id"], each["p"]) == each["p"]
        assert sum(other["p"] for other in each["likely"]) <= 1.001
    again = call(app, "POST", "/api/write", request | {"prompt": [*ids, *answer.ids[:4]], "tokens": 3})
    assert "".join(text for _, text in again.events[0][1]["prompt"]) == "the cat" + tokenizer.decode(answer.ids[:4])


def test_line_ends_of_a_prompt_become_those_of_the_training_text(library):
    for prompt in ("the\ncat", "the\r\ncat", "the\rcat"):
        job = to_write(json.dumps({"run": "one", "prompt": prompt}).encode(), library, LIMITS)
        assert job.ids == job.run.tokenizer.encode("the\ncat").tolist()


def test_look_has_attention_and_likely_tokens(app):
    look = call(app, "POST", "/api/look", {"run": "one", "ids": [1, 2, 3]}).tree
    ((head, other),) = look["attention"]
    assert len(head) == len(other) == 3
    assert sum(head) == pytest.approx(1, abs=1e-4)
    assert look["likely"][0]["p"] >= look["likely"][1]["p"]
    assert call(app, "POST", "/api/look", {"run": "pairs", "ids": [1, 2, 3]}).tree["attention"] == []


def test_parts_of_characters_are_shown_as_bytes():
    part, whole = described(ByteTokenizer(), np.array([0xC3, 97]), np.array([0.5, 0.25]))
    assert part == {"id": 0xC3, "text": "", "shown": r"\xc3", "p": 0.5}
    assert whole == {"id": 97, "text": "a", "p": 0.25}


def test_small_probabilities_are_not_rounded_to_zero():
    """At temperature 2, GPT-2 often draws tokens below 1e-6."""
    found = described(ByteTokenizer(), np.arange(3), np.array([1.234567e-7, 1e-30, np.nan], np.float32))
    assert [each["p"] for each in found] == [1.23457e-7, 1e-30, 0]


def test_a_run_without_a_checkpoint_and_without_a_line_feed_is_listed(library, app):
    pairs = library.run("pairs")
    assert library.run("pairs") is pairs
    assert summary_of(app, "pairs")["start"] == "\n"
    model = dataclasses.replace(pairs.config.model, vocab_size=3)
    meta = pairs.corpus_meta | {"tokenizer": {"kind": "char", "chars": "abc"}}
    Run.create(library.folder, "anew", dataclasses.replace(pairs.config, model=model), meta)
    assert (summary_of(app, "anew")["start"], summary_of(app, "anew")["vocabulary"]) == ("a", 3)
    assert "problem" not in summary_of(app, "pairs")
    (library.folder / "anew" / "checkpoints" / "20.unfinished").mkdir(parents=True)
    assert summary_of(app, "anew")["problem"] == "it has no checkpoint yet"
    shutil.rmtree(library.folder / "anew")


def summary_of(app, name):
    (found,) = (run for run in call(app, "GET", "/api/runs").tree["runs"] if run["name"] == name)
    return found


def test_a_run_is_served_from_any_folder(library, tmp_path):
    """Also from a folder whose name is not allowed for a new run."""
    shutil.copytree(library.folder / "pairs", tmp_path / "a copy")
    one = Library.at(str(tmp_path / "a copy"), library.folder)
    assert one.names == ["a copy"]
    assert one.run("a copy").config == library.run("pairs").config


def test_the_runs_beside_a_served_run_are_not_served(library):
    only = Library.at(str(library.folder / "one"), library.folder)
    for name in ("pairs", "../runs/pairs"):
        with pytest.raises(RunError, match="only 'one' is served"):
            only.run(name)


def test_the_newest_runs_are_listed_first_and_hidden_ones_are_not(library, tmp_path):
    for i, name in enumerate(("b", "c", "a", ".hidden"), 1):
        shutil.copytree(library.folder / "pairs", tmp_path / name)
        os.utime(tmp_path / name / "config.json", (i, i))
    assert Library(tmp_path).names == ["a", "c", "b"]


def test_without_a_name_all_runs_of_runs_dir_are_served(library, tmp_path):
    given = parse(Serve, ["--runs-dir", str(library.folder)], "serve")
    assert Library.at(given.served, given.runs_dir) == library
    with pytest.raises(RunError, match="no such folder"):
        Library.at(None, tmp_path / "none")


def test_endpoints_of_runs_health_and_page(app, library):
    runs = {run["name"]: run for run in call(app, "GET", "/api/runs").tree["runs"]}
    assert runs.keys() == {"one", "pairs", "broken"}
    assert "config.json: it has no seal" in runs["broken"]["problem"]
    assert [runs["one"][name] for name in ("block_size", "layers", "heads")] == [8, 1, 2]
    assert runs["one"]["parameters"] == sum(x.size for x in jax.tree.leaves(load_model(library.run("one"))[1]))
    assert (runs["pairs"]["layers"], runs["pairs"]["heads"]) == (0, 0), "a bigram has no attention to show"
    assert runs["one"]["corpus"] == "text", "as tokens.json names the source"
    assert "problem" not in runs["one"]
    assert call(app, "GET", "/health").tree["status"] == "ok"
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        page = call(app, "GET", path)
        assert page.status == 200
        assert page.headers["content-type"].startswith(kind)
        for directive in ("default-src 'none'", "frame-ancestors 'none'"):
            assert directive in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["cache-control"] == "no-store", "a text is not kept by the browser"
        for name in ("cross-origin-opener-policy", "cross-origin-resource-policy"):
            assert page.headers[name] == "same-origin"


def test_the_default_number_of_tokens_is_within_the_limit(library):
    scheduler = Scheduler(lambda run: None, dataclasses.replace(LIMITS, max_tokens=5))
    scheduler.stop()
    assert call(application(library, scheduler), "GET", "/api/runs").tree["defaults"]["tokens"] == 5
    assert to_write(b'{"run": "one", "prompt": "the"}', library, scheduler.limits).tokens == 5


def test_request_above_the_limit_is_refused_until_a_client_disconnects(app, scheduler):
    """Three endless requests reach the limit; a fourth is refused until one client disconnects."""
    request = json.dumps({"run": "one", "prompt": "a", "tokens": 10**6}).encode()

    async def scenario():
        calls = [Call(app, "POST", "/api/write", request, JSON) for _ in range(3)]
        tasks = [asyncio.create_task(each.run()) for each in calls]
        while not all(b"event: tokens" in each.data for each in calls[:2]):
            await asyncio.sleep(0.01)
        assert scheduler.state["requests"] == 3
        assert b"event: tokens" not in calls[2].data, "there are two rows, so the third waits"
        refused = await Call(app, "POST", "/api/write", request, JSON).run()
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        calls[2].disconnected.set()  # disconnects while it waits for a row
        calls[0].disconnected.set()
        await tasks[0]
        await tasks[2]
        await wait_for_open_requests(1)
        last = await Call(app, "POST", "/api/write", request, JSON, leave=True).run()
        assert last.status == 200
        calls[1].disconnected.set()
        await tasks[1]
        await wait_for_open_requests(0)

    async def wait_for_open_requests(n):
        began = time.monotonic()
        while scheduler.state["requests"] != n:
            assert time.monotonic() - began < 120, "a disconnected client still counts"
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_disconnect_is_noticed_between_two_queued_pieces():
    """Otherwise, asyncio warns of every write to a closed connection."""

    async def main():
        job, messages, noticed = Job(SimpleNamespace(tokenizer=ByteTokenizer()), [65]), asyncio.Queue(), []
        for message in (*[Piece(Drawn([65], [0.5], [[65]], [[0.5]]), 0)] * 2, End()):
            messages.put_nowait(message)
        events = _events(job, job.ids, messages)
        assert "start" in await anext(events)
        assert "tokens" in await anext(events)
        asyncio.get_running_loop().call_soon(noticed.append, True)
        assert "tokens" in await anext(events)
        assert noticed

    asyncio.run(main())


def test_a_character_whose_bytes_are_spread_over_tokens_is_sent_whole():
    """With its last byte; a part of one that is left at the end is sent as the sign for it."""

    async def main():
        job, messages = Job(SimpleNamespace(tokenizer=ByteTokenizer()), [0x61, 0xC3]), asyncio.Queue()
        for ids in ([0xA9, 0xE4], [0xB8]):
            n = len(ids)
            messages.put_nowait(Piece(Drawn(ids, [0.5] * n, [[65]] * n, [[0.5]] * n), 0))
        messages.put_nowait(End("stopped"))
        events = [each.split("data: ") async for each in _events(job, job.ids, messages)]
        return [(name, json.loads(data)) for name, data in events]

    (_, started), (_, one), (_, two), (_, ended) = asyncio.run(main())
    assert started == {"prompt": [[0x61, "a"], [0xC3, ""]]}
    assert [[token["text"] for token in tree["tokens"]] for tree in (one, two)] == [["é", ""], [""]]
    assert ended == {"text": "\N{REPLACEMENT CHARACTER}", "error": "stopped"}


def test_the_attention_of_a_diverged_model_is_sent_as_zeros(library):
    """JSON has no NaN."""
    looked = Looked(np.full((1, 2, 1), np.nan), [0], [np.nan])
    scheduler = SimpleNamespace(limits=LIMITS, submit=lambda job: job.put(looked), cancel=lambda job: None)
    answer = call(application(library, scheduler), "POST", "/api/look", {"run": "one", "ids": [1]})
    assert answer.tree["attention"] == [[[0.0], [0.0]]]
    assert answer.tree["likely"][0]["p"] == 0


def test_client_that_disconnects_before_its_look_no_longer_counts(library):
    loaded = threading.Event()

    def load(run):
        loaded.wait(10)
        raise RuntimeError

    scheduler = Scheduler(load, LIMITS)
    request = Call(application(library, scheduler), "POST", "/api/look", b'{"run": "one", "ids": [1]}', JSON)

    async def scenario():
        scheduler.submit(Job(library.run("one"), [1]))  # keeps the JAX thread busy
        task = asyncio.create_task(request.run())
        while scheduler.state["requests"] < 2:
            await asyncio.sleep(0.01)
        request.disconnected.set()
        await task
        assert request.status == 400
        assert scheduler.state["requests"] == 1

    try:
        asyncio.run(scenario())
    finally:
        loaded.set()
        scheduler.stop()
        scheduler.join()


def test_failure_is_reported_and_the_next_request_loads_the_run_again(library):
    """The first load fails, the second gives a broken model, and the third works."""
    loads = []

    def load(run):
        loads.append(run)
        if len(loads) == 1:
            raise RuntimeError("no memory")
        config, params, tokenizer = load_model(run)
        writer = Writer(config, params, tokenizer.vocab_size, 2)
        if len(loads) == 2:
            writer.decoder = config, {}
        return writer

    scheduler = Scheduler(load, LIMITS)
    try:
        app = application(library, scheduler)
        looked = call(app, "POST", "/api/look", {"run": "one", "ids": [1]})
        assert (looked.status, looked.tree) == (503, {"error": "one failed: no memory"})
        loads.clear()
        request = {"run": "one", "prompt": "a", "tokens": 2}
        for message in ("one failed: no memory", "one failed: ", '"error": ""'):
            answer = call(app, "POST", "/api/write", request)
            assert (answer.status, answer.events[-1][0], message in answer.data.decode()) == (200, "end", True)
        assert scheduler.state["requests"] == 0
    finally:
        scheduler.stop()
        scheduler.join()
    assert call(app, "POST", "/api/write", request).status == 503
    assert call(app, "GET", "/health").status == 503


def test_tokens_tell_where_their_context_begins(app):
    """At most block_size 8 tokens before them."""
    answer = call(app, "POST", "/api/write", {"run": "one", "prompt": "the cat", "tokens": 20})
    begins = [tree["from"] for name, tree in answer.events if name == "tokens"]
    assert begins[0] == 0
    assert begins == sorted(begins)
    assert begins[-1] >= 7 + 20 - 1 - 8
