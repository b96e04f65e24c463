"""A text of any size to shards of ids, encoded on all cores; a few parts of the text for each are in memory."""

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt import files
from jaxgpt.corpus import FORMAT
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


def encode(
    text: Text, tok: Tokenizer, unknown: str, folder: Path, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Encode a text into shards in an empty folder; the contents of its tokens.json.

    Args:
      unknown: "skip" leaves out characters outside the vocabulary, and counts them.

    Raises:
      UnknownCharacterError: a character is outside the vocabulary and `unknown` is "error".
      OSError: `folder` cannot be written to.
    """
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 2**16 else np.uint32)
    source_sha256, ids_sha256, shard_sha256 = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    shards, skipped, position, notes = list[dict[str, Any]](), 0, 0, list[str]()

    def known_characters() -> Iterator[str]:
        nonlocal skipped
        for piece in text.pieces(partial(progress, "encoding"), notes):
            source_sha256.update(piece.encode("utf-8", "surrogatepass"))
            kept = drop_unknown(tok, piece) if unknown == "skip" else piece
            skipped += len(piece) - len(kept)
            yield kept

    parts = split_words(known_characters(), PART)
    try:
        for part, ids in in_order(lambda part: tok.encode(part).astype(dtype.newbyteorder("<")), parts):
            if not shards or shards[-1]["count"] >= SHARD:
                shards.append({"file": f"tokens-{len(shards):05}.bin", "count": 0})
                shard_sha256 = hashlib.sha256()
            shard, data = shards[-1], ids.tobytes()
            with (folder / shard["file"]).open("ab") as file:
                file.write(data)
            ids_sha256.update(data)
            shard_sha256.update(data)
            shard |= {"count": shard["count"] + len(ids), "sha256": shard_sha256.hexdigest()}
            position += len(part)
    except UnknownCharacterError as error:
        position += error.position
        raise UnknownCharacterError(error.character, position, error.known, text.where(position)) from error
    for shard in shards:
        files.sync(folder / shard["file"])
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "count": sum(shard["count"] for shard in shards),
        "sha256": ids_sha256.hexdigest(),
        "shards": shards,
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
