import bz2
import gzip
import hashlib
import http.server
import lzma
import os
import socket
import sysconfig
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxgpt.cli import places
from jaxgpt.cli.corpora import absolute
from jaxgpt.prepare import documents, sources
from jaxgpt.prepare.sources import SourceError
from tests.prepare.texts import read


@pytest.mark.parametrize("name", ["python-docs", "python-stdlib"])
def test_embedded_corpora_need_no_download(name):
    source = read(name)
    assert len(source.text) > 400_000
    assert "CPython 3." in source.origin
    assert source == read(name)


def test_the_standard_library_is_read_without_tests_and_installed_packages():
    root, paths = sysconfig.get_path("stdlib"), sources.python_stdlib().readers
    folders = {part for path in paths for part in Path(path).relative_to(root).parts[:-1]}
    assert "json" in folders
    assert not folders & {"test", "tests", "site-packages", "pip"}


@pytest.mark.parametrize(
    ("data", "text", "notes"),
    [
        (b"plain\n", "plain\n", ()),
        (b"\xef\xbb\xbfmark\n", "mark\n", ("byte order marks dropped: 1",)),
        (b"a\r\nb\rc\n", "a\nb\nc\n", ("turned 2 CR or CRLF line ends into LF",)),
        ("é\n".encode(), "é\n", ()),
    ],
)
def test_files_are_read_as_utf8_with_plain_line_ends(tmp_path, data, text, notes):
    (tmp_path / "a.txt").write_bytes(data)
    source = read(str(tmp_path / "a.txt"))
    assert source.text == text
    assert source.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert source.notes == notes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no text"),
        (b" \n\t", "holds no text"),
        (b"caf\xe9 au lait", r"byte 0xe9 at offset 3 \(.*iconv -f ENCODING -t UTF-8"),
        ("café ".encode() + b"caf\xe9 au lait", r"byte 0xe9 at offset 9 \(.*iconv -c -f UTF-8"),
        ("é".encode() + b"a" * documents.PIECE + b"\xe9", r"byte 0xe9 at offset 1,048,578 \(unexpected end of data"),
        ("text".encode("utf-16"), "is UTF-16: iconv -f UTF-16 -t UTF-8"),
        ("text".encode("utf-32"), "is UTF-32: iconv -f UTF-32 -t UTF-8"),
        ("中文 字".encode("utf-16-le"), r"byte 0x00 at offset 5 \(a NUL byte\); "),
        (np.arange(1, 60, dtype=np.uint16).tobytes(), r"byte 0x00 at offset 1 \(a NUL byte\); "),
        (b"a" * documents.PIECE + b"b\0", r"byte 0x00 at offset 1,048,577 \(a NUL byte\); .*\| tr -d '\\0'"),
        (gzip.compress(b"text", mtime=0), "compressed with gzip: .*a name that ends in .gz, or .* gunzip"),
        (bz2.compress(b"text"), "compressed with bzip2"),
        (lzma.compress(b"text"), "compressed with xz"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<u2'", "NumPy array"),
        (b"PK\x03\x04\x14\x00", "ZIP archive"),
        (b"PAR1\x15\x04\x00", r"Parquet file: .*\.parquet"),
        (b"ARROW1\0\0\xff\xff", r"Arrow file: .*to_parquet"),
        (b"\xff\xff\xff\xff\x08\x01\0\0", r"save_to_disk: .*to_parquet"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    ],
)
def test_non_text_file_is_refused_with_the_reason(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"BZh91AY&SY\0", "compressed with bzip2"),
        (lzma.compress(b"text"), "compressed with xz"),
        (b"a" * documents.TAR + b"ustar\0", "is a tar archive"),
        ("the cat".encode("utf-32-le"), "byte 0x00 at offset 1 "),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3 "),
    ],
)
def test_non_text_file_is_recognized_after_short_reads(data, message):
    """As from a slow server."""
    with pytest.raises(SourceError, match=message):
        list(documents.utf8((data[i : i + 1] for i in range(len(data))), "a"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_tar_archive_is_refused(tmp_path, name):
    (tmp_path / "b.txt").write_text("text")
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(tmp_path / "b.txt", "b.txt")
    with pytest.raises(SourceError, match=rf"{name} is a tar archive: extract its files \(tar -xf\)"):
        read(str(tmp_path / name))


def test_leading_tilde_is_expanded_only_to_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "b.txt").write_text("at home")
    (tmp_path / "~draft.txt").write_text("a draft")
    assert read("~draft.txt").text == "a draft"
    assert absolute("~draft.txt") == str(tmp_path / "~draft.txt")
    assert read("~/b.txt").text == "at home"
    assert absolute("~/b.txt") == str(tmp_path / "home" / "b.txt")


def test_folder_is_read_in_order_without_hidden_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "b.txt": "B",
        "a.txt": "A\r\n",
        "sub/c.md": "C",
        ".hidden": "H",
        ".git/x": "X",
    }.items():
        (tmp_path / name).write_text(text, newline="")
    source = read(str(tmp_path))
    assert source.text == "A\n\nB\nC"
    assert source.origin == f"3 files in {tmp_path}"
    assert source.notes == ("turned 1 CR or CRLF line ends into LF",)


def test_linked_folders_are_followed_without_loops(tmp_path):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere" / "deep"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    (folder / "a.txt").write_text("A")
    (elsewhere / "b.txt").write_text("B")
    for link, target in {
        "linked": "../elsewhere",
        "sub/loop": "..",
        "missing": "nowhere",
        "self": "self",
        ".hidden": "../elsewhere",
        "z.txt": "a.txt",
    }.items():
        (folder / link).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    source = read(str(folder))
    assert source.text == "A\nB\nA"
    found = {note.split(":")[0] for note in source.notes}
    assert found == {"linked/deep/back", "sub/loop", "missing", "self"}
    assert all("left out, a broken link, or a link to a folder above it" in note for note in source.notes)
    (tmp_path / "link").symlink_to(folder)
    assert read(str(tmp_path / "link")).text == source.text, "a corpus may be a link itself"


def test_named_corpus_hides_a_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python-docs").write_text("mine")
    assert "CPython" in read("python-docs").origin
    assert read("./python-docs").text == "mine"
    assert absolute("./python-docs") == str(tmp_path / "python-docs")


def test_text_of_a_pipe_can_be_read_repeatedly(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    end, begin = os.pipe()
    os.write(begin, data := b"the\r\ncat")
    os.close(begin)
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=[data])
    writer.start()
    for path in (f"/dev/fd/{end}", str(tmp_path / "fifo")):
        text = sources.open_text(path)
        for _ in range(2):
            assert "".join(text.pieces("")) == "the\ncat"
        assert (text.name, text.origin, text.size) == ("pipe", path, len(data))
        assert absolute(path) == path
    writer.join()
    os.close(end)


def test_folder_has_one_note_for_each_kind_of_change(tmp_path):
    for i in range(1200):
        (tmp_path / f"{i:04}.txt").write_bytes(b"a\r\nb\r\n")
    for name in "yz":
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbfmark")
    assert set(read(str(tmp_path)).notes) == {
        "turned 2,400 CR or CRLF line ends into LF",
        "byte order marks dropped: 2",
    }


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_position_of_a_character_in_a_folder(tmp_path, monkeypatch, size):
    monkeypatch.setattr("jaxgpt.prepare.documents.PIECE", size)
    for name, text in {"a.txt": "one\r\ntwo", "b.txt": "\n\n", "c/d.txt": "thrée\nfour\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    source = sources.open_text(str(tmp_path))
    text = "".join(source.pieces(""))
    assert text == "one\ntwo\n\n\n\nthrée\nfour\n"
    for sought, position in {
        "o": "line 1 of the text in {}/a.txt",
        "\n": "line 1 of the text in {}/a.txt",
        "w": "line 2 of the text in {}/a.txt",
        "\n\n": "line 2 of the text in {}/a.txt",
        "\n\n\n": "line 2 of the text in {}/a.txt",
        "é": "line 1 of the text in {}/c/d.txt",
        "u": "line 2 of the text in {}/c/d.txt",
    }.items():
        assert source.where(text.index(sought)) == position.format(tmp_path)
    (tmp_path / "one.txt").write_text("first\nsecond")
    one = sources.open_text(str(tmp_path / "one.txt"))
    assert one.where(8) == f"line 2 of the text in {tmp_path}/one.txt"


def test_folder_without_texts_is_refused(tmp_path):
    (tmp_path / "data" / "a-char").mkdir(parents=True)
    (tmp_path / "data" / "a-char" / "tokens.json").write_text('{\n  "format": 2,')
    (tmp_path / "data" / ".hidden").write_text("text")
    with pytest.raises(SourceError, match=r"data has no files of text; .* for a prepared corpus give its own folder"):
        sources.open_text(str(tmp_path / "data"))


def test_non_text_file_in_a_folder_is_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(SourceError, match=r"image\.png is a PNG image; expected UTF-8"):
        read(str(tmp_path))


def test_unknown_corpus_error_lists_the_named_ones():
    for name in ("no-such-corpus", "0.7*a.txt+0.3*b.txt", "/dev/null"):
        with pytest.raises(SourceError, match=r"python-docs, .*'0\.7\*a\.txt \+ 0\.3\*b\.txt'"):
            read(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [(PermissionError(13, "Permission denied"), "Permission denied"), (TimeoutError(), "TimeoutErr")],
)
def test_unreadable_file_is_reported(tmp_path, monkeypatch, error, message):
    def denied(self, *mode):
        raise error

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SourceError, match=rf"a\.txt cannot be read: {message}"):
        read(str(tmp_path / "a.txt"))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="only Linux has this file, whose start is unreadable")
def test_a_file_whose_start_cannot_be_read_is_closed():
    with pytest.raises(SourceError, match="/proc/self/mem cannot be read: Input/output error"):
        read("/proc/self/mem")


@pytest.fixture
def server(tmp_path):
    """The address of a web server that serves tmp_path / 'www'."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def log_message(self, *args):
            pass

        def end_headers(self):
            if "encoding" in self.path:
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

        def send_header(self, name, value):
            """With a query, the response has no Content-Length."""
            if name != "Content-Length" or "?" not in self.path:
                super().send_header(name, value)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_url_is_read(tmp_path, server):
    (tmp_path / "www" / "a.txt").write_text("to be\nor not")
    assert "".join(sources.open_text(f"{server}/a.txt").pieces("")) == "to be\nor not"
    with pytest.raises(SourceError, match=r"b\.txt is unavailable: 404, message='File not found'"):
        sources.open_text(f"{server}/b.txt")
    with pytest.raises(SourceError, match=r"c\.txt is unavailable: Cannot connect to host 127\.0\.0\.1:1 "):
        sources.open_text("http://127.0.0.1:1/c.txt")


def test_a_large_text_and_parquet_need_no_range_requests(tmp_path, server):
    text = "to be or not\n" * 2**19
    (tmp_path / "www" / "a.txt").write_text(text)
    (tmp_path / "www" / "a.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    parquet.write_table(pyarrow.table({"text": [text] * 2}), tmp_path / "www" / "a.parquet")
    for name, n in (("a.txt", 1), ("a.txt?made", 1), ("a.txt.gz", 1), ("a.parquet", 2), ("a.parquet?made", 2)):
        assert "".join(sources.open_text(f"{server}/{name}").pieces("")) == "\n\n".join([text] * n)


def test_gzip_from_a_server_without_its_size_or_with_an_encoding(tmp_path, server, monkeypatch):
    monkeypatch.setattr(documents, "ALWAYS_ALLOWED", 100)
    text = "".join(f"{i * i} to be or not\n" for i in range(2000))
    (tmp_path / "www" / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    for query in ("?size", "?encoding"):
        assert "".join(sources.open_text(f"{server}/a.txt.gz{query}").pieces("")) == text
    (tmp_path / "www" / "b.txt.gz").write_bytes(gzip.compress(b"<!doctype html>Log in"))
    with pytest.raises(SourceError, match="is a page of HTML"):
        read(f"{server}/b.txt.gz?encoding")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_no_space_for_a_temporary_copy_is_reported(tmp_path, server, monkeypatch):
    """Copies are made of pipes, and of Parquet on the web."""
    opened = []

    def full():
        opened.append(open("/dev/full", "w+b"))  # noqa: SIM115 (the code under test closes it)
        return opened[-1]

    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "www" / "a.parquet")
    end, begin = os.pipe()
    os.write(begin, b"the cat")
    os.close(begin)
    monkeypatch.setattr(documents.tempfile, "TemporaryFile", full)
    for corpus in (f"/dev/fd/{end}", f"{server}/a.parquet"):
        with pytest.raises(SourceError, match=rf"^{corpus} is .*No space left.*; make room in /.*, or set TMPDIR to"):
            read(corpus)
    assert [file.closed for file in opened] == [True, True]
    os.close(end)


def test_a_copy_that_fails_for_another_reason_is_not_blamed_on_the_space(tmp_path, server, monkeypatch):
    def fail(data):
        raise OSError(5, "Input/output error")

    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "www" / "a.parquet")
    spool = SimpleNamespace(write=fail, close=lambda: None)
    monkeypatch.setattr(documents.tempfile, "TemporaryFile", lambda: spool)
    with pytest.raises(SourceError, match=r"a\.parquet is unavailable: .*Input/output error$"):
        read(f"{server}/a.parquet")


def test_error_of_a_store_without_a_message_is_named():
    message = r"^gs://bucket/a is unavailable: TimeoutError$"
    with pytest.raises(SourceError, match=message), sources.store_errors("gs://bucket/a"):
        raise TimeoutError


@pytest.mark.parametrize(("spaces", "allowed"), [(50_000, True), (150_000, False)])
def test_a_gzip_file_may_unpack_to_a_hundred_times_its_size(tmp_path, monkeypatch, spaces, allowed):
    monkeypatch.setattr(documents, "ALWAYS_ALLOWED", 100)
    text = "".join(hashlib.sha512(bytes([i])).hexdigest() for i in range(16)) + " " * spaces
    (tmp_path / "a.txt.gz").write_bytes(packed := gzip.compress(text.encode()))
    assert (len(text) < 99 * len(packed), len(text) > 25 * len(packed)) == (allowed, True)
    if allowed:
        assert read(str(tmp_path / "a.txt.gz")).text == text
    else:
        with pytest.raises(SourceError, match=rf"unpacks to more than {100 * len(packed):,} bytes; .*: gunzip"):
            read(str(tmp_path / "a.txt.gz"))


def test_html_page_at_a_url_is_refused(tmp_path, server):
    """As a server sends for a folder."""
    (tmp_path / "www" / "texts").mkdir()
    (tmp_path / "www" / "a.html").write_text('\n<!doctype html><a href="b.html">b</a>')
    (tmp_path / "www" / "b.txt").write_text("<HTML><body>Log in")
    for name in ("texts", "texts/", "a.html", "b.txt"):
        with pytest.raises(SourceError, match=f"{server}/{name} is a page of HTML, .*expected a file of UTF-8"):
            read(f"{server}/{name}")


class TestDownload:
    DATA = b"To be, or not to be"
    SHA = hashlib.sha256(DATA).hexdigest()

    def test_file_with_the_expected_hash_is_kept(self, tmp_path, server):
        (tmp_path / "www" / "a.txt").write_bytes(self.DATA)
        target = tmp_path / "cache" / "a.txt"
        assert sources.download(f"{server}/a.txt", target, 100, self.SHA) == target
        assert target.read_bytes() == self.DATA
        assert list(target.parent.iterdir()) == [target], "no partial file is left"

    @pytest.mark.parametrize(("data", "limit"), [(DATA + b"x", 100), (DATA, 10)])
    def test_file_with_another_hash_is_not_kept(self, tmp_path, server, data, limit):
        (tmp_path / "www" / "a.txt").write_bytes(data)
        with pytest.raises(SourceError, match=rf"SHA-256 {self.SHA} expected.*; fetch it elsewhere and put it at"):
            sources.download(f"{server}/a.txt", tmp_path / "cache" / "a.txt", limit, self.SHA)
        assert not (tmp_path / "cache").exists()

    def test_server_without_http_is_reported(self, tmp_path):
        def answer():
            with listener.accept()[0] as peer:
                peer.recv(1000)
                peer.sendall(b"SSH-2.0-jaxgpt\r\n\r\n")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(SourceError, match="cannot be fetched"):
                sources.download(f"http://127.0.0.1:{listener.getsockname()[1]}/", tmp_path / "a", 100, self.SHA)
            thread.join()

    def test_unwritable_cache_is_reported(self, tmp_path, server):
        (tmp_path / "www" / "a.txt").write_bytes(self.DATA)
        (tmp_path / "cache").touch()
        with pytest.raises(SourceError, match=r"cannot be fetched to .*cache/a\.txt .*fetch it elsewhere"):
            sources.download(f"{server}/a.txt", tmp_path / "cache" / "a.txt", 100, self.SHA)

    def test_unreachable_server_error_says_where_to_put_the_file(self, tmp_path):
        target = tmp_path / "a.txt"
        with pytest.raises(SourceError) as caught:
            sources.download("http://127.0.0.1:1/a.txt", target, 100, self.SHA)
        assert str(caught.value).endswith(f"put it at {target} or data/a.txt, SHA-256 {self.SHA}")


class TestShakespeare:
    @pytest.fixture(autouse=True)
    def isolated(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("JAXGPT_DATA", raising=False)

    def test_a_local_copy_is_found_by_file_or_folder(self, shakespeare, monkeypatch):
        for given in (shakespeare, shakespeare.parent):
            monkeypatch.setenv("JAXGPT_DATA", str(given))
            source = read("shakespeare")
            assert len(source.text) == sources.SHAKESPEARE_BYTES
            assert source.sha256 == sources.SHAKESPEARE_SHA256

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "tinyshakespeare.txt").write_text("To be")
        with pytest.raises(SourceError, match="not the expected file"):
            read("shakespeare")

    def test_missing_path_is_refused(self, monkeypatch):
        monkeypatch.setenv("JAXGPT_DATA", "/no/such/place")
        with pytest.raises(SourceError, match="JAXGPT_DATA is /no/such/place"):
            read("shakespeare")

    def test_download_goes_into_data_without_a_cache_folder(self, tmp_path, server, monkeypatch):
        data = b"To be, or not to be"
        (tmp_path / "www" / "input.txt").write_bytes(data)
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{server}/input.txt")
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(data).hexdigest())
        monkeypatch.setattr(places, "cache_dir", lambda: None)
        assert read("shakespeare").origin == "data/tinyshakespeare.txt"

    def test_download_goes_into_the_cache(self, tmp_path, server, monkeypatch):
        data = b"To be, or not to be"
        (tmp_path / "www" / "input.txt").write_bytes(data)
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{server}/input.txt")
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(data).hexdigest())
        assert read("shakespeare").text == data.decode()
        (tmp_path / "www" / "input.txt").unlink()
        assert read("shakespeare").text == data.decode(), "the second time it comes from the cache"


def test_tokens_json_is_not_a_text(tmp_path):
    (tmp_path / "tokens.json").write_text('{\n  "format": 2,')
    with pytest.raises(SourceError, match=r"tokens.json describes a prepared corpus.*: give the folder"):
        sources.open_text(str(tmp_path / "tokens.json"))
