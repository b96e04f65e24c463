"""Datasets of the Hugging Face Hub, from a local web server that imitates it."""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from unittest import mock
from urllib.parse import unquote, urlsplit

import pytest

from jaxgpt import files
from jaxgpt.prepare import encode
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.prepare.sources import SourceError

hub = pytest.importorskip("huggingface_hub", reason="needs the extra: pip install 'jaxgpt[data]'")
pytest.importorskip("upath", reason="needs the extra: pip install 'jaxgpt[data]'")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra: pip install 'jaxgpt[data]'")

API = re.compile(r"/api/datasets/([\w-]+/[\w-]+)(?:/(revision|tree)/(main|refs/convert/parquet)(?:/(.+))?)?")
FILE = re.compile(r"/datasets/([\w-]+/[\w-]+)/resolve/(main|refs/convert/parquet)/(.+)")
WEB = "HuggingFaceFW/fineweb/main"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files root/ORG/NAME/REVISION/PATH through the part of the Hub's API that HfFileSystem uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path, root = unquote(urlsplit(self.path).path), self.server.root
        if found := API.fullmatch(path):
            name, kind, revision, inner = found.groups()
            folder = root / name / (revision or "main")
            if not folder.is_dir():
                self.send(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif kind != "tree":
                self.send(200, json.dumps({"id": name, "sha": "0" * 40, "siblings": []}).encode())
            elif not (folder / (inner or "")).is_dir():
                self.send(404, X_Error_Code="EntryNotFound")
            else:
                each = (folder / (inner or "")).glob("**/*" if "recursive=true" in self.path else "*")
                self.send(200, json.dumps([self.described(path, folder) for path in each]).encode())
        elif found := FILE.fullmatch(path):
            self.server.fetched.append(found[3])
            if found[1] in self.server.gated:
                self.send(403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to {found[1]} is restricted")
                return
            data = (root / found[1] / found[2] / found[3]).read_bytes()
            first, last = map(int, re.findall(r"\d+", self.headers["range"]))
            self.send(206, data[first : last + 1])
        else:
            self.send(404)

    def described(self, path, folder):
        kind, oid = "directory", "0"
        if path.is_file():
            kind, oid = "file", hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": kind, "oid": oid, "size": path.stat().st_size, "path": str(path.relative_to(folder))}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        httpd.root, httpd.fetched, httpd.gated = tmp_path / "hub", [], set()
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        # huggingface_hub reads both from the environment when it is imported, perhaps by an offline test.
        monkeypatch.setattr(hub.constants, "ENDPOINT", httpd.url)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", httpd.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture
def write(tmp_path):
    """write(path, texts): a Parquet file of documents on the Hub."""
    arrow = pytest.importorskip("pyarrow")

    def written(path, texts):
        (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        rows = arrow.table({"id": list(range(len(texts))), "text": texts})
        parquet.write_table(rows, tmp_path / "hub" / path, row_group_size=50)

    return written


@pytest.fixture
def web(write, tmp_path):
    """A dataset of three files, laid out as FineWeb; the value is its text."""
    texts = [[f"document {i} of file {name}: the cat\r\nsat" for i in range(120)] for name in "abc"]
    for i, each in enumerate(texts):
        write(f"{WEB}/sample/10BT/00{i}_00000.parquet", each)
    (tmp_path / "hub" / WEB / "README.md").write_text("# FineWeb")
    return "\n".join("\n\n".join(each) for each in texts).replace("\r", "")


@pytest.fixture(autouse=True)  # so that the library is imported before a test changes its constants
def clear_listings():
    """clear_listings(): forget the files of every dataset, as a new process would."""
    return hub.HfFileSystem.clear_instance_cache


def test_named_dataset_is_read_without_a_local_copy(server, web, clear_listings, tmp_path):
    done = prepare_corpus("fineweb", "byte", data_dir=tmp_path / "data")
    meta = done.corpus.meta
    assert done.corpus.tokenizer.decode(done.corpus.tokens) == web
    assert meta["source"] == "fineweb"
    assert meta["origin"] == "3 files in hf://datasets/HuggingFaceFW/fineweb/sample/10BT"
    assert meta["notes"] == ["turned 360 CR or CRLF line ends into LF"]
    assert [path.name for path in tmp_path.rglob("*.parquet") if "hub" not in path.parts] == []
    clear_listings()
    server.fetched.clear()
    assert prepare_corpus("fineweb", "byte", data_dir=tmp_path / "data").reused
    assert server.fetched == [], "the hashes of the files show that nothing has changed"
    with pytest.raises(SourceError, match="column 'id' holds 0, expected a string"):
        prepare_corpus("fineweb", "byte", column="id", data_dir=tmp_path / "data")


def test_the_command_reads_from_the_endpoint_in_the_environment(server, web, tmp_path):
    command = [sys.executable, "-m", "jaxgpt", "prepare", "hf://datasets/HuggingFaceFW/fineweb", "--tokenizer", "byte"]
    env = files.os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.startswith(f"fineweb: {len(web):,} tokens"), done.stderr
    assert "README.md: left out, a dataset is read from its JSON Lines and Parquet" in done.stdout


def test_corpus_is_not_reused_if_a_file_or_the_column_changes(server, write, clear_listings, tmp_path):
    write(f"{WEB}/data/0.parquet", ["a cat"] * 20)
    url, kwargs = "hf://datasets/HuggingFaceFW/fineweb/data", {"data_dir": tmp_path / "data"}
    first = prepare_corpus(url, "byte", **kwargs)
    for text in ("a bat", "a cat"):
        clear_listings()
        write(f"{WEB}/data/0.parquet", [text] * 20)
        again = prepare_corpus(url, "byte", **kwargs)
        assert again.reused == (text == "a cat")
        assert again.corpus.tokenizer.decode(again.corpus.tokens) == "\n\n".join([text] * 20)
    assert again.folder == first.folder
    with pytest.raises(SourceError, match="column 'id' holds 0, expected a string"):
        prepare_corpus(url, "byte", column="id", **kwargs)


def test_revision_of_converted_parquet_files_is_read(server, write, tmp_path):
    write("org/script/refs/convert/parquet/default/train/0000.parquet", ["the cat"] * 9)
    done = prepare_corpus(
        "hf://datasets/org/script@refs/convert/parquet/default/train", "byte", data_dir=tmp_path / "data"
    )
    assert done.corpus.tokenizer.decode(done.corpus.tokens) == "\n\n".join(["the cat"] * 9)


@pytest.fixture
def interrupted(tmp_path, monkeypatch, clear_listings):
    """interrupted(n, data_dir): prepare fineweb in small shards and interrupt that after n of them."""
    monkeypatch.setattr(encode, "PART", 40)
    monkeypatch.setattr(encode, "SHARD", 1400)
    write = files.write_atomically

    def prepare(n, data_dir):
        left = iter(range(n))

        def written(path, data):
            write(path, data)
            if path.name == encode.PROGRESS and next(left, None) == n - 1:
                raise KeyboardInterrupt

        with mock.patch.object(files, "write_atomically", written), pytest.raises(KeyboardInterrupt):
            prepare_corpus("fineweb", "byte", data_dir=data_dir)
        clear_listings()

    return prepare


def test_an_interrupted_preparation_fetches_only_the_files_that_are_left(server, web, interrupted, tmp_path, capsys):
    whole = prepare_corpus("fineweb", "byte", data_dir=tmp_path / "whole").folder
    expected, skipped = {path.name: path.read_bytes() for path in whole.iterdir()}, set[int]()
    for n in range(1, len(expected) - 1):
        interrupted(n, tmp_path / f"{n}")
        server.fetched.clear()
        done = prepare_corpus("fineweb", "byte", data_dir=tmp_path / f"{n}")
        assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == expected, n
        skipped.add(3 - len(set(server.fetched)))
    assert skipped == {0, 1, 2}
    assert "starts over" not in capsys.readouterr().err


def test_preparation_starts_over_if_the_dataset_has_changed(server, web, write, interrupted, tmp_path, capsys):
    interrupted(2, tmp_path / "data")
    write(f"{WEB}/sample/10BT/002_00000.parquet", ["another cat"])
    done = prepare_corpus("fineweb", "byte", data_dir=tmp_path / "data")
    assert "sample/10BT has changed: its preparation starts over" in capsys.readouterr().err
    assert done.corpus.tokenizer.decode(done.corpus.tokens).endswith("cat\nsat\nanother cat")


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("hf://datasets/org/none", r"hf://datasets/org/none is unavailable: .*repository not found"),
        ("hf://datasets/HuggingFaceFW/fineweb/nothing", "fineweb/nothing is unavailable"),
        ("hf://datasets/org", "hf://datasets/org is unavailable: .*must be 'namespace/name'"),
        ("fineweb", r"fineweb/sample/10BT is unavailable: (?s:.*)Access to HuggingFaceFW/fineweb is restricted"),
    ],
)
def test_unavailable_dataset_is_reported(server, web, clear_listings, tmp_path, corpus, message):
    server.gated.add("HuggingFaceFW/fineweb")
    with pytest.raises(SourceError, match=rf"{message}(?s:.*); check the name and the network, .*: hf auth login"):
        prepare_corpus(corpus, "byte", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unreachable_hub_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"openwebtext is unavailable: .*; check the name and the network"):
        prepare_corpus("openwebtext", "byte", data_dir=tmp_path / "data")


def test_missing_library_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "hf", raising=False)
    with pytest.raises(SourceError, match=r"huggingface_hub.*; pip install what it names, beside 'jaxgpt\[data\]'"):
        prepare_corpus("hf://datasets/org/web", "byte", data_dir=tmp_path / "data")
