"""One file to text, piece by piece: UTF-8, JSON Lines or Parquet, on this machine or in a store."""

import codecs
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxgpt.config import MissingExtraError, UsageError, shown

PIECE = 2**20
"""Bytes that are read at once."""
MAX_GROWTH, ALWAYS_ALLOWED = 100, 2**26
"""A .gz may unpack to 64 MiB, or to a hundred times its size if that is more: text shrinks to a tenth, a bomb to a
thousandth."""
MAGIC = {
    b"\xff\xfe\0\0": "begins with the mark of UTF-32; convert it: iconv -f UTF-32 -t UTF-8",
    b"\0\0\xfe\xff": "begins with the mark of UTF-32; convert it: iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "begins with the mark of UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "begins with the mark of UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "is compressed with gzip, expected UTF-8 text; unpack it first: gunzip",
    b"BZh": "is compressed with bzip2, expected UTF-8 text; unpack it first: bunzip2",
    b"\xfd7zXZ\0": "is compressed with xz, expected UTF-8 text; unpack it first: unxz",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard, expected UTF-8 text; unpack it first: unzstd",
    b"PK\x03\x04": "is a ZIP archive (as .docx, .npz and .pt are), expected UTF-8 text; extract the text first",
    b"PAR1": "is a Parquet file, expected UTF-8 text; give it a name that ends in .parquet",
    b"%PDF-": "is a PDF document, expected UTF-8 text; extract the text first: pdftotext",
    b"\x93NUMPY": "is a NumPy array, expected UTF-8 text; if it holds tokens, prepare the text they were made from",
    b"\x89PNG": "is a PNG image, expected UTF-8 text",
    b"\xff\xd8\xff": "is a JPEG image, expected UTF-8 text",
    b"GIF8": "is a GIF image, expected UTF-8 text",
}
"""What is said of a file that is not UTF-8, by its first bytes."""
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
Seen = Callable[[int], None]
"""Is told how many bytes were read since it was told last."""


class SourceError(UsageError):
    """A text cannot be had or read."""


def unseen(n: int) -> None:
    """A `Seen` that shows nothing."""


def read_text(path: Path, column: str = "text") -> tuple[str, tuple[str, ...]]:
    """The text of a file, and notes on what was changed; as `pieces`."""
    notes: list[str] = []
    return "".join(pieces(path, column, notes)), tuple(notes)


def pieces(path: Path, column: str, notes: list[str], seen: Seen = unseen) -> Iterator[str]:
    """The text of a file with LF line ends, piece by piece; `notes` on what was changed are added at its end.

    Files that `holds_documents` have the text of each in `column`; a blank line is put between two. Any other file is
    UTF-8.

    Raises:
      SourceError: the file is out of reach, damaged, no UTF-8, or a row has no string in `column`.
    """
    name = name_of(path).lower()
    if not holds_documents(path, column):
        yield from plain(utf8(_bytes(path, seen), str(path)), notes)
        if name.endswith(".json"):
            notes.append("read as plain text: it is not JSON Lines (one object a line)")
        return
    documents = (_parquet if name.endswith(".parquet") else _json_lines)(path, column, seen)
    count, changes = 0, list[str]()

    def joined() -> Iterator[str]:
        nonlocal count
        for document in documents:
            if count:
                yield "\n\n"
            count += 1
            yield document

    yield from plain(joined(), changes)
    notes += [f"put a blank line between {count:,} documents of column {column!r}", *changes]


def name_of(path: Path) -> str:
    """The name of a file; of one at a URL without the query: docs.jsonl of https://host/docs.jsonl?download=1."""
    return str(path).partition("?")[0].rstrip("/").rpartition("/")[2] if "://" in str(path) else path.name


def holds_documents(path: Path, column: str) -> bool:
    """Whether a file is Parquet or JSON Lines, by its name. A `.json` file is JSON Lines if its first line is a whole
    object, and either that has the column or another line follows; else it is one value, such as a configuration.

    Raises:
      SourceError: a `.json` file is out of reach, damaged or not UTF-8.
    """
    name = name_of(path).lower()
    if name.endswith(".parquet") or (unpacked := name.removesuffix(".gz")).endswith(JSON_LINES):
        return True
    if not unpacked.endswith(".json"):
        return False
    text = plain(utf8(_json_bytes(path, unseen), str(path)), [])
    first = next((piece for piece in text if piece.strip()), "")
    if not first.lstrip().startswith("{"):  # without reading on: an array may be one line of gigabytes
        return False
    lines = filter(str.strip, _lines(itertools.chain([first], text)))
    try:
        row = json.loads(next(lines))
    except (ValueError, RecursionError):
        return False
    return column in _names(row) or next(lines, None) is not None


def utf8(data: Iterable[bytes], origin: str) -> Iterator[str]:
    """UTF-8 `data` as text.

    Raises:
      SourceError: it is not UTF-8, or holds a NUL byte, as UTF-16 and files of tokens do; `origin` is named.
    """
    decoder, start, read = codecs.getincrementaldecoder("utf-8")(), b"", 0
    for chunk in data:
        start = start or chunk[:8]
        if (nul := chunk.find(b"\0")) >= 0:
            raise SourceError(f"{origin} {_known(start) or _nul(chunk, nul, read)}")
        yield _decoded(decoder, chunk, start, read, origin)
        read += len(chunk)
    yield _decoded(decoder, b"", start, read, origin, final=True)


def _known(start: bytes) -> str | None:
    """What a file that begins with these bytes is, and what to do with it; None if that is not known."""
    return next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)


def _nul(chunk: bytes, at: int, read: int) -> str:
    """Why a chunk with a NUL byte is refused; `read` bytes came before it."""
    kind, width = ("UTF-32", 4) if chunk[at : at + 2] == b"\0\0" else ("UTF-16", 2)
    kind += "LE" if (read + at) % width else "BE"
    return (
        f"has a NUL byte at offset {read + at:,}, so it is not UTF-8 text; if it is {kind[:6]}, convert it: "
        f"iconv -f {kind} -t UTF-8; if it is a file of tokens such as nanoGPT's train.bin, prepare the text that they "
        "were made from; if it is text with stray NUL bytes, remove them: tr -d '\\0'"
    )


def _decoded(
    decoder: codecs.IncrementalDecoder, chunk: bytes, start: bytes, read: int, origin: str, final: bool = False
) -> str:
    held = len(decoder.getstate()[0])  # the first bytes of a character that the last chunk ended in
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        known = _known(start) or (
            f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {read - held + error.start} "
            f"({error.reason}); convert it: iconv -f LATIN1 -t UTF-8"
        )
        raise SourceError(f"{origin} {known}") from error


def plain(text: Iterable[str], notes: list[str]) -> Iterator[str]:
    """`text` with LF line ends and no byte order mark; `notes` on what was changed are added at its end."""
    decoder, first, marked, returns = io.IncrementalNewlineDecoder(None, translate=True), True, False, 0
    for piece in text:
        if first and piece:
            first, marked = False, piece.startswith("\ufeff")
            piece = piece.removeprefix("\ufeff")
        returns += piece.count("\r")
        yield decoder.decode(piece)
    yield decoder.decode("", final=True)
    if marked:
        notes.append("dropped a byte order mark")
    if returns:
        notes.append(f"turned {returns:,} CR or CRLF line ends into LF")


def _bytes(path: Path, seen: Seen) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from chunks(file, seen)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def chunks(file: IO[bytes], seen: Seen) -> Iterator[bytes]:
    """What is left of an open file."""
    while chunk := file.read(PIECE):
        seen(len(chunk))
        yield chunk


def _unpacked(path: Path, seen: Seen) -> Iterator[bytes]:
    unpacked, size = 0, 0
    try:
        size = path.stat().st_size
        limit = max(ALWAYS_ALLOWED, MAX_GROWTH * size)
        with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
            before = 0
            while chunk := file.read(PIECE):
                unpacked += len(chunk)
                if unpacked > limit:
                    raise SourceError(
                        f"{path} unpacks to more than {limit:,} bytes, expected at most {MAX_GROWTH} times its "
                        f"{size:,}; if it is meant to, unpack it first: gunzip"
                    )
                seen(packed.tell() - before)
                before = packed.tell()
                yield chunk
    except gzip.BadGzipFile as error:
        raise SourceError(f"{path} is not gzip, or is damaged: {error}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise SourceError(f"{path} is not gzip, or is damaged: {error}") from error


def _json_bytes(path: Path, seen: Seen) -> Iterator[bytes]:
    return (_unpacked if name_of(path).lower().endswith(".gz") else _bytes)(path, seen)


def _json_lines(path: Path, column: str, seen: Seen) -> Iterator[str]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):  # of other keys the last counts, as everywhere in Python
            names = [name for name, _ in pairs if name in (column, *column.split("."))]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"the key {twice!r} appears twice in one object")
        return row

    for number, line in enumerate(_lines(plain(utf8(_json_bytes(path, seen), str(path)), [])), 1):
        if not line.strip():
            continue
        where, wanted = f"{path}, line {number}", f'expected an object such as {{"{column}": "..."}}'
        try:
            row = json.loads(line, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where} is not JSON ({getattr(error, 'msg', error)}), {wanted}") from error
        if not isinstance(row, dict):
            raise SourceError(f"{where} holds {line[:40]}, {wanted}")
        yield _string(row, where, column)


def _lines(text: Iterable[str]) -> Iterator[str]:
    """Split at LF alone, unlike splitlines(): a JSON string may hold the other line ends that Python knows."""
    open_line: list[str] = []
    for piece in text:
        head, *lines = piece.split("\n")
        open_line.append(head)
        for line in lines:
            yield "".join(open_line)
            open_line = [line]
    yield "".join(open_line)


def _parquet(path: Path, column: str, seen: Seen) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(f"{path.name}, a Parquet file,", "pyarrow", "parquet") from error
    number = 0
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            names = [file.schema.column(i).path for i in range(len(file.schema))]
            if names.count(column) > 1:
                raise SourceError(
                    f"{path} has {names.count(column)} columns {column!r}, expected one: rename the others"
                )
            if column not in names:
                raise _no_column(str(path), column, names)
            size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for row in batch.to_pylist():
                    number += 1
                    yield _string(row, f"{path}, row {number}", column)
                seen(size * batch.num_rows // rows)
    except SourceError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # a date may be none that Python has
        raise SourceError(f"{path} is no Parquet file of strings, or is damaged: {error}") from error


def _names(row: dict[str, Any]) -> Iterator[str]:
    """The columns of a row; those of an object in it have its name before a dot."""
    waiting = list(row.items())
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, dict) and value:
            waiting[:0] = [(f"{name}.{inner}", each) for inner, each in value.items()]
        else:
            yield name


def _no_column(where: str, column: str, names: Iterable[str]) -> SourceError:
    return SourceError(f"{where} has no column {column!r}; it has {', '.join(names) or 'none'}: --column NAME")


def _string(row: dict[str, Any], where: str, column: str) -> str:
    """The text of a row: that at `column`, or at meta.text that of the object `meta`."""
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if value is None:
            break
        if not isinstance(value, dict) or name not in value:
            raise _no_column(where, column, _names(row))
        value = value[name]
    if not isinstance(value, str):
        raise SourceError(f"{where}: column {column!r} holds {shown(value)}, expected a string")
    return value
