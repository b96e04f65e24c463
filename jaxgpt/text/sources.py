"""Where text comes from: named corpora, and files and folders of the user's."""

import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxgpt import disk
from jaxgpt.text.files import SourceError, decode_utf8, read_text, read_utf8

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


@dataclass(frozen=True)
class Source:
    """A text and where it came from."""

    name: str
    text: str
    origin: str
    """The path, URL or program that it was read from, with its version."""
    notes: tuple[str, ...] = ()
    """What was changed on the way in, such as line ends."""

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def read(corpus: str, column: str = "text") -> Source:
    """The text of a named corpus, or of a file or folder: UTF-8, or documents as in `files.read_text`.

    Line ends become LF and a byte order mark is dropped; `notes` says so when it happened.

    Raises:
      SourceError: there is no such corpus, or it is empty, not UTF-8 or out of reach.
    """
    if not corpus:
        raise SourceError("the corpus has no name; give a named corpus, a file or a folder")
    if corpus in NAMED:
        source = NAMED[corpus]()
    elif (path := Path(corpus).expanduser()).is_dir():
        source = _folder(path, column)
    elif path.is_file():
        text, notes = read_text(path, column)
        source = Source(Path(path.name.removesuffix(".gz")).stem, text, str(path.resolve()), notes)
    else:
        raise SourceError(
            f"no corpus, file or folder {corpus!r}; named corpora are {', '.join(NAMED)}, "
            "and any file or folder of UTF-8, .jsonl or .parquet can be given by its path"
        )
    if not source.text.strip():
        raise SourceError(f"{source.origin} holds no text")
    return source


def _folder(folder: Path, column: str) -> Source:
    """All files below `folder` that are not hidden, in the order of their paths, with LF between them."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    read = [(path, *read_text(path, column)) for path in paths]
    notes = tuple(f"{path.relative_to(folder)}: {note}" for path, _, found in read for note in found)
    return Source(
        folder.resolve().name,
        "\n".join(text for _, text, _ in read),
        f"{len(paths)} files in {folder}",
        notes,
    )


def _python_docs() -> Source:
    """The Python language reference that every CPython carries for `help()`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    text, notes = decode_utf8(text.encode(), "pydoc_data.topics")
    return Source("python-docs", text, f"pydoc_data.topics of CPython {platform.python_version()}", notes)


def _python_stdlib() -> Source:
    """The standard library's own sources, tests and bundled packages excepted."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "__pycache__",
        "ensurepip",
    }
    paths = sorted(path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts))
    text = "\n".join(read_utf8(path)[0] for path in paths)
    origin = f"{len(paths)} modules of the standard library of CPython {platform.python_version()}"
    return Source("python-stdlib", text, origin)


def _shakespeare() -> Source:
    """Tiny Shakespeare: a local copy, else the cache, else a checked download into the cache."""
    cache = cache_dir() / "tinyshakespeare.txt"
    candidates = [Path("data/tinyshakespeare.txt"), cache]
    if given := os.environ.get("JAXGPT_DATA"):
        path = Path(given).expanduser()
        candidates.insert(0, path / "tinyshakespeare.txt" if path.is_dir() else path)
        if not candidates[0].is_file():
            raise SourceError(f"$JAXGPT_DATA is {given}, but there is no file {candidates[0]}")
    found = next((path for path in candidates if path.is_file()), None)
    path = found or download(SHAKESPEARE_URL, cache, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256)
    data = path.read_bytes()
    require_sha256(data, SHAKESPEARE_SHA256, str(path))
    return Source("shakespeare", data.decode(), str(path))


def download(url: str, target: Path, size_limit: int, sha256: str) -> Path:
    """Fetch `url` to `target`, checked, and whole or not at all.

    Raises:
      SourceError: no network, more than `size_limit` bytes, another SHA-256, or `target` cannot be written.
    """
    by_hand = f"fetch it elsewhere and put it at {target} or data/{target.name}, SHA-256 {sha256}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read(size_limit + 1)
    except (OSError, http.client.HTTPException) as error:
        raise SourceError(f"{url} cannot be fetched ({error}); {by_hand}") from error
    if len(data) > size_limit:
        raise SourceError(f"{url} is larger than the {size_limit:,} bytes expected; {by_hand}")
    require_sha256(data, sha256, url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomically(target, data)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror}; {by_hand}") from error
    return target


def cache_dir() -> Path:
    """The user's cache folder for downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jaxgpt"


def require_sha256(data: bytes, expected: str, origin: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SourceError(f"{origin} is not the expected file: SHA-256 {expected} expected, {found} found")


NAMED: dict[str, Callable[[], Source]] = {
    "python-docs": _python_docs,
    "python-stdlib": _python_stdlib,
    "shakespeare": _shakespeare,
}
