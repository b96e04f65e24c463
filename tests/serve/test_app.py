"""The application as clients meet it, in process: what they get, what they are refused, and that it never breaks."""

import asyncio
import dataclasses
import json
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import nn
from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.serve import limits, requests
from jaxgpt.serve.app import application, likely
from jaxgpt.serve.library import Library
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.scheduler import Scheduler
from jaxgpt.serve.writer import Job, Request, Writer
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.training.run import Run
from jaxgpt.training.start import load_model, start

LIMITS = Limits(max_prompt=50, max_tokens=10**6, places=2, max_requests=3)
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Two runs that were never trained, and one that is broken."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "text.txt").write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    model = ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16)
    for name, shape in (("one", model), ("pairs", dataclasses.replace(model, kind="bigram"))):
        config = Config(DataConfig(corpus=str(folder / "text.txt")), shape, train=TrainConfig(batch_size=1))
        params = jax.tree.map(lambda x: 8 * x, jax.jit(nn.init_params, static_argnums=0)(shape, jax.random.key(0)))
        start(config, name, folder / "runs", folder / "data", params)
    (folder / "runs/broken").mkdir()
    (folder / "runs/broken/config.json").write_text("{}")
    return Library.at(str(folder / "runs"), folder)


@pytest.fixture(scope="module")
def scheduler(library):
    def load(run):
        config, params, tokenizer = load_model(run)
        return Writer(config, params, tokenizer.vocab_size, LIMITS.places)

    scheduler = Scheduler(load, LIMITS)
    yield scheduler
    scheduler.stop()
    scheduler.join()


@pytest.fixture(scope="module")
def app(library, scheduler):
    return application(library, scheduler)


class Call:
    """One request to an ASGI application. It may `leave` after its first bytes, as a closed tab does."""

    def __init__(self, app, method, path, body=b"", headers=None, leave=False):
        headers = {"host": "127.0.0.1:8000"} | (headers or {})
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items() if value is not None]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {
            "headers": pairs,
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 8000),
            "root_path": "",
        }
        self.app, self.scope, self.leave = app, scope | {"client": ("127.0.0.1", 1), "asgi": {"version": "3.0"}}, leave
        self.body, self.sent, self.gone, self.status, self.data = body, False, asyncio.Event(), 0, b""

    async def receive(self):
        if not self.sent:
            self.sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.data += message.get("body", b"")
            if self.leave and b"event: tokens" in self.data:
                self.gone.set()

    async def run(self):
        await asyncio.wait_for(self.app(self.scope, self.receive, self.send), 60)
        return self

    @property
    def tree(self):
        return json.loads(self.data)

    @property
    def events(self):
        lines = [each.split("\n") for each in self.data.decode().split("\n\n")[:-1]]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]

    @property
    def ids(self):
        return [each["id"] for name, told in self.events if name == "tokens" for each in told["tokens"]]


def call(app, method, path, tree=None, headers=None, **how):
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode() if tree is not None else b""
    return asyncio.run(Call(app, method, path, body, (JSON if method == "POST" else {}) | (headers or {}), **how).run())


def test_a_text_is_what_its_writer_writes_and_can_be_continued_from_any_token(app, library):
    """And that is what `generate` gives: tests/serve/test_writer.py."""
    config, params, tokenizer = load_model(library.run("one"))
    asked = {"run": "one", "prompt": "the cat", "tokens": 30, "temperature": 0.9, "top_k": 5, "seed": 3}
    answer = call(app, "POST", "/api/write", asked)
    assert answer.status == 200
    (first, started), *_, (last, ended) = answer.events
    assert (first, last, ended) == ("start", "end", {"text": "", "error": ""})
    assert "".join(text for _, text in started["prompt"]) == "the cat"
    ids = tokenizer.encode("the cat").tolist()
    writer, pieces = Writer(config, params, tokenizer.vocab_size, LIMITS.places), []
    wanted = Request(library.run("one"), tuple(ids), 30, temperature=0.9, top_k=5, seed=3)
    writer.waiting.append(Job(wanted, pieces.append))
    while not writer.idle:
        writer.turn()
    assert answer.ids == [i for piece in pieces for i in piece.drawn.token.tolist()]
    tokens = [each for name, told in answer.events if name == "tokens" for each in told["tokens"]]
    assert "".join(each["text"] for each in tokens) == tokenizer.decode(answer.ids)
    for each in tokens:
        assert {other["id"]: other["p"] for other in each["likely"]}.get(each["id"], each["p"]) == each["p"]
        assert sum(other["p"] for other in each["likely"]) <= 1.001
    again = call(app, "POST", "/api/write", asked | {"prompt": [*ids, *answer.ids[:4]], "tokens": 3})
    assert "".join(text for _, text in again.events[0][1]["prompt"]) == "the cat" + tokenizer.decode(answer.ids[:4])


def test_a_look(app):
    looked = call(app, "POST", "/api/look", {"run": "one", "ids": [1, 2, 3]}).tree
    ((head, other),) = looked["attention"]
    assert len(head) == len(other) == 3
    assert sum(head) == pytest.approx(1, abs=1e-4)
    assert looked["likely"][0]["p"] >= looked["likely"][1]["p"]
    assert call(app, "POST", "/api/look", {"run": "pairs", "ids": [1, 2, 3]}).tree["attention"] == []


def test_parts_of_characters_are_shown_by_their_bytes():
    part, whole = likely(ByteTokenizer(), np.array([0xC3, 97]), np.array([0.5, 0.25]))
    assert part == {"id": 0xC3, "text": "", "shown": r"\xc3", "p": 0.5}
    assert whole == {"id": 97, "text": "a", "p": 0.25}


def test_a_run_made_anew_is_told_of_as_it_is_now(library, app):
    """Under the name of one that was read, with a smaller vocabulary, which has no line feed."""
    shutil.copytree(library.folder / "pairs", library.folder / "anew")
    before = library.run("anew")
    assert library.run("anew") is before
    assert told_of(app, "anew")["start"] == "\n"
    shutil.rmtree(library.folder / "anew")
    model = dataclasses.replace(before.config.model, vocab_size=3)
    meta = before.corpus_meta | {"tokenizer": {"kind": "char", "chars": "abc"}}
    Run.create(library.folder, "anew", dataclasses.replace(before.config, model=model), meta)
    assert library.run("anew") != before
    assert (told_of(app, "anew")["start"], told_of(app, "anew")["vocabulary"]) == ("a", 3)
    shutil.rmtree(library.folder / "anew")


def told_of(app, name):
    (told,) = (run for run in call(app, "GET", "/api/runs").tree["runs"] if run["name"] == name)
    return told


def test_who_does_not_wait_for_a_look_gives_its_place_back(library):
    loaded = threading.Event()

    def load(run):
        loaded.wait(10)
        raise RuntimeError

    scheduler = Scheduler(load, LIMITS)
    asked = Call(application(library, scheduler), "POST", "/api/look", b'{"run": "one", "ids": [1]}', JSON)

    async def story():
        scheduler.look(library.run("one"), [1], lambda told: None)  # keeps its thread busy
        task = asyncio.create_task(asked.run())
        while scheduler.state["requests"] < 2:
            await asyncio.sleep(0.01)
        asked.gone.set()
        await task
        assert asked.status == 400
        assert [look.cancelled for look in scheduler._inbox] == [True]

    try:
        asyncio.run(story())
    finally:
        loaded.set()
        scheduler.stop()
        scheduler.join()


def test_a_request_that_does_not_come_whole_is_not_waited_for(app, monkeypatch):
    monkeypatch.setattr(limits, "PATIENCE", 0.05)
    slow = Call(app, "POST", "/api/write", b"{", JSON)
    slow.sent = True
    asyncio.run(asyncio.wait_for(slow.run(), 2))
    assert (slow.status, slow.tree) == (408, {"error": "the request did not come within 0.05 s"})


def test_runs_health_and_the_page(app):
    told = call(app, "GET", "/api/runs").tree
    runs = {run["name"]: run for run in told["runs"]}
    assert runs.keys() == {"one", "pairs", "broken"}
    assert "config.json: it has no seal" in runs["broken"]["problem"]
    assert runs["one"]["layers"] == 1
    assert "problem" not in runs["one"]
    assert call(app, "GET", "/health").tree["status"] == "ok"
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        page = call(app, "GET", path)
        assert page.status == 200
        assert page.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"


BAD = [
    (b"", 400, "not JSON"),
    (b"\xff", 400, "not JSON"),
    (b"[" * 10**5, 400, "not JSON"),
    (b"1" * 5000, 400, "not JSON"),
    (b"x" * (2**20 + 1), 413, "longer than"),
    ([], 400, "expected an object"),
    ({}, 400, "run is None"),
    ({"run": "../x", "prompt": "a"}, 404, "expected letters"),
    ({"run": "none", "prompt": "a"}, 404, "no run 'none'"),
    ({"run": "broken", "prompt": "a"}, 404, "no seal"),
    ({"run": "one"}, 400, "prompt is ''"),
    ({"run": "one", "prompt": "a" * 51}, 413, "at most 50"),
    ({"run": "one", "prompt": "cäat"}, 400, "character 'ä' at position 1 of the prompt is not in the vocabulary"),
    ({"run": "one", "prompt": "\ud800"}, 400, "not in the vocabulary"),
    ({"run": "one", "prompt": [1, 11]}, 400, "whole numbers from 0 to 10"),
    ({"run": "one", "prompt": [True]}, 400, "prompt holds True"),
    ({"run": "one", "prompt": "a", "tokens": 10**6 + 1}, 400, "tokens is 1000001"),
    ({"run": "one", "prompt": "a", "tokens": 2.0}, 400, "expected a whole number"),
    ({"run": "one", "prompt": "a", "temperature": float("nan")}, 400, "temperature is nan"),
    ({"run": "one", "prompt": "a", "temperature": 1e300}, 400, "at most 1000"),
    ({"run": "one", "prompt": "a", "temperature": 10**400}, 400, "expected a number"),
    ({"run": "one", "prompt": "a", "top_p": 0}, 400, "top_p is 0"),
    ({"run": "one", "prompt": "a", "seed": -1}, 400, "seed is -1"),
    ({"run": "one", "prompt": "a", "colour": "red"}, 400, "no such field: 'colour'"),
]


@pytest.mark.parametrize(("tree", "status", "said"), BAD)
def test_what_cannot_be_done_is_refused_and_told(app, scheduler, tree, status, said):
    answer = call(app, "POST", "/api/write", tree)
    assert (answer.status, said in answer.tree["error"]) == (status, True), answer.tree
    assert scheduler.state["requests"] == 0


def test_looks_that_cannot_be(app):
    for tree, said in (({"run": "one", "ids": []}, "at least one"), ({"run": "one", "ids": [0] * 9}, "at most 8")):
        answer = call(app, "POST", "/api/look", tree)
        assert answer.status == 400
        assert said in answer.tree["error"]


def test_looks_into_too_much_are_refused(app, monkeypatch):
    asked = {"run": "one", "ids": [1, 2, 3]}  # in the 8 places of block_size, by 2 heads of 1 layer
    for most, status in ((3 * 2 * 8 * 8, 200), (3 * 2 * 8 * 8 - 1, 400)):
        monkeypatch.setattr(requests, "MAPS", most)
        answer = call(app, "POST", "/api/look", asked)
        assert answer.status == status
    assert answer.tree["error"] == "the attention maps of 3 tokens are too large: choose an earlier token"


def test_paths_methods_and_types(app):
    assert call(app, "GET", "/nowhere").tree == {"error": "Not Found"}
    assert call(app, "GET", "/api/write").status == 405
    assert call(app, "GET", "/api/runs/").status == 404, "no redirect to a host that the client named"
    assert call(app, "POST", "/api/write", {}, {"content-type": "text/plain"}).status == 415, "a form cannot ask"


def test_only_those_who_mean_this_server_are_let_in(library, scheduler):
    app = application(library, scheduler, hosts={"Study"}, token="a-token-of-some-length")
    right = {"authorization": "Bearer a-token-of-some-length"}
    assert call(app, "GET", "/api/runs", headers=right).status == 200
    for host in ("localhost:1", "[::1]:8000", "10.0.0.7", "study:80"):
        assert call(app, "GET", "/health", headers={"host": host}).status == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", None, "[::1", "localhost:x", "a b"):
        answer = call(app, "GET", "/", headers={"host": host})
        assert answer.status == 403, host
    for shown in (None, "Bearer ", "Bearer a-token-of-some-lengtH", "Basic a-token-of-some-length", "Bearer ä"):
        answer = call(app, "GET", "/api/runs", headers={"authorization": shown})
        assert answer.status == 401, shown
        assert answer.headers["www-authenticate"] == "Bearer"
    assert call(app, "GET", "/").status == 200, "the page asks for the token"
    for origin in ("http://127.0.0.1:8000", "http://127.0.0.1:9000", "null", "http://["):
        answer = call(app, "GET", "/api/runs", headers=right | {"origin": origin})
        assert answer.status == (200 if origin == "http://127.0.0.1:8000" else 403), origin
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_one_too_many_is_told_to_come_back_and_who_leaves_makes_room(app, scheduler):
    """Three requests without end fill all places; a fourth is refused, until the three have left."""
    asked = json.dumps({"run": "one", "prompt": "a", "tokens": 10**6}).encode()

    async def story():
        calls = [Call(app, "POST", "/api/write", asked, JSON) for _ in range(3)]
        tasks = [asyncio.create_task(each.run()) for each in calls]
        while not all(b"event: tokens" in each.data for each in calls[:2]):
            await asyncio.sleep(0.01)
        assert scheduler.state["requests"] == 3
        assert calls[2].data == b"", "two places: the third waits"
        refused = await Call(app, "POST", "/api/write", asked, JSON).run()
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        calls[2].gone.set()  # who leaves while it waits
        calls[0].gone.set()
        await tasks[0]
        await tasks[2]
        await left(1)
        last = await Call(app, "POST", "/api/write", asked, JSON, leave=True).run()
        assert last.status == 200
        calls[1].gone.set()
        await tasks[1]
        await left(0)

    async def left(n):
        began = time.monotonic()
        while scheduler.state["requests"] != n:
            assert time.monotonic() - began < 10, "a place was never given back"
            await asyncio.sleep(0.01)

    asyncio.run(story())


def test_what_goes_wrong_while_writing_is_told_and_forgotten(library):
    """A model that breaks ends its texts with the reason; the next request finds a new one. So does one not loaded."""
    broken = []

    def load(run):
        broken.append(run)
        if len(broken) == 1:
            raise RuntimeError("no memory")
        config, params, tokenizer = load_model(run)
        writer = Writer(config, params, tokenizer.vocab_size, 2)
        if len(broken) == 2:
            writer.params = {}
        return writer

    scheduler = Scheduler(load, LIMITS)
    try:
        app = application(library, scheduler)
        asked = {"run": "one", "prompt": "a", "tokens": 2}
        for status, said in ((503, "one: no memory"), (503, "one could not write on: "), (200, "event: end")):
            answer = call(app, "POST", "/api/write", asked)
            assert (answer.status, said in answer.data.decode()) == (status, True)
        assert scheduler.state["requests"] == 0
    finally:
        scheduler.stop()
        scheduler.join()
    assert call(app, "POST", "/api/write", asked).status == 503
    assert call(app, "GET", "/health").status == 503


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4),
    max_leaves=8,
)


def mostly(good, other=values):
    """What could be meant, and one time in four anything else."""
    return st.integers(0, 3).flatmap(lambda which: good if which else other)


ids = st.lists(mostly(st.integers(0, 11)), max_size=9)
plausible = st.fixed_dictionaries(
    {"run": mostly(st.sampled_from(["one", "one", "pairs", "broken"]))},
    optional={
        "tokens": mostly(st.integers(0, 9)),
        "temperature": mostly(st.floats(0, 3)),
        "top_k": mostly(st.integers()),
        "top_p": mostly(st.floats(0, 1)),
        "min_p": mostly(st.floats(0, 1)),
        "seed": mostly(st.integers(0, 2**32)),
    },
)
asks = st.one_of(
    st.tuples(
        st.just("/api/write"),
        st.builds(
            dict.__or__,
            plausible,
            st.fixed_dictionaries({"prompt": mostly(st.text("the cat", min_size=1, max_size=20) | ids)}),
        ),
    ),
    st.tuples(
        st.just("/api/look"), st.fixed_dictionaries({"run": st.sampled_from(["one", "pairs"]), "ids": mostly(ids)})
    ),
).map(lambda asked: (asked[0], json.dumps(asked[1]).encode()))
noise = st.tuples(
    st.sampled_from(["/api/write", "/api/look", "/api/runs", "/health", "/"]),
    values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
)


TOKEN = "a-token-of-some-length"
RIGHT = {"host": "127.0.0.1:8000", "authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
ODD = ["[::1", "localhost:x", "http://[", "null", "http://127.0.0.1:8000", "evil.example", "text/plain; a=b", "Bearer "]
said = st.text(st.characters(max_codepoint=255), max_size=20) | st.sampled_from(ODD)
headers = st.dictionaries(st.sampled_from(["host", "origin", "content-type", "authorization"]), st.none() | said)


@settings(max_examples=200)
@given(
    ask=asks | noise,
    method=st.sampled_from(["POST", "POST", "POST", "GET", "PUT"]),
    leave=st.booleans(),
    headers=mostly(st.just({}), headers),
)
def test_no_request_breaks_it(library, scheduler, ask, method, leave, headers):
    path, body = ask
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if isinstance(asked, dict) and type(asked.get("tokens")) is int and asked["tokens"] > 9:
        asked["tokens"] = 9  # a text without end tells nothing more
        body = json.dumps(asked).encode()
    headers = RIGHT | headers
    answer = call(application(library, scheduler, token=TOKEN), method, path, body, headers, leave=leave)
    assert answer.status in (200, 400, 401, 403, 404, 405, 413, 415)
    if path.startswith("/api") and headers["authorization"] != RIGHT["authorization"]:
        assert answer.status in (401, 403)
    if answer.status != 200 and method != "HEAD":
        assert answer.tree["error"]
