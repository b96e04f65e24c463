"""A text of any size to shards of ids on files, encoded on all cores.

Memory is bounded: a few parts of the text for each core. A shard that is on disk survives a kill: the next attempt
reads the text again up to the end of the last shard, to see that it is the same, and encodes from there.
"""

import hashlib
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np
from numpy.typing import NDArray

from jaxgpt import files
from jaxgpt.corpus import FORMAT, CorpusError
from jaxgpt.prepare.sources import Text
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError, drop_unknown

PART = 2**18
"""Characters that are encoded at once, about: tiktoken's regular expression overflows its stack on more than a million
white space characters that other text follows."""
LONGEST_WORD = 2**22
"""Text without white space, such as base64 or a genome, is cut after so many characters, to bound memory."""
# Before a white space character and another kind. Python's \s has four separators that the pattern's \s has not.
_WORD_START = re.compile(r"(?=[^\S\x1c-\x1f][\S\x1c-\x1f])")
_LAST_WORD_START = re.compile(rf".*{_WORD_START.pattern}", re.DOTALL)
SHARD = 2**25
"""Ids of a shard, at least."""
PROGRESS, LOCK = "progress.json", ".lock"


class WaitedError(Exception):
    """Another process was preparing this text and has ended: look for the corpus that it made."""


class WorkFolder:
    """The folder of a corpus in the making, which one process holds at a time.

    If an error ends the context, only complete shards of SHARD ids stay, for the next attempt.

    Raises:
      CorpusError: it cannot be written to.
      WaitedError: another process held it. This one waited for its end, and printed so on stderr.
    """

    def __init__(self, path: Path):
        self.path, self.shards = path, list[dict[str, Any]]()
        """{"file", "count", "sha256"} of each complete shard."""
        self.count, self._sha256 = 0, hashlib.sha256()
        """Of the ids of the shard that is being written."""
        self._file: IO[bytes] | None = None
        self._lock = filelock.FileLock(path / LOCK, timeout=0)

    def __enter__(self) -> "WorkFolder":
        with self._write_errors():
            self._made = [folder for folder in self.path.parents if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except filelock.Timeout as error:
                print(f"jaxgpt: another process is preparing this text in {self.path}; waiting for it", file=sys.stderr)
                with suppress(FileNotFoundError):  # the folder has its final name by now
                    self._lock.acquire(timeout=-1, poll_interval=0.2)
                self.__exit__(WaitedError)
                raise WaitedError from error
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            if self._file:
                self._file.close()
                os.unlink(self._file.name)
        if error[0] and self._lock.is_locked and not (self.path / PROGRESS).exists():
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):
                for folder in self._made:
                    folder.rmdir()
        self._lock.release()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"{self.path.parent} cannot be written: {error.strerror}"
            raise CorpusError(f"{problem}; name another folder: --data-dir") from error

    def resume(self, dtype: np.dtype[Any]) -> dict[str, Any] | None:
        """The progress of an attempt that was killed, if its shards are whole. All else in the folder is removed."""
        progress: dict[str, Any] | None = None
        try:
            progress = files.unseal((self.path / PROGRESS).read_bytes())
            self.shards = progress["shards"]
            for shard in self.shards:
                path = self.path / shard["file"]
                if path.stat().st_size != shard["count"] * dtype.itemsize or files.sha256(path) != shard["sha256"]:
                    raise files.SealError(f"{path} is damaged")
        except (OSError, files.SealError, KeyError, TypeError):
            progress, self.shards = None, []
        keep = {LOCK, *(shard["file"] for shard in self.shards), *([PROGRESS] if progress else [])}
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()
        return progress

    def add(self, ids: NDArray[Any]) -> None:
        """Write ids to the end of the shard that is being written."""
        with self._write_errors():
            if not self._file:
                self._file = (self.path / f".tokens-{len(self.shards):05}.bin.part").open("wb")
            data = ids.tobytes()
            self._file.write(data)
        self._sha256.update(data)
        self.count += len(ids)

    def end_shard(self, **progress: Any) -> None:
        """Give the shard that is being written its name: it is on disk whole, or not at all.

        With `progress` (parts, parts_sha256: of the text up to here), the next attempt continues after it.
        """
        if not self._file:
            return
        name = f"tokens-{len(self.shards):05}.bin"
        self.shards.append({"file": name, "count": self.count, "sha256": self._sha256.hexdigest()})
        with self._write_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            Path(self._file.name).replace(self.path / name)
            files.sync(self.path)
            if progress:
                files.write_atomically(self.path / PROGRESS, files.seal({"shards": self.shards} | progress).encode())
        self.count, self._file, self._sha256 = 0, None, hashlib.sha256()

    def finish(self, meta: dict[str, Any], folder: Path) -> None:
        """Add tokens.json and rename the work folder to `folder`; a damaged one there is replaced."""
        aside = self.path.with_suffix(".old")
        with self._write_errors():
            files.write_atomically(self.path / "tokens.json", files.seal(meta).encode())
            (self.path / PROGRESS).unlink(missing_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            if folder.exists():  # damaged, or made by another process since
                folder.rename(aside)
            self.path.rename(folder)
            (folder / LOCK).unlink()  # after the rename, so that no other process takes it before
            files.sync(folder.parent)
            shutil.rmtree(aside, ignore_errors=True)


def encode(
    text: Text, tok: Tokenizer, unknown: str, work: WorkFolder, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Encode a text into the shards of `work`; the contents of its tokens.json.

    Args:
      unknown: "skip" leaves out characters outside the vocabulary, and counts them.
      work: held, of this text and tokenizer alone; may have shards of an attempt that was killed.

    Raises:
      UnknownCharacterError: a character is outside the vocabulary and `unknown` is "error".
      CorpusError: `work` cannot be written to.
    """
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 2**16 else np.uint32)
    source_sha256, ids_sha256, parts_sha256 = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    notes, skipped, position, n_parts = list[str](), 0, 0, 0

    def known_characters() -> Iterator[str]:
        nonlocal skipped
        for piece in text.pieces(notes, partial(progress, "encoding")):
            source_sha256.update(piece.encode("utf-8", "surrogatepass"))
            kept = drop_unknown(tok, piece) if unknown == "skip" else piece
            skipped += len(piece) - len(kept)
            yield kept

    def pass_part(part: str) -> None:
        nonlocal position, n_parts
        parts_sha256.update(part.encode("utf-8", "surrogatepass"))
        position, n_parts = position + len(part), n_parts + 1

    parts = split_words(known_characters(), PART)
    if before := work.resume(dtype):
        for part in islice(parts, before["parts"]):
            pass_part(part)
        if parts_sha256.hexdigest() != before["parts_sha256"]:  # the text has changed
            (work.path / PROGRESS).unlink()
            return encode(text, tok, unknown, work, progress)
        for shard in work.shards:
            ids_sha256.update(np.memmap(work.path / shard["file"], np.uint8, mode="r").data)
    try:
        for part, ids in in_order(lambda part: tok.encode(part).astype(dtype.newbyteorder("<")), parts):
            pass_part(part)
            ids_sha256.update(ids.tobytes())
            work.add(ids)
            if work.count >= SHARD:
                work.end_shard(parts=n_parts, parts_sha256=parts_sha256.hexdigest())
    except UnknownCharacterError as error:
        at = position + error.position
        raise UnknownCharacterError(error.character, at, error.known, text.where(at)) from error
    work.end_shard()  # without progress: the shard would not end here if the text grew before the next attempt
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "count": sum(shard["count"] for shard in work.shards),
        "sha256": ids_sha256.hexdigest(),
        "shards": work.shards,
        "source": text.name,
        "origin": text.origin,
        "source_sha256": source_sha256.hexdigest(),
        "notes": notes,
        "skipped_characters": skipped,
        "tokenizer": tok.to_json(),
    }


def in_order(function: Callable[[str], NDArray[Any]], parts: Iterable[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each part with its result, computed on all cores, only a few parts ahead of the consumer."""
    n = os.cpu_count() or 1
    with ThreadPoolExecutor(n) as pool:
        waiting: deque[tuple[str, Future[NDArray[Any]]]] = deque()
        for part in parts:
            waiting.append((part, pool.submit(function, part)))
            if len(waiting) > n:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def split_words(pieces: Iterable[str], size: int) -> Iterator[str]:
    """A text in pieces, cut anew into parts of about `size` characters whose BPE ids together are those of the whole.

    A part ends where a word starts with white space. No word continues with white space after another character, and of
    several white space characters the split pattern leaves the last to the word that follows. The cut does not change
    the word before it either: the pattern looks ahead only past white space, and takes white space at the end whole.

    A word longer than LONGEST_WORD is cut at multiples of it.
    """
    held = ""
    for block in regroup(pieces, size):
        begin = max(0, len(held) - 1)  # a word start is seen by two characters
        held += block
        first = _WORD_START.search(held, begin)
        end = first.start() if first else len(held)
        bounds = [0, *range(LONGEST_WORD, end, LONGEST_WORD)]
        if first and (last := _LAST_WORD_START.match(held, end)):
            bounds += [end, last.end()]
        yield from (held[i:j] for i, j in pairwise(bounds) if i < j)
        held = held[bounds[-1] :]
    if held:
        yield held


def regroup(pieces: Iterable[str], size: int) -> Iterator[str]:
    """A text in pieces, as blocks of exactly `size` characters, but for the last."""
    held, length = list[str](), 0
    for piece in pieces:
        begin = 0
        while length + len(piece) - begin >= size:
            end = begin + size - length
            yield "".join([*held, piece[begin:end]])
            held, length, begin = [], 0, end
        held.append(piece[begin:])
        length += len(held[-1])
    if length:
        yield "".join(held)
