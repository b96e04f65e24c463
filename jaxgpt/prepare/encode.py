"""A text of any size to shards of ids on disk, encoded on all cores.

Memory is bounded: a few parts of the text for each core. A shard that is on disk survives a kill: the next attempt
reads the text again up to the end of the last shard, to see that it is the same, and encodes from there.
"""

import hashlib
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np
from numpy.typing import NDArray

from jaxgpt import files
from jaxgpt.corpus import FORMAT, CorpusError
from jaxgpt.prepare.sources import Text
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError, split_words, without_unknown

PART = 2**20
"""Characters that are encoded at once, about."""
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

    def left_over(self, dtype: np.dtype[Any]) -> dict[str, Any] | None:
        """The progress of an attempt that was killed, if its shards are whole. All else in the folder is removed."""
        try:
            progress = files.unseal((self.path / PROGRESS).read_bytes())
            for shard in progress["shards"]:
                path = self.path / shard["file"]
                if path.stat().st_size != shard["count"] * dtype.itemsize or files.sha256(path) != shard["sha256"]:
                    raise files.SealError(f"{path} is damaged")
        except (OSError, files.SealError, KeyError, TypeError):
            self.clear()
            return None
        self.clear(progress["shards"])
        return progress

    def clear(self, shards: list[dict[str, Any]] | None = None) -> None:
        """Remove all but the lock, and the progress up to these shards."""
        self.shards = shards or []
        keep = {LOCK, *(shard["file"] for shard in self.shards), *([PROGRESS] if shards else [])}
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()

    def add(self, ids: NDArray[Any]) -> None:
        """Write ids to the end of the shard that is being written."""
        with self._write_errors():
            if not self._file:
                self._file = (self.path / f".tokens-{len(self.shards):05}.bin.part").open("wb")
            data = ids.tobytes()
            self._file.write(data)
        self._sha256.update(data)
        self.count += len(ids)

    def end_shard(self) -> None:
        """Give the shard its name, if one is being written: it is on disk whole, or not at all."""
        if not self._file:
            return
        name = f"tokens-{len(self.shards):05}.bin"
        with self._write_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            Path(self._file.name).replace(self.path / name)
            files.sync(self.path)
        self.shards.append({"file": name, "count": self.count, "sha256": self._sha256.hexdigest()})
        self.count, self._file, self._sha256 = 0, None, hashlib.sha256()

    def save_progress(self, n_parts: int, parts_sha256: str) -> None:
        """Let the next attempt continue after the complete shards, which hold so many parts of the text."""
        progress = {"shards": self.shards, "parts": n_parts, "parts_sha256": parts_sha256}
        with self._write_errors():
            files.write_atomically(self.path / PROGRESS, files.seal(progress).encode())

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
            kept = without_unknown(tok, piece) if unknown == "skip" else piece
            skipped += len(piece) - len(kept)
            yield kept

    def pass_part(part: str) -> None:
        nonlocal position, n_parts
        parts_sha256.update(part.encode("utf-8", "surrogatepass"))
        position, n_parts = position + len(part), n_parts + 1

    parts = split_words(known_characters(), PART)
    if before := work.left_over(dtype):
        for part in islice(parts, before["parts"]):
            pass_part(part)
        if parts_sha256.hexdigest() != before["parts_sha256"]:  # the text has changed
            work.clear()
            return encode(text, tok, unknown, work, progress)
        for shard in work.shards:
            ids_sha256.update(np.memmap(work.path / shard["file"], np.uint8, mode="r").data)
    try:
        for part, ids in in_order(lambda part: tok.encode(part).astype(dtype.newbyteorder("<")), parts):
            pass_part(part)
            ids_sha256.update(ids.tobytes())
            work.add(ids)
            if work.count >= SHARD:
                work.end_shard()
                work.save_progress(n_parts, parts_sha256.hexdigest())
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
