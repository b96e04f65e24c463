"""Text to tokens on disk and back: shards tokens-00000.bin and so on (uint16 or uint32, memory-mapped) beside
tokens.json, which says what each of them holds."""

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import files as disk
from jaxgpt import gpt2, tokenizer
from jaxgpt.config import DataConfig, UsageError, shown
from jaxgpt.data import Part
from jaxgpt.shards import joined
from jaxgpt.tokenizer import Ids, Tokenizer

FORMAT = 2
KINDS = {"char": "char", "ascii": "char", "byte": "byte", "gpt2": "bpe", "bpe": "bpe"}
"""What --tokenizer can say before a colon, and the kind of tokenizer that it gives."""


class CorpusError(UsageError):
    """A prepared corpus is missing, damaged, too short or does not fit."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: `tokens` (N,) uint16 or uint32, its tokenizer, and what tokens.json says."""

    tokens: Ids
    tokenizer: Tokenizer
    meta: dict[str, Any]
    parts: tuple[tuple[float, "Corpus"], ...] = ()
    """Of a mixture: the weight in training of each part, and the part."""

    def split(self, data: DataConfig) -> tuple[Ids, Ids]:
        """The training tokens and, from the end of the text, the validation tokens: views, not copies.

        Of a mixture: those of its parts, one after another. If there are more than val_tokens, each part keeps the same
        share of its own."""
        texts = [part.tokens for _, part in self.parts] or [self.tokens]
        sizes = [part.n_tokens for part in self.training_parts(data)]
        train, val = zip(*((text[:n], text[n:]) for text, n in zip(texts, sizes, strict=True)), strict=True)
        return joined(train), joined(val)

    def training_parts(self, data: DataConfig) -> tuple[Part, ...]:
        """Size and weight of each part of the training tokens, in their order."""
        shares, sizes = zip(*((share, len(part.tokens)) for share, part in self.parts or ((1.0, self),)), strict=True)
        val = [size - int(size * (1 - data.val_fraction)) for size in sizes]
        if 0 < data.val_tokens < (total := sum(val)):
            ends = [end * data.val_tokens // total for end in accumulate(val, initial=0)]
            val = [end - begin for begin, end in pairwise(ends)]
        return tuple(Part(size - n, share) for size, n, share in zip(sizes, val, shares, strict=True))

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.meta['source']}: {len(self.tokens):,} tokens, vocabulary of {self.tokenizer.vocab_size:,} "
            f"({self.meta['tokenizer']['kind']}), from {self.meta['origin']}"
        )


def require_fit(corpus: Corpus, block_size: int, val_fraction: float, vocab_size: int = 0) -> None:
    """Check that a model can learn from it: both splits hold a window of `block_size` inputs and their targets, and
    the vocabulary is no larger than `vocab_size` (0: any).

    Raises:
      CorpusError: they do not, or it is.
    """
    needed = corpus.tokenizer.vocab_size
    if 0 < vocab_size < needed:
        raise CorpusError(
            f"vocab_size is {vocab_size}, expected at least the {needed} ids of {corpus.meta['source']}, "
            "or 0 to take those"
        )
    splits = corpus.split(DataConfig(val_fraction=val_fraction, val_tokens=0))  # a limit is above block_size
    for name, part in zip(("training", "validation"), splits, strict=True):
        if len(part) < block_size + 1:
            raise CorpusError(
                f"the {name} split of {corpus.meta['source']} has {len(part):,} tokens, expected at least "
                f"block_size + 1 = {block_size + 1}: give more text"
                + (", or a smaller --block-size" if block_size > 1 else "")
            )


def save(corpus: Corpus, folder: Path) -> None:
    """Write the shards that `corpus.meta` names and tokens.json, each whole or not at all, tokens.json last.

    Raises:
      CorpusError: the folder cannot be written to.
    """
    first = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in corpus.meta["shards"]:
            ids = np.asarray(corpus.tokens[first : first + shard["count"]])
            disk.write_atomically(folder / shard["file"], ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes())
            first += shard["count"]
        disk.write_atomically(folder / "tokens.json", disk.seal(corpus.meta).encode())
    except OSError as error:
        raise CorpusError(f"{folder} cannot be written: {error.strerror}; name another folder: --data-dir") from error


def load(folder: Path, verified: bool = False) -> Corpus:
    """Memory-map a prepared corpus, the SHA-256 and the ids of each shard checked; if they are `verified`, its size.

    Raises:
      CorpusError: a file is missing, damaged or of another format.
    """
    path = folder / "tokens.json"
    meta = read_meta(path)
    try:
        shards = shards_of(meta)
    except ValueError as error:
        raise CorpusError(f"{path}: {error}; jaxgpt prepare writes it anew") from error
    tok, dtype = tokenizer.from_json(meta["tokenizer"]), np.dtype(meta["dtype"]).newbyteorder("<")
    return Corpus(joined([_load_shard(folder, shard, dtype, tok, verified) for shard in shards]), tok, meta)


def shards_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """File, count and SHA-256 of each shard, checked, as the names become paths; format 1 had one shard.

    Raises:
      ValueError: it names none, or others than `save` writes; or it is a mixture's, which has none of its own.
    """
    if "parts" in meta:
        raise ValueError("it is that of a mixture in a run, expected that of a prepared folder")
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


def _load_shard(folder: Path, shard: dict[str, Any], dtype: np.dtype[Any], tok: Tokenizer, verified: bool) -> Ids:
    path = folder / shard["file"]
    if not path.is_file():
        raise CorpusError(f"{path} is missing; jaxgpt prepare makes it")
    size, expected = path.stat().st_size, shard["count"] * dtype.itemsize
    if size != expected:
        raise CorpusError(
            f"{path} has {size:,} bytes, expected {expected:,} ({shard['count']:,} {dtype.name}): "
            "it is damaged; remove the folder and run jaxgpt prepare again"
        )
    tokens = np.memmap(path, dtype, mode="r")
    if verified:
        return tokens
    digest = disk.sha256(path)
    if digest != shard["sha256"]:
        raise CorpusError(
            f"{path} has SHA-256 {digest}, expected {shard['sha256']}: "
            "it is damaged; remove the folder and run jaxgpt prepare again"
        )
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
      CorpusError: it is missing, damaged, edited, or not what `save` writes.
    """
    try:
        return checked_meta(disk.unseal(path.read_bytes()))
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}; jaxgpt prepare makes it") from error
    except ValueError as error:
        raise CorpusError(f"{path}: {error}; jaxgpt prepare writes it anew") from error


def checked_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` itself, if it is what `tokenize` says of a corpus.

    Raises:
      ValueError: a value is missing or of the wrong kind, or it describes no tokenizer.
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
        _check_parts(meta["parts"])
    else:
        shards_of(meta)
    tokenizer.from_json(meta["tokenizer"])
    return meta


def _check_parts(parts: Any) -> None:
    if not isinstance(parts, list) or len(parts) < 2:
        raise ValueError(f"its parts are {shown(parts)}, expected a list of two or more")
    for part in parts:
        match part:
            case {"source": str(), "count": int(), "sha256": str()}:
                continue
        raise ValueError(f"a part of it is {shown(part)}, expected a source, a count and a sha256")


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer that a tokens.json (or the folder that holds one) describes, or that of a Hugging Face folder.

    Raises:
      CorpusError: there is none, or it cannot be used.
    """
    path = Path(os.path.expanduser(path))
    folder = path if path.is_dir() else path.parent
    if path.name in gpt2.FILES or (path.is_dir() and has_tokenizer(path) and not (path / "tokens.json").is_file()):
        try:
            return gpt2.in_folder(folder)
        except (OSError, ValueError) as error:
            hint = "to learn other tokens all the same, name them, such as --tokenizer byte"
            raise CorpusError(f"the vocabulary of {folder} cannot be used: {error}; {hint}") from error
    if path.is_dir():
        path = path / "tokens.json"
    if not path.is_file():
        raise CorpusError(
            f"no tokenizer {str(path)!r}: expected char, ascii, byte, gpt2, bpe:SIZE such as bpe:4096, "
            "the path of a tokens.json, or a folder with the byte-level BPE of a Hugging Face model"
        )
    return tokenizer.from_json(read_meta(path)["tokenizer"])


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary of its own, also one that `tokenizer_of` refuses."""
    return any((folder / name).is_file() for name in ("tokens.json", *gpt2.FILES, *gpt2.OTHER_FILES))


def folder_of(meta: dict[str, Any], data_dir: Path) -> Path:
    """Where `prepare` puts the corpus that `meta` describes: what differs in ids or vocabulary shares no folder."""
    both = hashlib.sha256(json.dumps([meta["sha256"], meta["tokenizer"]]).encode()).hexdigest()
    return data_dir / f"{meta['source']}-{meta['tokenizer']['kind']}-{both[:8]}"


def folders_of(meta: dict[str, Any], data_dir: Path) -> list[Path]:
    """`folder_of` each part of a mixture; of any other corpus its own."""
    return [folder_of(part | {"tokenizer": meta["tokenizer"]}, data_dir) for part in meta.get("parts", [meta])]
