"""A prepared corpus: a folder with tokens.json and memory-mapped shards tokens-00000.bin, tokens-00001.bin, ...

The shards hold token ids (uint16 or uint32); tokens.json holds their sizes and SHA-256, the tokenizer and the source.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxgpt import files, tokenizer
from jaxgpt.config import DataConfig, UsageError, shown
from jaxgpt.data import Part
from jaxgpt.tokenizer import Ids, Tokenizer

FORMAT = 2
_KINDS = dict(format=int, dtype=str, count=int, sha256=str, source=str, origin=str, source_sha256=str, tokenizer=dict)


class CorpusError(UsageError):
    """A prepared corpus is missing, damaged, too short or unsuitable."""


class Joined:
    """A concatenation of arrays (N,) without a copy, for memory maps.

    It can be indexed by slices of step 1, without a copy, and by arrays. `numpy.asarray` reads all of it.
    """

    def __init__(self, pieces: Sequence[Ids]):
        sizes = [len(piece) for piece in pieces]
        self.pieces, self.dtype = tuple(pieces), pieces[0].dtype
        self.ends = np.cumsum(sizes)
        self.begins = self.ends - sizes

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            begin, end, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"expected a slice of step 1, found {at}")
            cut = [p[max(0, begin - b) : max(0, end - b)] for p, b in zip(self.pieces, self.begins, strict=True)]
            return joined([piece for piece in cut if len(piece)] or cut[:1])
        at = np.asarray(at)
        if at.size and at.dtype.kind not in "iu":
            raise IndexError(f"expected integers as indices, found {at.dtype}")
        if at.size and not (at.min() >= 0 and at.max() < len(self)):
            raise IndexError(f"indices from {at.min()} to {at.max()} of {len(self)} tokens")
        indices = at.reshape(-1)
        ids, of = np.empty(indices.shape, self.dtype), np.searchsorted(self.ends, indices, side="right")
        order = np.argsort(of, kind="stable")  # three times faster than a mask for each of many pieces
        bounds = np.searchsorted(of[order], np.arange(len(self.pieces) + 1))
        for i in np.flatnonzero(np.diff(bounds)):
            here = order[bounds[i] : bounds[i + 1]]
            ids[here] = self.pieces[i][indices[here] - self.begins[i]]
        return ids.reshape(at.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.concatenate(self.pieces).astype(dtype or self.dtype, copy=False)


def joined(pieces: Sequence[Ids]) -> Ids:
    """The concatenated pieces; a single piece is returned as it is."""
    return pieces[0] if len(pieces) == 1 else cast(Ids, Joined(pieces))


@dataclass(frozen=True)
class Corpus:
    """Token ids (N,), uint16 or uint32, their tokenizer, and the contents of tokens.json."""

    tokens: Ids
    tokenizer: Tokenizer
    meta: dict[str, Any]
    parts: tuple[tuple[float, "Corpus"], ...] = ()
    """The corpora of a mixture, each with its weight in training."""

    def split(self, data: DataConfig) -> tuple[Ids, Ids]:
        """Training tokens and, from the end of the text, validation tokens: views, not copies.

        Each part of a mixture is split alone, and the splits are concatenated. val_tokens limits their sum: each part
        then keeps the same share of its validation tokens."""
        texts = [part.tokens for _, part in self.parts] or [self.tokens]
        split = list(zip(texts, self.training_parts(data), strict=True))
        train = joined([text[: part.n_tokens] for text, part in split])
        return train, joined([text[part.n_tokens :] for text, part in split])

    def training_parts(self, data: DataConfig) -> tuple[Part, ...]:
        """Number of training tokens and weight of each part, in order."""
        parts = [(share, len(part.tokens)) for share, part in self.parts or ((1.0, self),)]
        val = [n - train_size(n, data.val_fraction) for _, n in parts]
        if 0 < data.val_tokens < (total := sum(val)):
            val = [b - a for a, b in pairwise(n * data.val_tokens // total for n in accumulate(val, initial=0))]
        return tuple(Part(size - n, share) for (share, size), n in zip(parts, val, strict=True))

    @property
    def summary(self) -> str:
        """One line about the corpus."""
        return (
            f"{self.meta['source']}: {len(self.tokens):,} tokens, vocabulary of {self.tokenizer.vocab_size:,} "
            f"({self.meta['tokenizer']['kind']}), from {self.meta['origin']}"
        )


def shareable(text: str) -> str:
    """`text` whose URLs have no user name, password, query and fragment: they may hold a key or a signature.

    >>> shareable("0.7*https://me:secret@host/a.txt?sig=1 + 0.3*b.txt")
    '0.7*https://host/a.txt + 0.3*b.txt'
    """
    return re.sub(r"(?<=://)(?:[^/?#\s]*@)?([^?#\s]*)(?:[?#]\S*)?", r"\1", text)


def train_size(n_tokens: int, val_fraction: float) -> int:
    """How many of a text's tokens are for training."""
    return int(n_tokens * (1 - val_fraction))


def mix(parts: Sequence[tuple[float, Corpus]]) -> Corpus:
    """A mixture of corpora that share a tokenizer, each with its weight in training."""
    metas = [part.meta for _, part in parts]
    shares = [f"{share:g}*" for share, _ in parts]
    sha256s = json.dumps([[share, meta["sha256"]] for share, meta in zip(shares, metas, strict=True)])
    meta = metas[0] | {
        "count": sum(meta["count"] for meta in metas),
        "sha256": hashlib.sha256(sha256s.encode()).hexdigest(),
        "source": "+".join(meta["source"] for meta in metas),
        "origin": " + ".join(share + meta["origin"] for share, meta in zip(shares, metas, strict=True)),
        "source_sha256": hashlib.sha256("".join(meta["source_sha256"] for meta in metas).encode()).hexdigest(),
        "notes": [f"{meta['source']}: {note}" for meta in metas for note in meta.get("notes", [])],
        "skipped_characters": sum(meta.get("skipped_characters", 0) for meta in metas),
        "parts": [{name: meta[name] for name in ("source", "count", "sha256")} for meta in metas],
    }
    del meta["shards"]
    return Corpus(joined([part.tokens for _, part in parts]), parts[0][1].tokenizer, meta, tuple(parts))


def load(folder: Path, verified: bool = False) -> Corpus:
    """Memory-map a prepared corpus, and check the SHA-256 and ids of each shard; only its size if already `verified`.

    Raises:
      CorpusError: a file is missing, damaged or of another format.
    """
    meta = read_meta(folder / "tokens.json")
    if "parts" in meta:
        raise CorpusError(f"{folder}/tokens.json describes the mixture of a run, expected a prepared corpus")
    tok, dtype = tokenizer.from_json(meta["tokenizer"]), np.dtype(meta["dtype"]).newbyteorder("<")
    again, pieces = "the file is damaged; remove the folder and run jaxgpt prepare again", []
    for shard in meta["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise CorpusError(f"{path} is missing; jaxgpt prepare makes it")
        size, expected = path.stat().st_size, shard["count"] * dtype.itemsize
        if size != expected:
            raise CorpusError(f"{path} has {size:,} bytes, expected {expected:,}: {again}")
        tokens = np.memmap(path, dtype, mode="r")
        pieces.append(tokens)
        if verified:
            continue
        if (digest := files.sha256(path)) != shard["sha256"]:
            raise CorpusError(f"{path} has SHA-256 {digest}, expected {shard['sha256']}: {again}")
        largest = max(int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24))
        if largest >= tok.vocab_size:
            raise CorpusError(f"{path} has id {largest}, expected ids below vocab_size = {tok.vocab_size}: {again}")
    return Corpus(joined(pieces), tok, meta)


def read_meta(path: Path, hint: str = "jaxgpt prepare writes it anew") -> dict[str, Any]:
    """The contents of a tokens.json; a CorpusError, which ends with `hint`, if it is missing, damaged or invalid."""
    try:
        return checked_meta(files.unseal(path.read_bytes()))
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}; {hint}") from error
    except ValueError as error:
        raise CorpusError(f"{path}: {error}; {hint}") from error


def checked_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta`; a ValueError if it does not describe a corpus or a mixture."""
    for name, kind in _KINDS.items():
        if type(meta.get(name)) is not kind:
            raise ValueError(f"it has no {name} of type {kind.__name__}")
    if meta["format"] != FORMAT or meta["dtype"] not in ("uint16", "uint32") or not 1 <= meta["count"] < 2**63:
        raise ValueError(
            f"it has format {meta['format']}, dtype {meta['dtype']}, count {meta['count']}; expected format "
            f"{FORMAT}, dtype uint16 or uint32 and a count from 1 to 2**63 - 1"
        )
    tokenizer.from_json(meta["tokenizer"])
    name, least = ("parts", 2) if "parts" in meta else ("shards", 1)
    rows = meta.get(name)
    if not isinstance(rows, list) or len(rows) < least:
        raise ValueError(f"its {name} are {shown(rows)}, expected a list of {least} or more")
    for i, row in enumerate(rows):
        file = f"tokens-{i:05}.bin"
        match row:
            case {"source": str(), "count": int(n), "sha256": str()} if name == "parts" and n >= 1:
                continue
            case {"file": found, "count": int(n), "sha256": str()} if name == "shards" and n >= 1 and found == file:
                continue  # its file becomes a path
        wanted = "a source" if name == "parts" else f"file {file}"
        raise ValueError(f"its {name[:-1]} {i} is {shown(row)}, expected {wanted}, a count and a sha256")
    if (total := sum(row["count"] for row in rows)) != meta["count"]:
        raise ValueError(f"its {name} have {total:,} tokens, expected {meta['count']:,}")
    return meta
