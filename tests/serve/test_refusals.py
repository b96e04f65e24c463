"""The application refuses bad requests, and no request breaks it."""

import asyncio
import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from jaxgpt.cli.sample import Sample
from jaxgpt.config import UsageError
from jaxgpt.serve import limits, requests
from jaxgpt.serve.app import application
from jaxgpt.serve.library import Library
from tests.serve.client import JSON, Call, call

BAD_REQUESTS = [
    (b"", 400, "not JSON"),
    (b"\xff", 400, "not JSON"),
    (b"[" * 10**5, 400, "not JSON"),
    (b"1" * 5000, 400, "not JSON"),
    (b"x" * 2**20, 400, "not JSON"),
    (b"x" * (2**20 + 1), 413, "longer than"),
    ([], 400, "expected an object"),
    ({}, 400, "run is None"),
    ({"run": "../x", "prompt": "a"}, 404, "expected letters"),
    ({"run": "none", "prompt": "a"}, 404, "no run 'none'"),
    ({"run": "broken", "prompt": "a"}, 404, "no seal"),
    ({"run": "one"}, 400, "prompt is ''"),
    ({"run": "one", "prompt": "\ufeff"}, 400, "prompt is ''"),
    ({"run": "one", "prompt": "a" * 51}, 413, "at most 50"),
    ({"run": "one", "prompt": "cäat"}, 400, "character 'ä' at position 1 of the prompt is not in the vocabulary"),
    ({"run": "one", "prompt": "\ud800"}, 400, "not in the vocabulary"),
    ({"run": "one", "prompt": [1] * 51}, 413, "at most 50"),
    ({"run": "one", "prompt": [1, 11]}, 400, "whole numbers from 0 to 10"),
    ({"run": "one", "prompt": [True]}, 400, "prompt holds True"),
    ({"run": "one", "prompt": "a", "tokens": 10**6 + 1}, 400, "tokens is 1000001"),
    ({"run": "one", "prompt": "a", "tokens": 0}, 400, "tokens is 0, expected a whole number from 1 to"),
    ({"run": "one", "prompt": "a", "tokens": 2.0}, 400, "expected a whole number"),
    ({"run": "one", "prompt": "a", "temperature": float("nan")}, 400, "temperature is nan"),
    (
        {"run": "one", "prompt": "a", "top_k": 2**31},
        400,
        "top_k is 2147483648, expected a whole number from 0 to 2147483647",
    ),
    ({"run": "one", "prompt": "a", "temperature": 1e300}, 400, "expected a number from 0 to 1000"),
    ({"run": "one", "prompt": "a", "temperature": 10**400}, 400, "expected a number"),
    ({"run": "one", "prompt": "a", "top_p": 0}, 400, "top_p is 0"),
    ({"run": "one", "prompt": "a", "seed": -1}, 400, "seed is -1"),
    (
        {"run": "one", "prompt": "a", "seed": 2**32},
        400,
        "seed is 4294967296, expected a whole number from 0 to 4294967295",
    ),
    ({"run": "one", "prompt": "a", "colour": "red"}, 400, "no such field: 'colour'"),
]


@pytest.mark.parametrize(("tree", "status", "message"), BAD_REQUESTS)
def test_bad_requests_are_refused_with_the_reason(app, scheduler, tree, status, message):
    answer = call(app, "POST", "/api/write", tree)
    assert (answer.status, message in answer.tree["error"]) == (status, True), answer.tree
    assert scheduler.state["requests"] == 0


def test_the_longest_prompt_is_accepted(library):
    body = json.dumps({"run": "one", "prompt": "a" * 50}).encode()
    assert len(requests.to_write(body, library, limits.Limits(max_prompt=50)).ids) == 50


def test_settings_that_a_request_leaves_out_are_those_of_sample():
    sample, found = {each.name: each.default for each in dataclasses.fields(Sample)}, requests.defaults(limits.Limits())
    assert {name: value for name, value in found.items() if value != sample[name]} == {"tokens": 200}


def test_looks_at_too_few_or_too_many_ids_are_refused(app):
    for ids, status, message in (([], 400, "at least one"), ([0] * 9, 413, "at most 8")):
        answer = call(app, "POST", "/api/look", {"run": "one", "ids": ids})
        assert answer.status == status
        assert message in answer.tree["error"]
    assert call(app, "POST", "/api/look", {"run": "one", "ids": [0] * 8}).status == 200, "a full context"


def test_looks_whose_attention_maps_are_too_large_are_refused(app, library, monkeypatch):
    request = {"run": "one", "ids": [1, 2, 3]}  # padded to block_size 8; 1 layer of 2 heads
    for limit, status in ((3 * 2 * 8 * 8, 200), (3 * 2 * 8 * 8 - 1, 400)):
        monkeypatch.setattr(requests, "MAX_MAPS", limit)
        answer = call(app, "POST", "/api/look", request)
        assert answer.status == status
    assert answer.tree["error"] == "the attention maps of 3 tokens are too large: choose an earlier token"
    assert requests.to_look(b'{"run": "pairs", "ids": [1, 2, 3]}', library).ids == [1, 2, 3], "a bigram has no maps"


def test_a_run_whose_files_cannot_be_read_is_reported(library, tmp_path):
    run = shutil.copytree(library.folder / "pairs", tmp_path / "pairs")
    (run / "tokens.json").write_text("{}")
    served = Library(tmp_path)
    with pytest.raises(HTTPException, match=r"run 'pairs' cannot be read: .*tokens\.json") as refused:
        requests.to_write(b'{"run": "pairs", "prompt": "a"}', served, limits.Limits())
    assert refused.value.status_code == 503
    assert "tokens.json" in served.summary("pairs")["problem"]


@pytest.mark.parametrize("error", [UsageError, ValueError])
def test_a_prompt_that_the_tokenizer_cannot_encode_is_refused(error):
    def encode(text):
        raise error("tiktoken is missing")

    with pytest.raises(HTTPException, match="the prompt cannot be encoded: tiktoken is missing") as refused:
        requests._encoded("a", SimpleNamespace(encode=encode), 9)
    assert refused.value.status_code == 400


def test_unknown_paths_methods_and_content_types_are_refused(app):
    assert call(app, "GET", "/nowhere").tree == {"error": "Not Found"}
    assert call(app, "GET", "/api/write").status == 405
    assert call(app, "GET", "/api/runs/").status == 404, "no redirect to a host that the client named"
    assert call(app, "POST", "/api/write", {}, {"content-type": "text/plain"}).status == 415, (
        "an HTML form cannot send requests"
    )
    for kind in ("application/json; charset=utf-8", "Application/JSON ;charset=UTF-8"):
        assert call(app, "POST", "/api/write", {}, {"content-type": kind}).status == 400, "its kind is accepted"


def test_host_origin_and_token_are_checked(library, scheduler):
    app = application(library, scheduler, hosts={"Study", "my.name."}, token="a-token-of-some-length")
    authorized = {"authorization": "Bearer a-token-of-some-length"}
    assert call(app, "GET", "/api/runs", headers=authorized).status == 200
    for host in ("localhost:1", "[::1]:8000", "10.0.0.7", "study:80", "my.name", "my.name.:80"):
        assert call(app, "GET", "/health", headers={"host": host}).status == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", None, "[::1", "localhost:x", "a b"):
        answer = call(app, "GET", "/", headers={"host": host})
        assert answer.status == 403, host
    for value in (None, "Bearer ", "Bearer a-token-of-some-lengtH", "Basic a-token-of-some-length", "Bearer ä"):
        answer = call(app, "GET", "/api/runs", headers={"authorization": value})
        assert answer.status == 401, value
        assert answer.headers["www-authenticate"] == "Bearer"
    assert call(app, "GET", "/").status == 200, "the page asks for the token"
    browser = authorized | {"host": "Study:80", "origin": "HTTP://sTUDY:80"}
    assert call(app, "GET", "/api/runs", headers=browser).status == 200, "names of hosts have no case"
    assert call(app, "GET", "/api/runs", headers={"host": "study"}).status == 401
    for origin in ("http://127.0.0.1:8000", "http://127.0.0.1:9000", "null", "http://["):
        answer = call(app, "GET", "/api/runs", headers=authorized | {"origin": origin})
        assert answer.status == (200 if origin == "http://127.0.0.1:8000" else 403), origin
        assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(("name", "scheme"), [("host", ""), ("origin", "http://")])
def test_a_host_or_origin_that_is_given_twice_is_refused(app, name, scheme):
    for values in itertools.permutations([f"{scheme}127.0.0.1:8000", f"{scheme}evil.example"]):
        twice = Call(app, "GET", "/api/runs", headers={name: None})
        twice.scope["headers"] += [(name.encode(), value.encode()) for value in values]
        assert asyncio.run(twice.run()).status == 403, values


def test_an_incomplete_request_times_out(app, monkeypatch):
    monkeypatch.setattr(limits, "TIMEOUT", 0.05)
    slow = Call(app, "POST", "/api/write", b"{", JSON)
    slow.sent = True
    asyncio.run(asyncio.wait_for(slow.run(), 2))
    assert (slow.status, slow.tree) == (408, {"error": "the request did not arrive within 0.05 s"})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4),
    max_leaves=8,
)


def mostly(plausible, other=values):
    """Values of `plausible`, but of `other` one time in four."""
    return st.integers(0, 3).flatmap(lambda which: plausible if which else other)


ids = st.lists(mostly(st.integers(0, 11)), max_size=9)
fields = st.fixed_dictionaries(
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
plausible_requests = st.one_of(
    st.tuples(
        st.just("/api/write"),
        st.builds(
            dict.__or__,
            fields,
            st.fixed_dictionaries({"prompt": mostly(st.text("the cat", min_size=1, max_size=20) | ids)}),
        ),
    ),
    st.tuples(
        st.just("/api/look"), st.fixed_dictionaries({"run": st.sampled_from(["one", "pairs"]), "ids": mostly(ids)})
    ),
).map(lambda request: (request[0], json.dumps(request[1]).encode()))
noise = st.tuples(
    st.sampled_from(["/api/write", "/api/look", "/api/runs", "/health", "/"]),
    values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
)


TOKEN = "a-token-of-some-length"
VALID_HEADERS = {"host": "127.0.0.1:8000", "authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
ODD = ["[::1", "localhost:x", "http://[", "null", "http://127.0.0.1:8000", "evil.example", "text/plain; a=b", "Bearer "]
header_values = st.text(st.characters(max_codepoint=255), max_size=20) | st.sampled_from(ODD)
headers = st.dictionaries(
    st.sampled_from(["host", "origin", "content-type", "authorization"]), st.none() | header_values
)


@settings(max_examples=100)
@given(
    path_and_body=plausible_requests | noise,
    method=st.sampled_from(["POST", "POST", "POST", "GET", "PUT"]),
    leave=st.booleans(),
    headers=mostly(st.just({}), headers),
)
def test_no_request_breaks_the_application(library, scheduler, path_and_body, method, leave, headers):
    path, body = path_and_body
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, dict) and type(tree.get("tokens")) is int and tree["tokens"] > 9:
        tree["tokens"] = 9
        body = json.dumps(tree).encode()
    headers = VALID_HEADERS | headers
    answer = call(application(library, scheduler, token=TOKEN), method, path, body, headers, leave=leave)
    assert answer.status in (200, 400, 401, 403, 404, 405, 413, 415)
    if path.startswith("/api") and headers["authorization"] != VALID_HEADERS["authorization"]:
        assert answer.status in (401, 403)
    if answer.status != 200:
        assert answer.tree["error"]
