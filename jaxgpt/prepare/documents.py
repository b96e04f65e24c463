"""One file to text, piece by piece: UTF-8, JSON Lines or Parquet, on this machine or in a store."""

import codecs
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
"""What a file that is not UTF-8 is, by its first bytes."""
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")


class SourceError(UsageError):
    """A text is unavailable or cannot be read."""


def read_text(path: Path, column: str = "text") -> tuple[str, list[str]]:
    """The text of a file and notes on what was changed; as `pieces`."""
    notes = list[str]()
    return "".join(pieces(path, column, notes)), notes


def pieces(path: Path, column: str, notes: list[str]) -> Iterator[str]:
    """The text of a file with LF line ends, piece by piece; notes on what was changed are added at its end.

    Of JSON Lines and Parquet it is the documents in `column` with a blank line between two. Any other file is UTF-8.

    Raises:
      SourceError: the file cannot be read, is damaged or not UTF-8, or a row has no string in `column`.
    """
    name = name_of(path).lower()
    if not holds_documents(path, column):
        yield from plain(_text(path), notes)
        if name.endswith(".json"):
            notes.append("read as plain text: it is not JSON Lines (one object a line)")
        return
    documents, count = (_parquet if name.endswith(".parquet") else _json_lines)(path, column), 0

    def with_blank_lines() -> Iterator[str]:
        nonlocal count
        for count, document in enumerate(documents, 1):
            yield "\n\n" * (count > 1) + document

    changed = list[str]()
    yield from plain(with_blank_lines(), changed)
    notes += [f"put a blank line between {count:,} documents of column {column!r}", *changed]


def name_of(path: Path) -> str:
    """The name of a file; of one at a URL without the query: docs.jsonl of https://host/docs.jsonl?download=1."""
    return str(path).partition("?")[0].rstrip("/").rpartition("/")[2] if "://" in str(path) else path.name


def holds_documents(path: Path, column: str) -> bool:
    """Whether a file is Parquet or JSON Lines, by its name. A `.json` file is JSON Lines if its first line is a whole
    object, and either that has the column or another line follows; else it is one value, such as a configuration.

    Raises:
      SourceError: a `.json` file cannot be read, is damaged or not UTF-8.
    """
    name = name_of(path).lower()
    unpacked = name.removesuffix(".gz")
    if not unpacked.endswith(".json"):
        return name.endswith(".parquet") or unpacked.endswith(JSON_LINES)
    text = plain(_text(path), [])
    first = next((piece for piece in text if piece.strip()), "")
    if not first.lstrip().startswith("{"):  # without reading on: an array may be one line of gigabytes
        return False
    lines = filter(str.strip, _lines(itertools.chain([first], text)))
    try:
        row = json.loads(next(lines))
    except (ValueError, RecursionError):
        return False
    return column in _columns(row) or next(lines, None) is not None


def utf8(data: Iterable[bytes], origin: str) -> Iterator[str]:
    """UTF-8 `data` as text.

    Raises:
      SourceError: it is not UTF-8, or holds a NUL byte, as UTF-16 and files of tokens do; `origin` is named.
    """
    decoder, start, read = codecs.getincrementaldecoder("utf-8")(), b"", 0
    for chunk in itertools.chain(data, [b""]):
        start, problem = start or chunk[:8], ""
        held = len(decoder.getstate()[0])  # the first bytes of a character at the end of the last chunk
        if (nul := chunk.find(b"\0")) >= 0:
            kind, width = ("UTF-32", 4) if chunk[nul : nul + 2] == b"\0\0" else ("UTF-16", 2)
            order = "LE" if (read + nul) % width else "BE"
            problem = (
                f"has a NUL byte at offset {read + nul:,}, so it is not UTF-8 text; if it is {kind}, convert it: "
                f"iconv -f {kind}{order} -t UTF-8; if it is a file of tokens such as nanoGPT's train.bin, prepare the "
                "text that they were made from; if it is text with stray NUL bytes, remove them: tr -d '\\0'"
            )
        else:
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                problem = (
                    f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {read - held + error.start} "
                    f"({error.reason}); convert it: iconv -f LATIN1 -t UTF-8"
                )
        if problem:
            known = next((what for magic, what in MAGIC.items() if start.startswith(magic)), problem)
            raise SourceError(f"{origin} {known}")
        read += len(chunk)


def plain(text: Iterable[str], notes: list[str]) -> Iterator[str]:
    """`text` with LF line ends and no byte order mark; notes on what was changed are added at its end."""
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


def _text(path: Path) -> Iterator[str]:
    return utf8(_bytes(path), str(path))


def _bytes(path: Path) -> Iterator[bytes]:
    """The bytes of a file in chunks; those of a packed JSON file are unpacked."""
    size, limit = 0, float("inf")
    try:
        with path.open("rb") as raw:
            file: Any = raw
            if name_of(path).lower().endswith((".json.gz", *(f"{name}.gz" for name in JSON_LINES))):
                file, limit = gzip.GzipFile(fileobj=raw), max(ALWAYS_ALLOWED, MAX_GROWTH * path.stat().st_size)
            while chunk := file.read(PIECE):
                size += len(chunk)
                if size > limit:
                    raise SourceError(
                        f"{path} unpacks to more than {limit:,} bytes, {MAX_GROWTH} times its size; if it is meant to, "
                        "unpack it first: gunzip"
                    )
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is not gzip, or is damaged: {error}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(plain(_text(path), [])), 1):
        if not line.strip():
            continue
        where, wanted = f"{path}, line {number}", f'expected an object such as {{"{column}": "..."}}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where} is not JSON ({getattr(error, 'msg', error)}), {wanted}") from error
        if not isinstance(row, dict):
            raise SourceError(f"{where} holds {line[:40]}, {wanted}")
        yield _string(row, where, column)


def _lines(text: Iterable[str]) -> Iterator[str]:
    """Split at LF alone, unlike splitlines(): a JSON string may hold the other line ends that Python knows."""
    held: list[str] = []
    for piece in text:
        head, *lines = piece.split("\n")
        held.append(head)
        for line in lines:
            yield "".join(held)
            held = [line]
    yield "".join(held)


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(f"{path.name}, a Parquet file,", "pyarrow", "data") from error
    rows = itertools.count(1)
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            names = [file.schema.column(i).path for i in range(len(file.schema))]
            if column not in names:
                raise _no_column(str(path), column, names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (_string(row, f"{path}, row {next(rows)}", column) for row in batch.to_pylist())
    except SourceError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # Python may lack a date that it has
        raise SourceError(f"{path} is not a Parquet file of strings, or is damaged: {error}") from error


def _columns(row: dict[str, Any]) -> Iterator[str]:
    """The columns of a row; those of an object in it have its name before a dot. Not recursive: it may be deep."""
    waiting = list(row.items())
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, dict) and value:
            waiting[:0] = [(f"{name}.{inner}", each) for inner, each in value.items()]
        else:
            yield name


def _string(row: dict[str, Any], where: str, column: str) -> str:
    """The text of a row: that of the key `column`, or for meta.text that of the key `text` in the object `meta`."""
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if value is None:
            break
        if not isinstance(value, dict) or name not in value:
            raise _no_column(where, column, _columns(row))
        value = value[name]
    if not isinstance(value, str):
        raise SourceError(f"{where}: column {column!r} holds {shown(value)}, expected a string")
    return value


def _no_column(where: str, column: str, names: Iterable[str]) -> SourceError:
    return SourceError(f"{where} has no column {column!r}; it has {', '.join(names) or 'none'}: --column NAME")
