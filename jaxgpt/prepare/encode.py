"""A text of any size to ids: read piece by piece, encoded on all cores, put on disk shard by shard.

What is in memory is bounded: a few parts for each core, and of the ids an eighth of a shard. A shard that is on disk
survives a kill; the next attempt reads the text again up to where it ended, to see that it is the same, and encodes
from there.
"""

import hashlib
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import filelock
import numpy as np
from numpy.typing import NDArray

from jaxgpt import bpe, tokenizer
from jaxgpt import files as disk
from jaxgpt.bpe import BPETokenizer
from jaxgpt.config import UsageError
from jaxgpt.prepare.sources import Stream
from jaxgpt.tokenizer import Progress, Tokenizer, UnknownCharacterError

PART = 2**20
"""Characters that are encoded at once, at least."""
SHARD = 2**25
"""Ids of a shard, at least. A text of less than an eighth of it is kept in memory, a longer one written as it comes."""
PROGRESS, LOCK = "progress.json", ".lock"
Spans = Callable[[str, int], Iterator[tuple[int, int]]]
T = TypeVar("T")
U = TypeVar("U")


class EncodeError(UsageError):
    """Shards cannot be written."""


class WaitedError(Exception):
    """Another process was preparing this text, and has ended: look again for what it made."""


@dataclass
class Encoded:
    """The ids of a text: all of them in shards on disk, or, of a short text, in memory."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    """{"file", "count", "sha256"} of each in its order."""
    rest: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.uint16))
    """Those that are in no shard, (N,): all or none."""
    sha256: str = ""
    """Of all ids, little-endian."""
    source_sha256: str = ""
    """Of the text as UTF-8."""
    skipped: int = 0
    """Characters outside the vocabulary that were left out."""
    notes: list[str] = field(default_factory=list)


def learn(stream: Callable[[], Iterable[str]], spec: str) -> Tokenizer:
    """The tokenizer "char" or "bpe:SIZE" of a text, given as a function that reads it."""
    if spec == "char":
        return tokenizer.CharTokenizer.learn(stream())
    return bpe.learn(cut(stream(), bpe.spans), int(spec.removeprefix("bpe:")))


@contextmanager
def encode(stream: Stream, tok: Tokenizer, unknown: str, work: Path, progress: Progress) -> Iterator[Encoded]:
    """Encode a text; one of an eighth of a shard or more goes to the folder `work`, which is made then.

    Args:
      unknown: "skip" leaves out characters outside the vocabulary, and counts them.
      work: for this text and tokenizer alone; may hold the shards of an attempt that was killed. It is touched by this
        process alone until the context ends. If it ends with an error, only whole shards of SHARD ids stay.

    Raises:
      UnknownCharacterError: a character is outside the vocabulary and `unknown` is "error".
      EncodeError: `work` cannot be written to.
      WaitedError: another process wrote to `work`; this one said so on stderr and waited for its end.
    """
    with _Shards(work) as shards:
        try:
            found = _encoded(stream, tok, unknown, shards, progress)
        except UnknownCharacterError as error:
            where = stream.where(error.position)
            raise UnknownCharacterError(error.character, error.position, error.known, where) from error
        yield found


def _encoded(stream: Stream, tok: Tokenizer, unknown: str, shards: "_Shards", progress: Progress) -> Encoded:
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 2**16 else np.uint32)
    found, source, ids_hash, parts_hash = Encoded(), hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    before = shards.left(dtype)
    read = 0

    def seen(n: int) -> None:
        nonlocal read
        read += n
        progress("encoding", min(1.0, read / max(1, stream.size)))

    def known() -> Iterator[str]:
        for piece in stream.pieces(found.notes, seen):
            source.update(piece.encode("utf-8", "surrogatepass"))
            kept = tokenizer.without_unknown(tok, piece) if unknown == "skip" else piece
            found.skipped += len(piece) - len(kept)
            yield kept

    def ids(item: tuple[int, str]) -> NDArray[Any]:
        first, part = item
        try:
            return tok.encode(part).astype(dtype.newbyteorder("<"))
        except UnknownCharacterError as error:
            raise UnknownCharacterError(error.character, first + error.position, error.known) from error

    parts = cut(known(), bpe.spans if isinstance(tok, BPETokenizer) else even)
    first = 0
    if before:
        for _ in range(before["parts"]):
            part = next(parts, "")
            parts_hash.update(part.encode("utf-8", "surrogatepass"))
            first += len(part)
        if parts_hash.hexdigest() != before["parts_sha256"]:  # another text by the same name
            shards.clear()
            return _encoded(stream, tok, unknown, shards, progress)
        for shard in shards.done:
            ids_hash.update(np.memmap(shards.work / shard["file"], np.uint8, mode="r").data)

    def numbered() -> Iterator[tuple[int, str]]:
        at = first
        for part in parts:
            yield at, part
            at += len(part)

    held: list[NDArray[Any]] = []
    n_parts = before["parts"] if before else 0
    for (_, part), new in in_order(ids, numbered()):
        parts_hash.update(part.encode("utf-8", "surrogatepass"))
        ids_hash.update(new.tobytes())
        held.append(new)
        n_parts += 1
        if shards.done or shards.count or sum(map(len, held)) >= SHARD // 8:
            while held:
                shards.add(held.pop(0))
        if shards.count >= SHARD:
            shards.end()
            shards.note(n_parts, parts_hash.hexdigest())
    shards.end()  # not noted: were the text longer after a kill, this shard would not end here
    found.shards = shards.done
    found.rest = np.concatenate(held) if held else np.zeros(0, dtype)
    found.sha256, found.source_sha256 = ids_hash.hexdigest(), source.hexdigest()
    return found


def cut(pieces: Iterable[str], spans: Spans, size: int | None = None) -> Iterator[str]:
    """A text in pieces as parts of at least `size` (PART) characters, cut where `spans` cuts the whole."""
    size = size or PART
    held, length, enough = list[str](), 0, 2 * size
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length > enough:
            rest = "".join(held)
            *whole, (last, _) = spans(rest, size)
            for begin, end in whole:
                yield rest[begin:end]
            held, length = [rest[last:]], len(rest) - last
            enough = 2 * max(size, length)  # what was searched is searched again only once there is as much of new
    rest = "".join(held)
    for begin, end in spans(rest, size):
        yield rest[begin:end]


def even(text: str, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of `text`, for a tokenizer that may be cut anywhere."""
    return ((i, min(i + size, len(text))) for i in range(0, len(text), size))


def in_order(function: Callable[[T], U], items: Iterable[T]) -> Iterator[tuple[T, U]]:
    """Each item with its result, on all cores, not more than a few ahead of what is taken."""
    n = os.cpu_count() or 1
    with ThreadPoolExecutor(n) as pool:
        waiting: deque[tuple[T, Future[U]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > n:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


class _Shards:
    """Shards in a folder that is made for the first of them, and held by this process alone while it is there."""

    def __init__(self, work: Path):
        self.work, self.done, self._lock = work, list[dict[str, Any]](), filelock.FileLock(work / LOCK, timeout=0)
        self.count, self._hash = 0, hashlib.sha256()
        """Of the shard that is being written: its ids as yet, and their SHA-256."""
        self._file: IO[bytes] | None = None
        """Where they lie until it is whole."""

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                os.unlink(self._file.name)
        if error[0] and self._lock.is_locked and not (self.work / PROGRESS).exists():  # nothing to go on with
            shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EncodeError(f"{self.work} cannot be written: {error.strerror}; name another: --data-dir") from error

    def _hold(self) -> None:
        with self._writing():
            self.work.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except filelock.Timeout as error:
                print(f"jaxgpt: another process is preparing this text in {self.work}; waiting for it", file=sys.stderr)
                with suppress(FileNotFoundError):  # the folder has its final name by now
                    self._lock.acquire(timeout=-1, poll_interval=0.2)
                raise WaitedError from error

    def left(self, dtype: np.dtype[Any]) -> dict[str, Any] | None:
        """What a killed attempt says that it left, if its shards are whole; else None. All else there is removed."""
        if not self._lock.is_locked:
            if not os.path.isdir(self.work):
                return None
            self._hold()
        try:
            said = disk.unseal((self.work / PROGRESS).read_bytes())
            for shard in said["shards"]:
                path = self.work / shard["file"]
                if path.stat().st_size != shard["count"] * dtype.itemsize or disk.sha256(path) != shard["sha256"]:
                    raise disk.SealError(f"{path} is damaged")
            self.done = said["shards"]
        except (OSError, disk.SealError, KeyError, TypeError):
            self.clear()
            return None
        self._remove_all_but(PROGRESS, *(shard["file"] for shard in self.done))
        return said

    def clear(self) -> None:
        """Remove what lies there, but for the lock, which is held."""
        self.done = []
        self._remove_all_but()

    def _remove_all_but(self, *names: str) -> None:
        for path in self.work.iterdir():
            if path.name not in (LOCK, *names):
                path.unlink()

    def add(self, ids: NDArray[Any]) -> None:
        """Write ids, one or more, to the end of the shard that is being written."""
        if not self._lock.is_locked:
            self._hold()
        with self._writing():
            if not self._file:
                self._file = (self.work / f".tokens-{len(self.done):05}.bin.part").open("wb")
            data = ids.tobytes()
            self._file.write(data)
        self._hash.update(data)
        self.count += len(ids)

    def end(self) -> None:
        """Give the shard that was written, if there is one, its name: also after a kill or a loss of power it is there
        whole, or not at all."""
        if not self._file:
            return
        name = f"tokens-{len(self.done):05}.bin"
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            Path(self._file.name).replace(self.work / name)
            disk.sync(self.work)
        self.done.append({"file": name, "count": self.count, "sha256": self._hash.hexdigest()})
        self.count, self._file, self._hash = 0, None, hashlib.sha256()

    def note(self, n_parts: int, parts_sha256: str) -> None:
        """Say what the next attempt finds if this one is killed: the shards that have a name, and the text of them."""
        said = {"shards": self.done, "parts": n_parts, "parts_sha256": parts_sha256}
        with self._writing():
            disk.write_atomically(self.work / PROGRESS, disk.seal(said).encode())
