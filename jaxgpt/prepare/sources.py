"""Where text comes from: named texts, and files, folders, pipes and URLs of the user's."""

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

from jaxgpt import files
from jaxgpt.cli.corpora import NAMED, is_url, local_path
from jaxgpt.config import MissingExtraError, UsageError
from jaxgpt.prepare import documents
from jaxgpt.prepare.documents import SourceError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
COUNT = re.compile(r"\d[\d,]*")
"""The count in a note on what was changed in a file."""


@dataclass(frozen=True)
class Text:
    """A text of any size, which is read piece by piece, as often as needed."""

    name: str
    origin: str
    """The path, URL or program that it is read from, with its version."""
    size: int
    """Bytes of the files, about."""
    reader: Callable[[list[str]], Iterator[str]]
    """Begins to read the text anew, in pieces; adds notes on what was changed at its end."""
    documents: bool = False
    """Whether it has columns: some of it is JSON Lines or Parquet."""
    files: tuple["Text", ...] = ()
    """The files of a folder, between which the text has a line feed."""

    def pieces(self, notes: list[str], progress: Callable[[float], None] = lambda share: None) -> Iterator[str]:
        """The text, piece by piece; notes on what was changed are added at its end.

        Raises:
          SourceError: it cannot be read, or has only white space.
        """
        blank, n = True, 0
        with store_errors(self.origin):
            for piece in self.reader(notes):
                blank, n = blank and not piece.strip(), n + len(piece)
                if piece:
                    yield piece
                progress(min(1.0, n / max(1, self.size)))
        if blank:
            raise SourceError(f"{self.origin} holds no text")

    def where(self, position: int) -> str:
        """Line, column (both from 1) and file of a character of the text, which is read again up to there."""
        for each in self.files or (self,):
            line = column = 1
            for piece in chain(each.reader([]), "\n"):
                before = piece[:position]
                line += before.count("\n")
                column = len(before) - before.rfind("\n") if "\n" in before else column + len(before)
                if len(before) < len(piece):
                    return f"line {line}, column {column} of the text in {each.origin}"
                position -= len(before)
        return f"the end of {self.origin}"


def open_text(corpus: str, column: str = "text") -> Text:
    """A named text, that of a file, folder or pipe, or at a URL: UTF-8, or documents as in `documents.pieces`.

    Line ends become LF and a byte order mark is dropped, which the notes mention.

    Raises:
      SourceError: there is no such text. Other problems show as it is read.
    """
    if not corpus:
        raise SourceError("the corpus has no name; give a named corpus, a file or a folder")
    if corpus in NAMED:
        if os.path.exists(corpus):
            note = f"{corpus} is the named corpus; to read the file or folder of that name, give ./{corpus}"
            print(f"jaxgpt: {note}", file=sys.stderr)
        readers = dict(zip(NAMED, (python_docs, python_stdlib, shakespeare), strict=True))
        text, origin = readers[corpus]()
        return Text(corpus, origin, len(text), lambda notes: iter([text]))
    path = path_of(corpus)
    with store_errors(corpus):
        if path.is_dir():
            return _folder(path, column)
        if path.is_file():
            name = Path(documents.name_of(path).removesuffix(".gz")).stem
            origin, several = corpus if is_url(corpus) else str(path.resolve()), documents.holds_documents(path, column)
            return Text(name, origin, path.stat().st_size, partial(documents.pieces, path, column), several)
        if path.is_fifo():
            return _pipe(path)
        if path.exists():
            raise SourceError(f"{corpus} is a device or a socket, expected a file, a folder or a pipe")
    raise SourceError(
        f"no corpus, file or folder {corpus!r}; named corpora are {', '.join(NAMED)}, "
        "and any file or folder of UTF-8, .jsonl or .parquet can be given by its path"
        + ("; a mixture is written '0.7*a.txt + 0.3*b.txt'" if "*" in corpus or " + " in corpus else "")
        + (", with blanks around + and none around *" if "*" in corpus else "")
    )


def path_of(corpus: str) -> Path:
    """The path of a text or of a prepared folder; that of a URL needs the extra `remote`.

    Raises:
      MissingExtraError: it is not installed.
      SourceError: there is no such kind of store.
    """
    if not is_url(corpus):
        return local_path(corpus)
    try:
        from upath import UPath
    except ImportError as error:
        raise MissingExtraError(f"{corpus}, in a store,", "universal_pathlib", "data") from error
    with store_errors(corpus):
        return cast(Path, UPath(corpus))


def inside(folder: str, name: str) -> Path:
    """The file `name` of a folder; the query of a URL, such as a signature, stays at its end."""
    path, mark, query = folder.partition("?")
    if not (mark and is_url(folder)):
        return path_of(folder) / name
    return path_of(f"{path.rstrip('/')}/{name}?{query}")


@contextmanager
def store_errors(corpus: str) -> Iterator[None]:
    """Turn the errors of a file system into SourceErrors, and all errors of a store, which has its own kinds."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError) or not (is_url(corpus) or isinstance(error, OSError)):
            raise
        hint = "; pip install what it names, beside 'jaxgpt[data]'" if isinstance(error, ImportError) else ""
        raise SourceError(f"{corpus} is unavailable: {str(error) or type(error).__name__}{hint}") from error


def _pipe(path: Path) -> Text:
    """The contents of a pipe: read once, into a temporary file that is kept as long as the `Text`."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the text)
    with path.open("rb") as pipe:
        shutil.copyfileobj(pipe, spool, documents.PIECE)

    def pieces(notes: list[str]) -> Iterator[str]:
        spool.seek(0)
        chunks = iter(lambda: spool.read(documents.PIECE), b"")
        yield from documents.plain(documents.utf8(chunks, str(path)), notes)

    text = Text("pipe", str(path), spool.tell(), pieces)
    weakref.finalize(text, spool.close)
    return text


def _folder(folder: Path, column: str) -> Text:
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
        Text(str(path.relative_to(folder)), str(path), path.stat().st_size, partial(documents.pieces, path, column))
        for path in paths
    )

    def pieces(notes: list[str]) -> Iterator[str]:
        changed: dict[str, list[tuple[str, str]]] = {}
        for i, file in enumerate(each):
            yield "\n" * bool(i)
            own = list[str]()
            yield from file.reader(own)
            for note in own:
                changed.setdefault(COUNT.sub("", note), []).append((file.name, note))
        notes += left_out + [_summed(found) for found in changed.values()]

    name = folder.name if is_url(str(folder)) else folder.resolve().name
    several = any(documents.holds_documents(path, column) for path in paths)
    return Text(name, f"{len(paths)} files in {folder}", sum(file.size for file in each), pieces, several, each)


def _summed(found: list[tuple[str, str]]) -> str:
    """One note for the notes of several files, (name, note), that differ only in their count."""
    (name, note), *more = found
    if not more:
        return f"{name}: {note}"
    counts = [int(count[0].replace(",", "")) for _, each in found if (count := COUNT.search(each))]
    return COUNT.sub(f"{sum(counts):,}", note, count=1) + f", in {len(found):,} files, the first {name}"


def _below(folder: Path, above: set[Path]) -> Iterator[Path]:
    """The files in a local folder and in those that it holds or links to, except the folders `above` it."""
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


def python_docs() -> tuple[str, str]:
    """The Python language reference that every CPython carries for `help()`, and its origin."""
    from pydoc_data.topics import topics

    text = "".join(documents.plain(["\n\n".join(topics[name] for name in sorted(topics))], []))
    return text, f"pydoc_data.topics of CPython {platform.python_version()}"


def python_stdlib() -> tuple[str, str]:
    """The sources of the standard library, without tests and bundled packages, and their origin."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__", "ensurepip"}
    paths = sorted(path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts))
    text = "\n".join(documents.read_text(path)[0] for path in paths)
    return text, f"{len(paths)} modules of the standard library of CPython {platform.python_version()}"


def shakespeare() -> tuple[str, str]:
    """Tiny Shakespeare and its path: a local copy, or a checked download into the cache, or data/ without one."""
    paths = [folder / "tinyshakespeare.txt" for folder in data_folders()]
    if given := os.environ.get("JAXGPT_DATA"):
        if not local_path(given).is_dir():
            paths[0] = local_path(given)
        if not paths[0].is_file():
            raise SourceError(f"$JAXGPT_DATA is {given}, but there is no file {paths[0]}")
    found = next((path for path in paths if path.is_file()), None)
    path = found or download(SHAKESPEARE_URL, paths[-1], SHAKESPEARE_BYTES, SHAKESPEARE_SHA256)
    data = path.read_bytes()
    require_sha256(data, SHAKESPEARE_SHA256, str(path))
    return data.decode(), str(path)


def data_folders() -> list[Path]:
    """Where downloaded files are looked for: $JAXGPT_DATA (or its folder, if that is a file), data/ and the cache."""
    given = local_path(os.environ.get("JAXGPT_DATA", ""))
    folders = [given if given.is_dir() else given.parent] if os.environ.get("JAXGPT_DATA") else []
    return [*folders, Path("data"), *filter(None, [files.cache_dir()])]


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
        files.write_atomically(target, data)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror}; {by_hand}") from error
    return target


def require_sha256(data: bytes, expected: str, origin: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SourceError(f"{origin} is not the expected file: SHA-256 {expected} expected, {found} found")
