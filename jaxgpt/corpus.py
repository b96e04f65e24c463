"""A prepared corpus: token ids in shards tokens-00000.bin, tokens-00001.bin, ... (uint16 or uint32, memory-mapped)
beside tokens.json, which holds their sizes and SHA-256, the tokenizer and where the text came from."""

import hashlib
import json
import os
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
NAMED = ("python-docs", "python-stdlib", "shakespeare")
"""Texts that `prepare` knows by name."""


class CorpusError(UsageError):
    """A prepared corpus is missing, damaged, too short or unsuitable."""


class Joined:
    """Arrays of ids, which may be memory-mapped, as one array (N,), without a copy.

    It takes slices of step 1, which give another `Joined`, and arrays of indices. `numpy.asarray` reads all of it.
    """

    def __init__(self, pieces: Sequence[Ids]):
        self.pieces = tuple(pieces)
        self.ends = np.cumsum([len(piece) for piece in self.pieces])
        self.dtype = self.pieces[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at: Any) -> Any:
        begins = self.ends - [len(piece) for piece in self.pieces]
        if isinstance(at, slice):
            begin, end, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of step 1 is expected, found {at}")
            cut = [p[max(0, begin - b) : max(0, end - b)] for p, b in zip(self.pieces, begins, strict=True)]
            return joined([piece for piece in cut if len(piece)] or cut[:1])
        at = np.asarray(at)
        if at.size and not (at.min() >= 0 and at.max() < len(self)):
            raise IndexError(f"indices from {at.min()} to {at.max()} of {len(self)} tokens")
        indices = at.reshape(-1)
        ids, of = np.empty(indices.shape, self.dtype), np.searchsorted(self.ends, indices, side="right")
        order = np.argsort(of, kind="stable")  # one sort: a mask for each of many pieces would be slow
        bounds = np.searchsorted(of[order], np.arange(len(self.pieces) + 1))
        for i in np.flatnonzero(np.diff(bounds)):
            here = order[bounds[i] : bounds[i + 1]]
            ids[here] = self.pieces[i][indices[here] - begins[i]]
        return ids.reshape(at.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.concatenate(self.pieces).astype(dtype or self.dtype, copy=False)


def joined(pieces: Sequence[Ids]) -> Ids:
    """The pieces as one array; a single piece is returned as it is."""
    return pieces[0] if len(pieces) == 1 else cast(Ids, Joined(pieces))


def pieces_of(tokens: Ids) -> Sequence[Ids]:
    """The arrays that `joined` was given, to read one at a time."""
    return tokens.pieces if isinstance(tokens, Joined) else [tokens]


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

        Those of a mixture are those of its parts, one after another. If there are more than val_tokens, each part keeps
        the same share of its own."""
        texts = [part.tokens for _, part in self.parts] or [self.tokens]
        sizes = [part.n_tokens for part in self.training_parts(data)]
        train, val = zip(*((text[:n], text[n:]) for text, n in zip(texts, sizes, strict=True)), strict=True)
        return joined(train), joined(val)

    def training_parts(self, data: DataConfig) -> tuple[Part, ...]:
        """Size and weight of each part of the training tokens, in their order."""
        shares, sizes = zip(*((share, len(part.tokens)) for share, part in self.parts or ((1.0, self),)), strict=True)
        val = [n - train_size(n, data.val_fraction) for n in sizes]
        if 0 < data.val_tokens < (total := sum(val)):
            ends = [end * data.val_tokens // total for end in accumulate(val, initial=0)]
            val = [end - begin for begin, end in pairwise(ends)]
        return tuple(Part(size - n, share) for size, n, share in zip(sizes, val, shares, strict=True))

    @property
    def summary(self) -> str:
        """One line about the corpus."""
        return (
            f"{self.meta['source']}: {len(self.tokens):,} tokens, vocabulary of {self.tokenizer.vocab_size:,} "
            f"({self.meta['tokenizer']['kind']}), from {self.meta['origin']}"
        )


def train_size(n_tokens: int, val_fraction: float) -> int:
    """How many of the tokens of a text are training tokens."""
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
        "format": FORMAT,
    }
    meta.pop("shards", None)
    return Corpus(joined([part.tokens for _, part in parts]), parts[0][1].tokenizer, meta, tuple(parts))


def load(folder: Path, verified: bool = False) -> Corpus:
    """Memory-map a prepared corpus. SHA-256 and ids of each shard are checked, or only its size if they are `verified`.

    Raises:
      CorpusError: a file is missing, damaged or of another format.
    """
    path = folder / "tokens.json"
    meta = read_meta(path)
    if "parts" in meta:
        raise CorpusError(f"{path}: it is that of a mixture in a run, expected that of a prepared folder")
    tok, dtype = tokenizer.from_json(meta["tokenizer"]), np.dtype(meta["dtype"]).newbyteorder("<")
    return Corpus(joined([_load_shard(folder, shard, dtype, tok, verified) for shard in shards_of(meta)]), tok, meta)


def _load_shard(folder: Path, shard: dict[str, Any], dtype: np.dtype[Any], tok: Tokenizer, verified: bool) -> Ids:
    path, again = folder / shard["file"], "it is damaged; remove the folder and run jaxgpt prepare again"
    if not path.is_file():
        raise CorpusError(f"{path} is missing; jaxgpt prepare makes it")
    size, expected = path.stat().st_size, shard["count"] * dtype.itemsize
    if size != expected:
        raise CorpusError(
            f"{path} has {size:,} bytes, expected {expected:,} ({shard['count']:,} {dtype.name}): {again}"
        )
    tokens = np.memmap(path, dtype, mode="r")
    if verified:
        return tokens
    if (digest := files.sha256(path)) != shard["sha256"]:
        raise CorpusError(f"{path} has SHA-256 {digest}, expected {shard['sha256']}: {again}")
    largest = max(int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24))
    if largest >= tok.vocab_size:
        raise CorpusError(
            f"{path} holds the id {largest}, expected ids below {tok.vocab_size}, the size of its vocabulary: "
            "it belongs to another tokens.json; remove the folder and run jaxgpt prepare again"
        )
    return tokens


def read_meta(path: Path) -> dict[str, Any]:
    """The contents of a tokens.json, checked.

    Raises:
      CorpusError: it is missing, damaged, edited, or was not written by `prepare`.
    """
    try:
        return checked_meta(files.unseal(path.read_bytes()))
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}; jaxgpt prepare makes it") from error
    except ValueError as error:
        raise CorpusError(f"{path}: {error}; jaxgpt prepare writes it anew") from error


def checked_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` itself, if it describes a corpus or a mixture.

    Raises:
      ValueError: a value is missing or of the wrong kind, or it does not describe a tokenizer.
    """
    kinds = {"format": int, "dtype": str, "count": int, "sha256": str, "source": str, "origin": str}
    kinds |= {"source_sha256": str, "tokenizer": dict}
    for name, kind in kinds.items():
        if type(meta.get(name)) is not kind:
            raise ValueError(f"it has no {name} of type {kind.__name__}")
    if meta["format"] not in (1, FORMAT) or meta["dtype"] not in ("uint16", "uint32") or not 1 <= meta["count"] < 2**63:
        raise ValueError(
            f"it has format {meta['format']}, dtype {meta['dtype']}, count {meta['count']}; expected format "
            f"1 or {FORMAT}, dtype uint16 or uint32 and a count from 1 to 2**63 - 1"
        )
    if "parts" in meta:
        parts = meta["parts"]
        if not isinstance(parts, list) or len(parts) < 2:
            raise ValueError(f"its parts are {shown(parts)}, expected a list of two or more")
        for part in parts:
            match part:
                case {"source": str(), "count": int(), "sha256": str()}:
                    continue
            raise ValueError(f"a part of it is {shown(part)}, expected a source, a count and a sha256")
    else:
        shards_of(meta)
    tokenizer.from_json(meta["tokenizer"])
    return meta


def shards_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """File, count and SHA-256 of each shard; format 1 had one shard. The names become paths, so they are checked.

    Raises:
      ValueError: shards are missing, or their names or sizes are not what `prepare` writes.
    """
    if meta["format"] == 1:
        return [{"file": "tokens.bin", "count": meta["count"], "sha256": meta["sha256"]}]
    shards = meta.get("shards")
    if not isinstance(shards, list):
        raise ValueError("it has no shards of type list")
    for i, shard in enumerate(shards):
        match shard:
            case {"file": str(name), "count": int(n), "sha256": str()} if name == f"tokens-{i:05}.bin" and n >= 1:
                continue
        raise ValueError(f"its shard {i} is {shown(shard)}, expected file tokens-{i:05}.bin, a count and a sha256")
    if sum(shard["count"] for shard in shards) != meta["count"]:
        raise ValueError(f"its shards do not hold {meta['count']:,} tokens together")
    return shards


def find_prepared(corpus: str, meta: dict[str, Any], data_dir: Path, verified: bool = False) -> Corpus | None:
    """The corpus or mixture that `meta` describes, if all of it is prepared on this machine.

    Args:
      corpus: as in `prepare_corpus`; each part is in its folder of `data_dir`, is a prepared folder that is named, or
        was fetched into the cache.
      verified: as in `load`, of the folders in `data_dir`.

    Raises:
      CorpusError: it is there, but damaged.
    """
    names, folders = mixture(corpus), folders_of(meta, data_dir)
    if len(names) != len(folders):
        return None
    parts = []
    for (share, name), folder in zip(names, folders, strict=True):
        named = cached_folder(folder.name) if is_url(name) else None if name in NAMED else local_path(name)
        found = next((each for each in (folder, named) if each and is_prepared(each)), None)
        if not found:
            return None
        part = load(found, verified and found == folder)
        if folder_of(part.meta, data_dir) != folder:  # another text or another tokenizer
            return None
        parts.append((share, part))
    whole = mix(parts) if "parts" in meta else parts[0][1]
    return whole if whole.meta["sha256"] == meta["sha256"] else None


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` made a folder, as opposed to a folder of texts among which is a tokens.json."""
    if not (folder / "tokens.json").is_file():
        return False
    others = [path.name for path in folder.iterdir() if path.name != "tokens.json"]
    return not others or any(re.fullmatch(r"tokens(-\d{5})?\.bin", name) for name in others)


def folder_of(meta: dict[str, Any], data_dir: Path) -> Path:
    """The folder of the corpus that `meta` describes: corpora of other ids or another vocabulary have other folders."""
    both = hashlib.sha256(json.dumps([meta["sha256"], meta["tokenizer"]]).encode()).hexdigest()
    return data_dir / f"{meta['source']}-{meta['tokenizer']['kind']}-{both[:8]}"


def folders_of(meta: dict[str, Any], data_dir: Path) -> list[Path]:
    """`folder_of` each part of a mixture; of any other corpus its own."""
    return [folder_of(part | {"tokenizer": meta["tokenizer"]}, data_dir) for part in meta.get("parts", [meta])]


def cached_folder(name: str) -> Path | None:
    """Where the copy of a prepared folder at a URL is kept, by the name that `folder_of` gives."""
    cache = files.cache_dir()
    return cache / "corpora" / name if cache else None


def mixture(corpus: str) -> list[tuple[float, str]]:
    """The parts of "0.7*wiki.jsonl + 0.3*code" with their weights; any other corpus is its only part.

    >>> mixture("0.7*wiki.jsonl + 0.3*code")
    [(0.7, 'wiki.jsonl'), (0.3, 'code')]
    >>> mixture("notes.txt")
    [(1.0, 'notes.txt')]
    """
    parts = [re.fullmatch(r"([0-9]*\.?[0-9]+)\*(\S.*)", part.strip()) for part in corpus.split(" + ")]
    found = [(float(part[1]), part[2]) for part in parts if part]
    if len(found) < 2 or len(found) < len(parts):
        return [(1.0, corpus)]
    if not all(share > 0 for share, _ in found) or len({part for _, part in found}) < len(found):
        raise CorpusError(f"{corpus!r}: expected parts that differ, each with a weight above 0")
    if (least := min(share for share, _ in found) / sum(share for share, _ in found)) < 1e-3:
        raise CorpusError(f"{corpus!r}: the least weight is {least:.2g} of all, expected a thousandth or more")
    return found


def absolute(corpus: str) -> str:
    """The same corpus with the full path of each file, to be found from any working directory."""
    found = mixture(corpus)
    if len(found) > 1:
        shares = (np.format_float_positional(share, trim="-") for share, _ in found)
        return " + ".join(f"{share}*{absolute(part)}" for share, (_, part) in zip(shares, found, strict=True))
    if corpus in NAMED or is_url(corpus):
        return corpus
    path = local_path(corpus)
    return str(path.absolute() if path.is_fifo() else path.resolve())  # /dev/stdin, and not the pipe behind it


def is_url(corpus: str) -> bool:
    """Whether a corpus is in a store, such as gs://bucket/texts."""
    return "://" in corpus


def local_path(corpus: str) -> Path:
    """The path of a file or folder; ~ is the home folder. Path.expanduser would raise for "~draft.txt"."""
    return Path(os.path.expanduser(corpus))
