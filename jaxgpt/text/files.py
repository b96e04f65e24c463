"""One file to text: UTF-8, JSON Lines or Parquet."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxgpt.config import MissingExtraError, UsageError, shown

MAX_GROWTH, ALWAYS_ALLOWED = 100, 2**26
"""A .gz may unpack to 64 MiB, or to a hundred times its size if that is more: text shrinks to a tenth, a bomb to a
thousandth."""


class SourceError(UsageError):
    """A text cannot be had or read."""


def read_text(path: Path, column: str = "text") -> tuple[str, tuple[str, ...]]:
    """The text of a file with LF line ends, and notes on what was changed.

    `.jsonl`, `.jsonl.gz` and `.parquet` hold one document a row, its text in `column`; a blank line is put between
    two documents. Any other file is UTF-8.

    Raises:
      SourceError: the file is out of reach, damaged, no UTF-8, or a row has no string in `column`.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        documents = list(_parquet(path, column))
    elif name.endswith((".jsonl", ".jsonl.gz")):
        documents = list(_json_lines(path, column))
    else:
        return read_utf8(path)
    text, notes = _plain("\n\n".join(documents))
    return text, (f"put a blank line between {len(documents):,} documents of column {column!r}", *notes)


def read_utf8(path: Path) -> tuple[str, tuple[str, ...]]:
    """`decode_utf8` of a file's bytes."""
    return decode_utf8(_bytes(path), str(path))


def decode_utf8(data: bytes, origin: str) -> tuple[str, tuple[str, ...]]:
    """The text of UTF-8 `data` with LF line ends and no byte order mark, and notes on what was changed.

    Raises:
      SourceError: the data is UTF-16 or UTF-32 by its mark, or is not UTF-8; `origin` is named.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise SourceError(f"{origin} begins with the mark of UTF-16 or UTF-32; convert it: iconv -t UTF-8")
    try:
        return _plain(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{origin} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "convert it: iconv -f LATIN1 -t UTF-8"
        ) from error


def _plain(text: str) -> tuple[str, tuple[str, ...]]:
    notes = []
    if text.startswith("\ufeff"):
        text = text.removeprefix("\ufeff")
        notes.append("dropped a byte order mark")
    if "\r" in text:
        count = text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        notes.append(f"turned {count:,} CR or CRLF line ends into LF")
    return text, tuple(notes)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error


def _unpacked(path: Path, data: bytes) -> bytes:
    limit, parts, size = max(ALWAYS_ALLOWED, MAX_GROWTH * len(data)), [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while size <= limit and (part := file.read(2**20)):
                parts.append(part)
                size += len(part)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is not gzip, or is damaged: {error}") from error
    if size > limit:
        raise SourceError(
            f"{path} unpacks to more than {limit:,} bytes, expected at most {MAX_GROWTH} times its {len(data):,}; "
            "if it is meant to, unpack it first: gunzip"
        )
    return b"".join(parts)


def _json_lines(path: Path, column: str) -> Iterator[str]:
    data = _bytes(path)
    if path.suffix.lower() == ".gz":
        data = _unpacked(path, data)
    # Not splitlines(): a JSON string may hold the other line ends that Python knows, such as U+2028.
    for number, line in enumerate(decode_utf8(data, str(path))[0].split("\n"), 1):
        if not line.strip():
            continue
        where, wanted = f"{path}, line {number}", f'expected an object such as {{"{column}": "..."}}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where} is not JSON ({getattr(error, 'msg', error)}), {wanted}") from error
        if not isinstance(row, dict):
            raise SourceError(f"{where} holds {line[:40]}, {wanted}")
        _require_column(where, column, row)
        yield _string(row[column], where, column)


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(f"{path.name}, a Parquet file,", "pyarrow", "parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            _require_column(str(path), column, file.schema_arrow.names)
            values = file.read(columns=[column]).column(0).to_pylist()
    except SourceError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # a date may be none that Python has
        raise SourceError(f"{path} is no Parquet file of strings, or is damaged: {error}") from error
    for number, value in enumerate(values, 1):
        yield _string(value, f"{path}, row {number}", column)


def _require_column(where: str, column: str, names: Iterable[str]) -> None:
    if column not in names:
        raise SourceError(f"{where} has no column {column!r}; it has {', '.join(names) or 'none'}: --column NAME")


def _string(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{where}: column {column!r} holds {shown(value)}, expected a string")
    return value
