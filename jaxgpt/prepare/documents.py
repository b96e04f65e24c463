"""Read a file as text, piece by piece: UTF-8, JSON Lines or Parquet, also gzipped, local or at a URL."""

import codecs
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxgpt.config import MissingExtraError, UsageError, shown

PIECE = 2**20
"""Bytes read at once."""
MAX_RATIO, ALWAYS_ALLOWED = 100, 2**26
"""A .gz may unpack to 100 times its size, or to 64 MiB if that is more. Text shrinks to a tenth, a bomb to a
thousandth."""
BINARY = {
    b"\xff\xfe\0\0": "is UTF-32: iconv -f UTF-32 -t UTF-8",
    b"\0\0\xfe\xff": "is UTF-32: iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "is UTF-16: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "is compressed with gzip: give it a name that ends in .gz, or unpack it: gunzip, or tar -xzf",
    b"BZh": "is compressed with bzip2: bunzip2",
    b"\xfd7zXZ\0": "is compressed with xz: unxz",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard: unzstd",
    b"ustar": "is a tar archive: extract its files (tar -xf) and give their folder",
    b"PK\x03\x04": "is a ZIP archive (as .docx, .npz and .pt are): extract its text",
    b"PAR1": "is a Parquet file: give it a name that ends in .parquet",
    b"ARROW1": "is an Arrow file: Dataset.to_parquet of Hugging Face's datasets writes Parquet",
    b"\xff\xff\xff\xff": "is an Arrow stream, as of save_to_disk: Dataset.to_parquet writes Parquet",
    b"%PDF-": "is a PDF document: pdftotext",
    b"\x89PNG": "is a PNG image",
    b"\xff\xd8\xff": "is a JPEG image",
    b"GIF8": "is a GIF image",
    b"\x93NUMPY": "is a NumPy array: if it holds tokens, prepare the text that they were made from",
}
"""Bytes at the beginning of a file that is not UTF-8 ("ustar": at TAR), its format and how to convert it."""
TAR = 257
"""Offset of the "ustar" of a tar archive."""
POINTER = b"version https://git-lfs.github.com/spec/"
WEB = ("http://", "https://")
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")


class SourceError(UsageError):
    """A text is unavailable or cannot be read."""


def pieces(path: Path, column: str) -> Iterator[str]:
    """The text of a file, piece by piece.

    JSON Lines and Parquet give the documents in `column`, joined by blank lines. Any other file is UTF-8.

    Raises:
      SourceError: the file cannot be read, is damaged or not UTF-8, or a row has no string in `column`.
    """
    if not holds_documents(path, column):
        return _text(path)
    read = _parquet if name_of(path).lower().endswith(".parquet") else _json_lines
    return ("\n\n" * (i > 0) + document for i, document in enumerate(read(path, column)))


def name_of(path: Path) -> str:
    """The name of a file, at a URL without query and fragment: docs.jsonl for https://host/docs.jsonl?download=1#x."""
    return re.split("[?#]", str(path))[0].rstrip("/").rpartition("/")[2] if "://" in str(path) else path.name


@contextmanager
def stream(path: Path, decoded: bool = True) -> Iterator[Any]:
    """A file to be read from beginning to end: on the web with one request, as not every server supports ranges.

    Args:
      decoded: undo a Content-Encoding.
    """
    options: Any = {"block_size": 0, "auto_decompress": decoded} if str(path).startswith(WEB) else {}
    with path.open("rb", **options) as file:
        if isinstance(file, io.BufferedReader) and file.peek(len(POINTER)).startswith(POINTER):
            raise SourceError(f"{path} is a pointer of Git LFS, expected the file that it stands for: git lfs pull")
        yield file


def temporary_copy(path: Path) -> Any:
    """A copy of a file or pipe in $TMPDIR, which lives until it is closed."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        with stream(path) as file:
            shutil.copyfileobj(file, copy, PIECE)
        copy.flush()
    except BaseException:
        with suppress(OSError):  # on a full disk the flush of close fails again
            copy.close()
        raise
    return copy


def normalized(text: Iterable[str], changes: Counter[str] | None = None) -> Iterator[str]:
    """`text` with LF line ends and no byte order mark. `changes` counts each kind of change by its description."""
    changes = Counter() if changes is None else changes
    decoder, first = io.IncrementalNewlineDecoder(None, translate=True), True
    for piece in text:
        if first and piece:
            first = False
            changes["byte order marks dropped: {:,}"] += piece.startswith("\ufeff")
            piece = piece.removeprefix("\ufeff")
        changes["turned {:,} CR or CRLF line ends into LF"] += piece.count("\r")
        yield decoder.decode(piece)
    yield decoder.decode("", final=True)


def utf8(data: Iterable[bytes], origin: str) -> Iterator[str]:
    """Decode UTF-8.

    Raises:
      SourceError: `origin` is not UTF-8, or has a NUL byte, as UTF-16 and files of tokens do; or it is a web page.
    """
    decoder, start, read = codecs.getincrementaldecoder("utf-8")(), b"", 0
    chunks = iter(data)
    while len(start) < TAR + 5 and (chunk := next(chunks, b"")):
        start += chunk
    if origin.startswith(WEB) and start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise SourceError(f"{origin} is a page of HTML, as of a folder, expected a file of UTF-8, .jsonl or .parquet")
    for chunk in itertools.chain([start], chunks, [b""]):
        try:
            if (nul := chunk.find(b"\0")) >= 0:
                raise UnicodeDecodeError("utf-8", chunk, nul, nul + 1, "a NUL byte")
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            for magic, what in BINARY.items():
                if magic in (start[: len(magic)], start[TAR : TAR + 5]):
                    raise SourceError(f"{origin} {what}; expected UTF-8") from error
            at = read + len(chunk) - len(error.object) + error.start  # a character may begin in the last chunk
            raise SourceError(
                f"{origin} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {at:,} "
                f"({error.reason}); if it is text, convert it from its encoding (iconv -f ENCODING -t UTF-8), or drop "
                "such bytes (iconv -c -f UTF-8 -t UTF-8 | tr -d '\\0')"
            ) from error
        yield text
        read += len(chunk)


def holds_documents(path: Path, column: str) -> bool:
    """Whether a file is Parquet or JSON Lines, by its name. A `.json` file is JSON Lines if its first line is a whole
    object that has the column or that another line follows; else it is one value, such as a configuration."""
    name = name_of(path).lower()
    if not name.removesuffix(".gz").endswith(".json"):
        return name.endswith(".parquet") or name.removesuffix(".gz").endswith(JSON_LINES)
    text = normalized(_text(path))
    first = next((piece for piece in text if piece.strip()), "")
    if not first.lstrip().startswith("{"):  # an array may be one line of gigabytes: it is not read whole
        return False
    lines = filter(str.strip, _lines(itertools.chain([first], text)))
    try:
        row = json.loads(next(lines))
    except (ValueError, RecursionError):
        return False
    return not row.keys().isdisjoint((column, column.split(".")[0])) or next(lines, None) is not None


def _text(path: Path) -> Iterator[str]:
    return utf8(_bytes(path), str(path))


def _bytes(path: Path) -> Iterator[bytes]:
    """The bytes of a file in chunks, unpacked if its name ends in .gz."""
    size, packed_size, packed = 0, float("inf"), name_of(path).lower().endswith(".gz")
    try:
        with stream(path, decoded=not packed) as raw:  # some servers call a stored .gz an encoding
            file: Any = raw
            if packed:
                file, packed_size = gzip.GzipFile(fileobj=raw), path.stat().st_size
            while chunk := file.read(PIECE):
                size += len(chunk)
                limit = max(ALWAYS_ALLOWED, MAX_RATIO * max(packed_size, raw.tell()))  # a server may not give the size
                if size > limit:
                    raise SourceError(f"{path} unpacks to more than {limit:,} bytes; if it is meant to: gunzip")
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is not gzip, or is damaged: {error}") from error
    except OSError as error:
        why = error.strerror or str(error) or repr(error.__cause__ or error)
        raise SourceError(f"{path} cannot be read: {why}") from error


def _json_lines(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(normalized(_text(path))), 1):
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
    """Split only at LF. splitlines() also splits at characters that a JSON string may hold, such as U+2028."""
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
    opened = temporary_copy if str(path).startswith(WEB) else stream  # it is not read from beginning to end
    try:
        with opened(path) as raw, parquet.ParquetFile(raw) as file:
            table = file.schema_arrow.empty_table()
            while any(pyarrow.types.is_struct(each.type) for each in table.schema):
                table = table.flatten()  # a field of an object is OBJECT.FIELD; lists and maps are not entered
            names = table.column_names
            if column not in names:
                raise _no_column(str(path), column, names)
            if names.count(column) > 1:
                raise SourceError(f"{path} has {names.count(column)} columns named {column!r}, expected one")
            batches = file.iter_batches(batch_size=1024, columns=[column])
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from (_string(row, f"{path}, row {number}", column) for number, row in enumerate(rows, 1))
    except SourceError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also dates out of Python's range
        if isinstance(error, OSError) and (error.errno or type(error) is not OSError):  # not of pyarrow
            raise
        raise SourceError(f"{path} is not a Parquet file of strings, or is damaged: {error}") from error


def _string(row: dict[str, Any], where: str, column: str) -> str:
    """The string in `column` of a row. meta.text is the column of that name, else the field `text` of `meta`."""
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if value is None:  # each field of null is null
            break
        if not isinstance(value, dict) or name not in value:
            raise _no_column(where, column, row)
        value = value[name]
    if not isinstance(value, str):
        raise SourceError(f"{where}: column {column!r} holds {shown(value)}, expected a string")
    return value


def _no_column(where: str, column: str, names: Iterable[str]) -> SourceError:
    names = list(names)
    found = ", ".join(names[:20]) + f" and {len(names) - 20:,} more" * (len(names) > 20)
    return SourceError(f"{where} has no column {column!r}; it has {found or 'none'}: --column NAME")
