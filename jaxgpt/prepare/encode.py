"""Text of any size to shards of token ids, encoded on all cores in bounded memory."""

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxgpt import files
from jaxgpt.corpus import FORMAT
from jaxgpt.prepare.sources import Text
from jaxgpt.tokenizer import Ids, Tokenizer, UnknownCharacterError, drop_unknown

PART = 2**18
"""Characters encoded at once, approximately. tiktoken's regular expression overflows its stack on more than a million
white space characters followed by other text."""
LONGEST_WORD = 2**22
"""Text without white space, such as base64 or a genome, is cut after this many characters to bound memory."""
# Before white space that is followed by something else, but not by a surrogate, which may be dropped. Python's \s
# matches four separators, 0x1c to 0x1f, that the \s of the split pattern does not.
_WORD_START = re.compile(r"(?=[^\S\x1c-\x1f](?:[^\s\ud800-\udfff]|[\x1c-\x1f]))")
_LAST_WORD_START = re.compile(rf".*{_WORD_START.pattern}", re.DOTALL)
SHARD = 2**25
"""Least number of ids in a shard that is not the last."""
LOCK, PROGRESS = ".lock", "progress.json"
"""Files beside the shards until all of them are written."""
T = TypeVar("T")


class InterruptionError(Exception):
    """An interrupted preparation cannot be continued: its record is damaged, or the text has changed."""


def encode(text: Text, tok: Tokenizer, unknown: str, folder: Path) -> dict[str, Any]:
    """Encode a text into shards in `folder`, and return the contents of its tokens.json.

    PROGRESS records each full shard. A call that finds it continues from there, with the same result as an
    uninterrupted call. It first rereads the text up to that point to check that it has not changed; a text with a
    version is reread only from the beginning of a file.

    Args:
      unknown: "skip" drops characters outside the vocabulary and counts them.

    Raises:
      UnknownCharacterError: a character is outside the vocabulary and `unknown` is "error".
      InterruptionError: an interrupted call cannot be continued.
      OSError: `folder` cannot be written to.
    """
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 2**16 else np.uint32)
    done = _read_progress(folder)
    shards, start = done["shards"], done["position"]
    begins = [done["begin"]]  # [number, position, changes before it] of the file at `position` and of later ones
    changes, source_sha256 = Counter(begins[0][2]), hashlib.sha256()

    def digest() -> str:
        return text.version or source_sha256.hexdigest()

    def rest() -> Iterator[str]:
        """The text from `start` on."""
        at = begins[0][1]
        for file, piece in text.numbered("encoding", changes, begins[0][0]):
            if text.version and file > begins[-1][0]:
                begins.append([file, at, dict(changes)])
            before = piece[: max(0, start - at)]
            source_sha256.update(before.encode("utf-8", "surrogatepass"))
            at += len(piece)
            if before and at >= start and digest() != done["source_sha256"]:
                raise InterruptionError(f"{text.origin} has changed")
            yield piece[len(before) :]
        if at < start:
            raise InterruptionError(f"{text.origin} has changed")

    def to_ids(part: str) -> tuple[str, int, Ids]:
        """The part, the number of dropped characters, and the ids of the others."""
        kept = drop_unknown(tok, part) if unknown == "skip" else part
        return part, len(part) - len(kept), tok.encode(kept).astype(dtype.newbyteorder("<"))

    parts = parallel_map(to_ids, split_words(rest(), PART, start))
    try:
        while not shards or shards[-1]["count"] >= SHARD:
            path, count = folder / f"tokens-{len(shards):05}.bin", 0
            with path.open("wb") as file:
                for part, n_skipped, ids in parts:
                    source_sha256.update(part.encode("utf-8", "surrogatepass"))
                    file.write(ids.tobytes())
                    count += len(ids)
                    done["position"] += len(part)
                    done["skipped"] += n_skipped
                    if count >= SHARD:
                        break
            files.sync(path)
            if not count:
                path.unlink()
                break
            shards.append({"file": path.name, "count": count, "sha256": files.sha256(path)})
            if count >= SHARD:
                while len(begins) > 1 and begins[1][1] < done["position"]:
                    del begins[0]
                done |= {"source_sha256": digest(), "begin": begins[0]}
                files.write_atomically(folder / PROGRESS, files.seal(done).encode())
    except UnknownCharacterError as error:
        position = done["position"] + error.position
        raise UnknownCharacterError(error.character, position, error.known, text.where(position)) from error
    sha256 = hashlib.sha256()
    for shard in shards:
        with (folder / shard["file"]).open("rb") as file:
            hashlib.file_digest(file, lambda: sha256)
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "count": sum(shard["count"] for shard in shards),
        "sha256": sha256.hexdigest(),
        "shards": shards,
        "source": text.name,
        "origin": text.origin,
        "source_sha256": digest(),
        "notes": text.notes(changes),
        "skipped_characters": done["skipped"],
        "tokenizer": tok.to_json(),
    }


def _read_progress(folder: Path) -> dict[str, Any]:
    """What an interrupted call recorded in `folder`, else a fresh record. Incomplete shards are deleted."""
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


def parallel_map(function: Callable[[str], T], parts: Iterable[str]) -> Iterator[T]:
    """`map` on all cores, in order, and only a few parts ahead of the consumer."""
    n = os.cpu_count() or 1
    with ThreadPoolExecutor(n) as pool:
        futures = (pool.submit(function, part) for part in parts)
        waiting = deque(islice(futures, n + 1))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(futures, 1))


def split_words(pieces: Iterable[str], size: int, start: int = 0) -> Iterator[str]:
    """Cut a text into parts of about `size` characters whose BPE ids, concatenated, are the ids of the whole text.

    A part ends where a word begins with white space: there the split pattern starts a word whatever comes before, and
    splits the text before it as if that ended there. A word longer than LONGEST_WORD is cut at multiples of it.

    Args:
      pieces: the text from character `start` on. If a part of the whole text ends there, the parts are those after it.
    """
    held = ""
    for block in regroup(pieces, size, size - start % size):
        begin = max(0, len(held) - 1)  # a word start takes two characters to see
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


def regroup(pieces: Iterable[str], size: int, first: int) -> Iterator[str]:
    """Regroup a text into a block of `first` characters, then blocks of `size`; the last may be shorter."""
    held, missing = list[str](), first  # a list, because adding to a string copies it
    for piece in pieces:
        begin = 0
        while len(piece) - begin >= missing:
            yield "".join([*held, piece[begin : begin + missing]])
            held, missing, begin = [], size, begin + missing
        held.append(piece[begin:])
        missing -= len(held[-1])
    if any(held):
        yield "".join(held)
