"""Sources of text: named texts, and a user's files, folders, pipes and URLs."""

import errno
import hashlib
import http.client
import json
import os
import platform
import sysconfig
import tempfile
import urllib.request
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from jaxgpt import files
from jaxgpt.cli import places
from jaxgpt.cli.corpora import HUB, NAMED, begins_with, is_prepared, is_tokens_json, is_url
from jaxgpt.cli.places import local_path
from jaxgpt.config import MissingExtraError, UsageError, did_you_mean
from jaxgpt.corpus import shareable
from jaxgpt.prepare import documents
from jaxgpt.prepare.documents import SourceError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
Progress = Callable[[str, float], None]
"""Shows a description of the work, and the share of it that is done, from 0 to 1."""


@dataclass(frozen=True)
class Text:
    """A text of any size, read piece by piece, as often as needed."""

    name: str
    origin: str
    """Path or URL, or the program that carries the text and its version."""
    readers: Mapping[str, Callable[[], Iterator[str]]]
    """Path of each file to a function that reads it from its beginning. A line feed separates two files."""
    size: int
    """Bytes, approximately."""
    left_out: Sequence[str] = ()
    """A note on each file that is not read."""
    version: str = ""
    """SHA-256 of the hashes of a dataset's files on the Hugging Face Hub; it replaces the SHA-256 of the text."""
    progress: Progress = lambda what, share: None

    def pieces(self, what: str) -> Iterator[str]:
        """The text, `documents.normalized`, piece by piece; a SourceError if it has only white space.

        Args:
          what: describes the work to `progress`.
        """
        return (piece for _, piece in self.numbered(what, Counter()))

    def numbered(self, what: str, changes: Counter[str], first: int = 0) -> Iterator[tuple[int, str]]:
        """As `pieces`, from file number `first` on, each with its file number; `changes` as in `notes`."""
        blank, n = not first, 0
        with store_errors(self.origin):
            for i, read in islice(enumerate(self.readers.values()), first, None):
                for piece in chain("\n" * bool(i), documents.normalized(read(), changes)):
                    blank, n = blank and not piece.strip(), n + len(piece)
                    yield i, piece
                    self.progress(what, i / len(self.readers) if self.version else min(1.0, n / max(1, self.size)))
        if blank:
            raise SourceError(f"{self.origin} holds no text")

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces("reading"):
            digest.update(piece.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def notes(self, changes: Counter[str]) -> list[str]:
        """The files left out, and the `changes` that `documents.normalized` counted."""
        return [*self.left_out, *(change.format(count) for change, count in changes.items() if count)]

    def where(self, position: int) -> str:
        """Line (from 1) and file of the character at `position`; rereads the text up to there."""
        with store_errors(self.origin):
            for path, read in self.readers.items():
                line = 1
                for piece in chain(documents.normalized(read()), "\n"):
                    line += piece[:position].count("\n")
                    if position < len(piece):
                        return f"line {line} of the text in {path}"
                    position -= len(piece)
        return f"the end of {self.origin}"


def open_text(corpus: str, column: str = "text") -> Text:
    """Open a named text, file, folder, pipe or URL; files are read as by `documents.pieces`.

    Raises:
      SourceError: there is no such text. Problems in its files are raised when it is read.
    """
    if not corpus:
        raise SourceError("the corpus has no name; give a named corpus, a file or a folder")
    if corpus in NAMED:
        if corpus in HUB:
            return replace(open_text(HUB[corpus], column), name=corpus)
        return {"python-docs": python_docs, "python-stdlib": python_stdlib, "shakespeare": shakespeare}[corpus]()
    with store_errors(corpus):
        path = path_of(corpus)
        if not corpus.startswith(documents.WEB) and path.is_dir():
            if not is_url(corpus) and _written_by_jaxgpt(path):
                raise SourceError(
                    f"{corpus} was written by jaxgpt; expected texts, or a prepared folder such as data/NAME"
                )
            return _folder(path, column)
        if path.is_file():
            if path.name == "tokens.json" and is_tokens_json(path):
                raise SourceError(f"{corpus} describes a prepared corpus: give the folder of that corpus")
            name = Path(documents.name_of(path).removesuffix(".gz")).stem
            return _of_files(name, shareable(corpus) if is_url(corpus) else str(path.resolve()), [path], column)
        if path.is_fifo():
            return _pipe(path)
        if corpus.startswith(("hf://", *documents.WEB)):
            path.stat()  # raises with the reason, such as that there is no such file or dataset
    raise SourceError(
        f"no corpus, file or folder {corpus!r}{did_you_mean(corpus, NAMED)} (named corpora: {', '.join(NAMED)}); any "
        "file or folder of UTF-8, .jsonl or .parquet can be given by its path; a mixture is written "
        "'0.7*a.txt + 0.3*b.txt', with spaces around + and none around *"
    )


def path_of(corpus: str) -> Path:
    """The path of a text or of a prepared folder, local or at a URL, which needs the extra `data`."""
    if not is_url(corpus):
        return local_path(corpus)
    try:
        from upath import UPath
    except ImportError as error:
        raise MissingExtraError(f"{corpus}, in a store,", "universal_pathlib", "data") from error
    options: Any = {}
    if corpus.startswith(documents.WEB):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(sock_connect=30, sock_read=60)}}  # else 300 s for a file
    return cast(Path, UPath(corpus, **options))


@contextmanager
def store_errors(corpus: str, copies: Path | None = None, variable: str = "TMPDIR") -> Iterator[None]:
    """Turn an OSError into a SourceError; at a URL any error, because stores raise their own kinds.

    Args:
      copies: folder of copies, by default that of temporary files. An environment variable sets it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError) or not (is_url(corpus) or isinstance(error, OSError)):
            raise
        hint = ""
        if isinstance(error, ImportError):
            hint = "; pip install what it names, beside 'jaxgpt[data]'"
        elif "hf://" in corpus:
            hint = "; check the name and the network, and log in for a private or gated dataset: hf auth login"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hint = f"; make room in {copies or tempfile.gettempdir()}, or set {variable} to another folder"
        why = str(error) or type(error).__name__
        if error.__cause__ and why == corpus:  # fsspec hides the reason
            why = str(error.__cause__)
        raise SourceError(f"{corpus} is unavailable: {why}{hint}") from error


def _of_files(
    name: str, origin: str, paths: Sequence[Path], column: str = "text", left_out: Sequence[str] = ()
) -> Text:
    readers = {str(path): partial(documents.pieces, path, column) for path in paths}
    size, version = sum(path.stat().st_size for path in paths), ""
    if on_hub := [cast(Any, path) for path in paths if str(path).startswith("hf://datasets/")]:
        hashes = json.dumps([column, *([str(path), path.fs.info(path.path)["blob_id"]] for path in on_hub)])
        version = hashlib.sha256(hashes.encode()).hexdigest()
    return Text(name, origin, readers, size, left_out, version)


def _folder(folder: Path, column: str) -> Text:
    """All files below `folder` that are not hidden, in the order of their paths. If a dataset on the Hugging Face Hub
    has JSON Lines or Parquet, its other files, such as the README, are left out."""
    paths, left_out = list[Path](), list[str]()
    for path in sorted(folder.rglob("*") if is_url(str(folder)) else _below(folder, {folder.resolve()})):
        inner = path.relative_to(folder)
        if any(part.startswith(".") for part in inner.parts):
            continue
        if path.name == "tokens.json" and is_tokens_json(path):
            left_out.append(f"{inner}: left out, a vocabulary written by jaxgpt")
        elif path.is_file():
            paths.append(path)
        elif _written_by_jaxgpt(path):
            left_out.append(f"{inner}: left out, a folder written by jaxgpt")
        elif path.is_symlink():
            left_out.append(f"{inner}: left out, a broken link, or a link to a folder above it")
    others = [path for path in paths if not documents.holds_documents(path, column)]
    if str(folder).startswith("hf://") and len(others) < len(paths):
        why = "left out, a dataset is read from its JSON Lines and Parquet"
        left_out += [f"{path.relative_to(folder)}: {why}" for path in others]
        paths = [path for path in paths if path not in others]
    if not paths:
        raise SourceError(
            f"{folder} has no files of text; hidden ones are left out, and folders that jaxgpt wrote: for a prepared "
            "corpus give its own folder"
        )
    name = folder.name if is_url(str(folder)) else folder.resolve().name
    return _of_files(name, f"{len(paths)} files in {shareable(str(folder))}", paths, column, left_out)


def _below(folder: Path, above: set[Path]) -> Iterator[Path]:
    """The files below a local folder, and the folders that are ours. Links to folders are followed, except to the
    folders `above`."""
    for path in folder.iterdir():
        hidden = path.name.startswith(".")
        if path.is_dir() and not hidden and not _written_by_jaxgpt(path) and (real := path.resolve()) not in above:
            yield from _below(path, above | {real})
        else:
            yield path


def _written_by_jaxgpt(folder: Path) -> bool:
    """Whether a folder is a prepared corpus, a run, an export or a sweep."""
    if is_prepared(folder) or begins_with(folder / "sweep.json", b'{\n  "program": "jaxgpt '):
        return True
    others = folder / "checkpoints", folder / "model.safetensors"
    return is_tokens_json(folder / "tokens.json") and any(map(Path.exists, others))


def _pipe(path: Path) -> Text:
    """Copy a pipe into a temporary file, which lives as long as the `Text`."""
    spool = documents.temporary_copy(path)

    def read() -> Iterator[str]:
        spool.seek(0)
        return documents.utf8(iter(lambda: spool.read(documents.PIECE), b""), str(path))

    weakref.finalize(read, spool.close)
    return Text("pipe", str(path), {str(path): read}, spool.tell())


def python_docs() -> Text:
    """The Python language reference that comes with CPython, for `help()`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    origin = f"pydoc_data.topics of CPython {platform.python_version()}"
    return Text("python-docs", origin, {origin: lambda: iter([text])}, len(text))


def python_stdlib() -> Text:
    """The source code of the standard library, without tests and bundled packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__", "ensurepip"}
    paths = sorted(path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts))
    origin = f"{len(paths)} modules of the standard library of CPython {platform.python_version()}"
    return _of_files("python-stdlib", origin, paths)


def shakespeare() -> Text:
    """Tiny Shakespeare, checked: from $JAXGPT_DATA (the file or its folder), data/, the cache, or a download."""
    if given := os.environ.get("JAXGPT_DATA"):
        path = local_path(given)
        path = path / "tinyshakespeare.txt" if path.is_dir() else path
        if not path.is_file():
            raise SourceError(f"$JAXGPT_DATA is {given}, but there is no file {path}")
    else:
        paths = [folder / "tinyshakespeare.txt" for folder in (Path("data"), places.cache_dir()) if folder]
        path = next(filter(Path.is_file, paths), None) or download(
            SHAKESPEARE_URL, paths[-1], SHAKESPEARE_BYTES, SHAKESPEARE_SHA256
        )
    require_sha256(path.read_bytes(), SHAKESPEARE_SHA256, str(path))
    return _of_files("shakespeare", str(path), [path])


def download(url: str, target: Path, size: int, sha256: str) -> Path:
    """Download at most `size` bytes to `target`, which is written only if they have that SHA-256."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read(size + 1)
        require_sha256(data, sha256, url)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(target, data)
    except (OSError, http.client.HTTPException, SourceError) as error:
        where = " or ".join(dict.fromkeys([str(target), f"data/{target.name}"]))
        by_hand = f"fetch it elsewhere and put it at {where}, SHA-256 {sha256}"
        raise SourceError(f"{url} cannot be fetched to {target} ({error}); {by_hand}") from error
    return target


def require_sha256(data: bytes, expected: str, origin: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SourceError(f"{origin} is not the expected file: SHA-256 {expected} expected, {found} found")
