"""Where text comes from: named corpora, and files, folders and pipes of the user's."""

import hashlib
import http.client
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np

from jaxgpt import files as disk
from jaxgpt.config import MissingExtraError, UsageError
from jaxgpt.prepare import files
from jaxgpt.prepare.files import Seen, SourceError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
COUNT = re.compile(r"\d[\d,]*")
"""The count in a note on what was changed in a file."""


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

    def stream(self) -> "Stream":
        """The same, to be read piece by piece."""

        def pieces(notes: list[str], seen: Seen) -> Iterator[str]:
            notes += self.notes
            for i in range(0, len(self.text), files.PIECE):
                yield self.text[i : i + files.PIECE]
                seen(min(files.PIECE, len(self.text) - i))

        return Stream(self.name, self.origin, len(self.text), pieces)


@dataclass(frozen=True)
class Stream:
    """A text of any size, read piece by piece, as often as is wanted."""

    name: str
    origin: str
    size: int
    """In bytes as they lie there, about."""
    reader: Callable[[list[str], Seen], Iterator[str]]
    """Pieces of the text; adds notes to a list at the end, and tells how many bytes it has read on the way."""
    documents: bool = False
    """Whether it has a column: some of it is JSON Lines or Parquet."""
    streams: tuple["Stream", ...] = ()
    """The files of a folder, between which the text has a line feed."""

    def pieces(self, notes: list[str], seen: Seen = files.unseen) -> Iterator[str]:
        """The text, piece by piece; notes on what was changed are added at its end.

        Raises:
          SourceError: it cannot be read, or there is nothing but white space in it.
        """
        blank = True
        with reached(self.origin):
            for piece in self.reader(notes, seen):
                blank = blank and not piece.strip()
                if piece:
                    yield piece
        if blank:
            raise SourceError(f"{self.origin} holds no text")

    def where(self, position: int) -> str:
        """Line, column (both from 1) and file of a character of the text, which is read again up to there."""
        for each in self.streams or (self,):
            line = column = 1
            for piece in chain(each.reader([], files.unseen), "\n"):
                before = piece[:position]
                line += before.count("\n")
                column = len(before) - before.rfind("\n") if "\n" in before else column + len(before)
                if len(before) < len(piece):
                    return f"line {line}, column {column} of the text in {each.origin}"
                position -= len(before)
        return f"the end of {self.origin}"


def read(corpus: str, column: str = "text") -> Source:
    """The whole text of `open_stream`, in memory."""
    stream, notes = open_stream(corpus, column), list[str]()
    text = "".join(stream.pieces(notes))
    return Source(stream.name, text, stream.origin, tuple(notes))


def open_stream(corpus: str, column: str = "text") -> Stream:
    """The text of a named corpus, of a file, folder or pipe, or at a URL: UTF-8, or documents as in `files.pieces`.

    Line ends become LF and a byte order mark is dropped; notes say so when it happened.

    Raises:
      SourceError: there is no such corpus. That it cannot be read is found as it is read.
    """
    if not corpus:
        raise SourceError("the corpus has no name; give a named corpus, a file or a folder")
    if corpus in NAMED:
        if os.path.exists(corpus):
            note = f"{corpus} is the named corpus; to read the file or folder of that name, give ./{corpus}"
            print(f"jaxgpt: {note}", file=sys.stderr)
        return NAMED[corpus]().stream()
    path = place(corpus)
    with reached(corpus):
        if path.is_dir():
            return _folder(path, column)
        if path.is_file():
            name = Path(files.name_of(path).removesuffix(".gz")).stem
            origin, documents = corpus if is_url(corpus) else str(path.resolve()), files.holds_documents(path, column)
            return Stream(name, origin, path.stat().st_size, partial(files.pieces, path, column), documents)
        if path.is_fifo():
            return _piped(path)
        if path.exists():
            raise SourceError(f"{corpus} is a device or a socket, expected a file, a folder or a pipe")
    raise SourceError(
        f"no corpus, file or folder {corpus!r}; named corpora are {', '.join(NAMED)}, "
        "and any file or folder of UTF-8, .jsonl or .parquet can be given by its path"
        + ("; a mixture is written '0.7*a.txt + 0.3*b.txt'" if "*" in corpus or " + " in corpus else "")
        + (", with blanks around + and none around *" if "*" in corpus else "")
    )


def is_url(corpus: str) -> bool:
    """Whether it names something in a store, such as gs://bucket/texts."""
    return "://" in corpus


def place(corpus: str) -> Path:
    """Where a corpus lies, to be read as any path; that of a URL needs the extra `remote`.

    Raises:
      MissingExtraError: it is not installed.
      SourceError: there is no such kind of store.
    """
    if not is_url(corpus):
        return Path(os.path.expanduser(corpus))  # of "~draft.txt" pathlib's would raise: there is no such user
    try:
        from upath import UPath
    except ImportError as error:
        raise MissingExtraError(f"{corpus}, in a store,", "universal_pathlib", "remote") from error
    with reached(corpus):
        return cast(Path, UPath(corpus))


def inside(folder: str, name: str) -> Path:
    """The file `name` of a folder; the query of a URL, such as a signature, stays at its end."""
    path, mark, query = folder.partition("?")
    if not (mark and is_url(folder)):
        return place(folder) / name
    return place(f"{path.rstrip('/')}/{name}?{query}")


@contextmanager
def reached(corpus: str) -> Iterator[None]:
    """What goes wrong as `corpus` is looked at, as a SourceError: of a store anything, for its errors are its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError) or not (is_url(corpus) or isinstance(error, OSError)):
            raise
        hint = "; pip install what it names, beside 'jaxgpt[remote]'" if isinstance(error, ImportError) else ""
        raise SourceError(f"{corpus} cannot be had: {str(error) or type(error).__name__}{hint}") from error


def absolute(corpus: str) -> str:
    """The same corpus from wherever it is named: a path in full; of a mixture, each part."""
    found = mixture(corpus)
    if len(found) > 1:
        shares = (np.format_float_positional(share, trim="-") for share, _ in found)
        return " + ".join(f"{share}*{absolute(part)}" for share, (_, part) in zip(shares, found, strict=True))
    if corpus in NAMED or is_url(corpus):
        return corpus
    path = place(corpus)
    return str(path.absolute() if path.is_fifo() else path.resolve())  # /dev/stdin, and not the pipe behind it


def mixture(corpus: str) -> list[tuple[float, str]]:
    """The parts of "0.7*wiki.jsonl + 0.3*code" with their weights; any other corpus is its only part.

    >>> mixture("0.7*wiki.jsonl + 0.3*code")
    [(0.7, 'wiki.jsonl'), (0.3, 'code')]
    >>> mixture("notes.txt")
    [(1.0, 'notes.txt')]
    """
    parts = [re.fullmatch(r"([0-9]*\.?[0-9]+)\*(\S.*)", part.strip()) for part in corpus.split(" + ")]
    found = [(float(part[1]), part[2]) for part in parts if part]
    if len(found) < 2 or len(found) < len(parts):
        return [(1.0, corpus)]
    if not all(share > 0 for share, _ in found) or len({part for _, part in found}) < len(found):
        raise SourceError(f"{corpus!r}: expected parts that differ, each with a weight above 0")
    if (least := min(share for share, _ in found) / sum(share for share, _ in found)) < 1e-3:
        raise SourceError(f"{corpus!r}: the least weight is {least:.2g} of all, expected a thousandth or more")
    return found


def _piped(path: Path) -> Stream:
    """What comes out of a pipe: read once, into a temporary file that is there as long as the stream."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the stream)
    with path.open("rb") as pipe:
        shutil.copyfileobj(pipe, spool, files.PIECE)

    def pieces(notes: list[str], seen: Seen) -> Iterator[str]:
        spool.seek(0)
        yield from files.plain(files.utf8(files.chunks(spool, seen), str(path)), notes)

    stream = Stream("pipe", str(path), spool.tell(), pieces)
    weakref.finalize(stream, spool.close)
    return stream


def _folder(folder: Path, column: str) -> Stream:
    """All files below `folder` that are not hidden, in the order of their paths, with LF between them."""
    paths, left_out = list[Path](), list[str]()
    for path in sorted(folder.rglob("*") if is_url(str(folder)) else _below(folder, {folder.resolve()})):
        inner = path.relative_to(folder)
        if any(part.startswith(".") for part in inner.parts):
            continue
        if path.name == "tokens.json" and path.is_file() and is_ours(path):
            left_out.append(f"{inner}: left out, a vocabulary written by jaxgpt")
        elif path.is_file():
            paths.append(path)
        elif path.is_symlink():
            left_out.append(f"{inner}: left out, a link to nothing or to a folder that it is in")
    each = tuple(
        Stream(str(path.relative_to(folder)), str(path), path.stat().st_size, partial(files.pieces, path, column))
        for path in paths
    )

    def pieces(notes: list[str], seen: Seen) -> Iterator[str]:
        notes += left_out
        changed: dict[str, list[tuple[str, str]]] = {}
        for i, file in enumerate(each):
            found: list[str] = []
            yield "\n" * bool(i)
            yield from file.reader(found, seen)
            for note in found:
                changed.setdefault(COUNT.sub("", note), []).append((file.name, note))
        notes += [_summed(found) for found in changed.values()]

    name = folder.name if is_url(str(folder)) else folder.resolve().name
    documents = any(files.holds_documents(path, column) for path in paths)
    return Stream(name, f"{len(paths)} files in {folder}", sum(file.size for file in each), pieces, documents, each)


def _summed(found: list[tuple[str, str]]) -> str:
    """One note in place of those of several files, (name, note), that differ in their count alone."""
    (name, note), *more = found
    if not more:
        return f"{name}: {note}"
    counts = [int(count[0].replace(",", "")) for _, each in found if (count := COUNT.search(each))]
    return COUNT.sub(f"{sum(counts):,}", note, count=1) + f", in {len(found):,} files, the first {name}"


def _below(folder: Path, above: set[Path]) -> Iterator[Path]:
    """What is in a local folder and in those that it holds or links to, but for the folders `above` it."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and (real := path.resolve()) not in above:
            yield from _below(path, above | {real})
        else:
            yield path


def is_ours(path: Path) -> bool:
    """Whether a tokens.json begins as `prepare` writes it."""
    begin = b'{\n  "format": '
    with path.open("rb") as file:
        return file.read(len(begin)) == begin


def _python_docs() -> Source:
    """The Python language reference that every CPython carries for `help()`."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics))
    text = "".join(files.plain([joined], []))
    return Source("python-docs", text, f"pydoc_data.topics of CPython {platform.python_version()}")


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
    text = "\n".join(files.read_text(path)[0] for path in paths)
    origin = f"{len(paths)} modules of the standard library of CPython {platform.python_version()}"
    return Source("python-stdlib", text, origin)


def _shakespeare() -> Source:
    """Tiny Shakespeare: a local copy, else the cache, else a checked download into the cache, or data/ without one."""
    candidates = [folder / "tinyshakespeare.txt" for folder in (Path("data"), cache_dir()) if folder]
    if given := os.environ.get("JAXGPT_DATA"):
        path = Path(os.path.expanduser(given))
        candidates.insert(0, path / "tinyshakespeare.txt" if path.is_dir() else path)
        if not candidates[0].is_file():
            raise SourceError(f"$JAXGPT_DATA is {given}, but there is no file {candidates[0]}")
    found = next((path for path in candidates if path.is_file()), None)
    path = found or download(SHAKESPEARE_URL, candidates[-1], SHAKESPEARE_BYTES, SHAKESPEARE_SHA256)
    data = path.read_bytes()
    require_sha256(data, SHAKESPEARE_SHA256, str(path))
    return Source("shakespeare", data.decode(), str(path))


def download(url: str, target: Path, size_limit: int, sha256: str) -> Path:
    """Fetch `url` to `target`, checked, and whole or not at all.

    Raises:
      SourceError: no network, more than `size_limit` bytes, another SHA-256, or `target` cannot be written.
    """
    places = " or ".join(dict.fromkeys([str(target), f"data/{target.name}"]))
    by_hand = f"fetch it elsewhere and put it at {places}, SHA-256 {sha256}"
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


def cache_dir() -> Path | None:
    """The user's cache folder; None for a user without a home folder who names none in $XDG_CACHE_HOME."""
    folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return None if folder.parts[0] == "~" else folder / "jaxgpt"


def require_sha256(data: bytes, expected: str, origin: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SourceError(f"{origin} is not the expected file: SHA-256 {expected} expected, {found} found")


NAMED: dict[str, Callable[[], Source]] = {
    "python-docs": _python_docs,
    "python-stdlib": _python_stdlib,
    "shakespeare": _shakespeare,
}
