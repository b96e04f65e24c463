"""A text of any size to shards of ids, encoded on all cores; a few parts of the text for each are in memory."""

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxgpt import files
from jaxgpt.corpus import FORMAT
from jaxgpt.prepare.sources import Text
from jaxgpt.tokenizer import Ids, Tokenizer, UnknownCharacterError, drop_unknown

PART = 2**18
"""Characters that are encoded at once, about: tiktoken's regular expression overflows its stack on more than a million
white space characters that other text follows."""
LONGEST_WORD = 2**22
"""Text without white space, such as base64 or a genome, is cut after so many characters, to bound memory."""
# Before a white space character and another kind, but not a surrogate, which may be left out. Python's \s has four
# separators that the pattern's \s has not.
_WORD_START = re.compile(r"(?=[^\S\x1c-\x1f](?:[^\s\ud800-\udfff]|[\x1c-\x1f]))")
_LAST_WORD_START = re.compile(rf".*{_WORD_START.pattern}", re.DOTALL)
SHARD = 2**25
"""Ids of a shard, at least."""
LOCK, PROGRESS = ".lock", "progress.json"
"""Beside the shards until they are complete."""
T = TypeVar("T")


class InterruptionError(Exception):
    """What an interrupted preparation left cannot be continued: it or the text has changed."""


def encode(
    text: Text, tok: Tokenizer, unknown: str, folder: Path, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Encode a text into shards in a folder; the contents of its tokens.json.

    At the end of each shard, PROGRESS records how far the text is encoded. A call that finds it there continues, with
    the same result as one without an interruption. It reads the text again up to there, to check that it has not
    changed; of a text with a version, only from the beginning of a file.

    Args:
      unknown: "skip" leaves out characters outside the vocabulary, and counts them.

    Raises:
      UnknownCharacterError: a character is outside the vocabulary and `unknown` is "error".
      InterruptionError: the folder cannot be continued.
      OSError: `folder` cannot be written to.
    """
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 2**16 else np.uint32)
    done = _left_in(folder)
    shards, start, position, skipped = done["shards"], done["position"], done["position"], done["skipped"]
    begins = [done["begin"]]  # files from that at `position` on: number, position, changes before
    changes, source_sha256 = Counter(begins[0][2]), hashlib.sha256()

    def digest() -> str:
        return text.version or source_sha256.hexdigest()

    def rest() -> Iterator[str]:
        """The text from `start` on."""
        at = begins[0][1]
        for file, piece in text.numbered(partial(progress, "encoding"), changes, begins[0][0]):
            if text.version and file > begins[-1][0]:
                begins.append([file, at, dict(changes)])
            if at < start:
                before, piece = piece[: start - at], piece[start - at :]
                source_sha256.update(before.encode("utf-8", "surrogatepass"))
                at += len(before)
                if at == start and digest() != done["source_sha256"]:
                    break
            at += len(piece)
            yield piece
        else:
            if at >= start:
                return
        raise InterruptionError(f"{text.origin} has changed")

    def to_ids(part: str) -> tuple[int, Ids]:
        """How many characters are left out, and the ids of the others."""
        kept = drop_unknown(tok, part) if unknown == "skip" else part
        return len(part) - len(kept), tok.encode(kept).astype(dtype.newbyteorder("<"))

    parts = in_order(to_ids, split_words(rest(), PART, start))
    try:
        while not shards or shards[-1]["count"] >= SHARD:
            path, count = folder / f"tokens-{len(shards):05}.bin", 0
            with path.open("wb") as file:
                for part, (n_skipped, ids) in parts:
                    source_sha256.update(part.encode("utf-8", "surrogatepass"))
                    position, skipped, count = position + len(part), skipped + n_skipped, count + len(ids)
                    file.write(ids.tobytes())
                    if count >= SHARD:
                        break
            files.sync(path)
            if not count:
                path.unlink()
                break
            shards.append({"file": path.name, "count": count, "sha256": files.sha256(path)})
            if count >= SHARD:
                while len(begins) > 1 and begins[1][1] < position:
                    del begins[0]
                done = {"shards": shards, "position": position, "skipped": skipped, "source_sha256": digest()}
                files.write_atomically(folder / PROGRESS, files.seal(done | {"begin": begins[0]}).encode())
    except UnknownCharacterError as error:
        position += error.position
        raise UnknownCharacterError(error.character, position, error.known, text.where(position)) from error
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "count": sum(shard["count"] for shard in shards),
        "sha256": _sha256(folder / shard["file"] for shard in shards),
        "shards": shards,
        "source": text.name,
        "origin": text.origin,
        "source_sha256": digest(),
        "notes": text.notes(changes),
        "skipped_characters": skipped,
        "tokenizer": tok.to_json(),
    }


def _left_in(folder: Path) -> dict[str, Any]:
    """What an interrupted call recorded in a folder, or the beginning; shards that are not whole are removed."""
    done: dict[str, Any] = {"shards": [], "position": 0, "skipped": 0, "source_sha256": "", "begin": [0, 0, {}]}
    if (folder / PROGRESS).exists():
        try:
            done = files.unseal((folder / PROGRESS).read_bytes())
        except files.SealError as error:
            raise InterruptionError(f"{folder / PROGRESS} is damaged") from error
    for path in folder.iterdir():
        if path.name not in (LOCK, PROGRESS, *(shard["file"] for shard in done["shards"])):
            path.unlink()
    return done


def _sha256(paths: Iterable[Path]) -> str:
    """That of several files in a row."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def in_order(function: Callable[[str], T], parts: Iterable[str]) -> Iterator[tuple[str, T]]:
    """Each part with its result, computed on all cores, only a few parts ahead of the consumer."""
    n = os.cpu_count() or 1
    with ThreadPoolExecutor(n) as pool:
        waiting: deque[tuple[str, Future[T]]] = deque()
        for part in parts:
            waiting.append((part, pool.submit(function, part)))
            if len(waiting) > n:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def split_words(pieces: Iterable[str], size: int, start: int = 0) -> Iterator[str]:
    """A text in pieces, cut anew into parts of about `size` characters whose BPE ids together are those of the whole.

    A part ends where a word starts with white space. No word continues with white space after another character, and of
    several white space characters the split pattern leaves the last to the word that follows. The cut does not change
    the word before it either: the pattern looks ahead only past white space, and takes white space at the end whole.

    A word longer than LONGEST_WORD is cut at multiples of it.

    Args:
      start: the pieces are what follows a part that ends at this character of the text: then the parts are the same.
    """
    held = ""
    for block in regroup(pieces, size, start % size):
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


def regroup(pieces: Iterable[str], size: int, n_before: int = 0) -> Iterator[str]:
    """A text in pieces, as blocks of exactly `size` characters, but for the last; the first has `n_before` less."""
    held, length = list[str](), n_before
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
