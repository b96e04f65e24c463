"""Text to tokens on disk and back: tokens.bin (uint16 or uint32, memory-mapped) beside tokens.json."""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt import disk
from jaxgpt.config import UsageError
from jaxgpt.text import bpe, gpt2, sources, tokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, CharTokenizer, Ids, Progress, Tokenizer, unseen

FORMAT = 1
KINDS = {"char": "char", "ascii": "char", "byte": "byte", "gpt2": "bpe", "bpe": "bpe"}
"""What --tokenizer can say before a colon, and the kind of tokenizer that it gives."""


class CorpusError(UsageError):
    """A prepared corpus is missing, damaged, too short or does not fit."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: `tokens` (N,) uint16 or uint32, its tokenizer, and what tokens.json says."""

    tokens: NDArray[np.unsignedinteger[Any]]
    tokenizer: Tokenizer
    meta: dict[str, Any]

    def split(self, val_fraction: float) -> tuple[Ids, Ids]:
        """The training tokens and, from the end of the text, the validation tokens: views, not copies."""
        n_train = int(len(self.tokens) * (1 - val_fraction))
        return self.tokens[:n_train], self.tokens[n_train:]

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
    for name, part in zip(("training", "validation"), corpus.split(val_fraction), strict=True):
        if len(part) < block_size + 1:
            raise CorpusError(
                f"the {name} split of {corpus.meta['source']} has {len(part):,} tokens, expected at least "
                f"block_size + 1 = {block_size + 1}: give more text, or a smaller --block-size"
            )


def tokenize(source: sources.Source, spec: str = "char", unknown: str = "error", progress: Progress = unseen) -> Corpus:
    """Tokenize `source` in memory.

    Args:
      spec: "char" (the vocabulary of this text), "ascii" (line feed and the 95 printable characters), "byte", "gpt2",
        "bpe:SIZE" (learnt from this text), or the path of a tokens.json whose vocabulary to use.
      unknown: "skip" leaves out characters outside the vocabulary and counts them in `meta`.

    Raises:
      UnknownCharacterError: a character is outside the vocabulary and `unknown` is "error".
      UsageError: `spec` names no tokenizer, or one that cannot be had.
    """
    text, skipped = source.text, 0
    match spec:
        case "char":
            tok: Tokenizer = CharTokenizer.train(text)
        case "ascii":
            tok = CharTokenizer("\n" + "".join(map(chr, range(32, 127))))
        case "byte":
            tok = ByteTokenizer()
        case "gpt2":
            tok = gpt2.load()
        case _ if re.fullmatch("bpe:[0-9]{1,7}", spec):
            tok = bpe.train(text, int(spec.removeprefix("bpe:")), progress)
        case _:
            tok = tokenizer_of(Path(spec))
    if unknown == "skip":
        text = tokenizer.without_unknown(tok, text)
        skipped = len(source.text) - len(text)
    dtype = np.uint16 if tok.vocab_size <= 2**16 else np.uint32
    tokens: NDArray[Any] = tok.encode(text, progress).astype(dtype)
    meta = {
        "format": FORMAT,
        "dtype": np.dtype(dtype).name,
        "count": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "source": source.name,
        "origin": source.origin,
        "source_sha256": source.sha256,
        "notes": list(source.notes),
        "skipped_characters": skipped,
        "tokenizer": tok.to_json(),
    }
    return Corpus(tokens, tok, meta)


def save(corpus: Corpus, folder: Path) -> None:
    """Write tokens.bin and tokens.json, each whole or not at all, tokens.json last.

    Raises:
      CorpusError: the folder cannot be written to.
    """
    little_endian = corpus.tokens.astype(corpus.tokens.dtype.newbyteorder("<"), copy=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_atomically(folder / "tokens.bin", little_endian.tobytes())
        disk.write_atomically(folder / "tokens.json", disk.seal(corpus.meta).encode())
    except OSError as error:
        raise CorpusError(f"{folder} cannot be written: {error.strerror}; name another folder: --data-dir") from error


def load(folder: Path) -> Corpus:
    """Memory-map a prepared corpus, its SHA-256 checked.

    Raises:
      CorpusError: a file is missing, damaged or of another format.
    """
    meta = read_meta(folder / "tokens.json")
    path, dtype = folder / "tokens.bin", np.dtype(meta["dtype"]).newbyteorder("<")
    if not path.is_file():
        raise CorpusError(f"{path} is missing; jaxgpt prepare makes it")
    size, expected = path.stat().st_size, meta["count"] * dtype.itemsize
    if size != expected:
        raise CorpusError(
            f"{path} has {size:,} bytes, expected {expected:,} ({meta['count']:,} {meta['dtype']}): "
            "it is damaged; remove the folder and run jaxgpt prepare again"
        )
    digest = disk.sha256(path)
    if digest != meta["sha256"]:
        raise CorpusError(
            f"{path} has SHA-256 {digest}, expected {meta['sha256']}: "
            "it is damaged; remove the folder and run jaxgpt prepare again"
        )
    tokens, tok = np.memmap(path, dtype, mode="r"), tokenizer.from_json(meta["tokenizer"])
    largest = max(int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24))
    if largest >= tok.vocab_size:
        raise CorpusError(
            f"{path} holds the id {largest}, expected ids below {tok.vocab_size}, the size of its vocabulary: "
            "it belongs to another tokens.json; remove the folder and run jaxgpt prepare again"
        )
    return Corpus(tokens, tok, meta)


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
    if meta["format"] != FORMAT or meta["dtype"] not in ("uint16", "uint32") or not 1 <= meta["count"] < 2**63:
        raise ValueError(
            f"it has format {meta['format']}, dtype {meta['dtype']}, count {meta['count']}; expected format "
            f"{FORMAT}, dtype uint16 or uint32 and a count from 1 to 2**63 - 1"
        )
    tokenizer.from_json(meta["tokenizer"])
    return meta


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer that a tokens.json (or the folder that holds one) describes.

    Raises:
      CorpusError: there is none.
    """
    path = path.expanduser()
    if path.is_dir():
        path = path / "tokens.json"
    if not path.is_file():
        raise CorpusError(
            f"no tokenizer {str(path)!r}: expected char, ascii, byte, gpt2, bpe:SIZE such as bpe:4096, "
            "or the path of a tokens.json"
        )
    return tokenizer.from_json(read_meta(path)["tokenizer"])


def folder_of(meta: dict[str, Any], data_dir: Path) -> Path:
    """Where `prepare` puts the corpus that `meta` describes: what differs in ids or vocabulary shares no folder."""
    both = hashlib.sha256(json.dumps([meta["sha256"], meta["tokenizer"]]).encode()).hexdigest()
    return data_dir / f"{meta['source']}-{meta['tokenizer']['kind']}-{both[:8]}"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: the corpus, where it lies, and whether it lay there already."""

    corpus: Corpus
    folder: Path
    reused: bool
    seconds: float


def prepare(
    corpus: str,
    spec: str = "char",
    *,
    unknown: str = "error",
    data_dir: Path = Path("data"),
    block_size: int = 1,
    val_fraction: float = 0.1,
    vocab_size: int = 0,
    column: str = "text",
    progress: Progress = unseen,
) -> Prepared:
    """Tokenize a corpus into a folder of `data_dir`, once; an equal one that lies there is used again.

    Args:
      corpus, column: as in `sources.read`, or a folder that `prepare` made.
      spec, unknown, progress: as in `tokenize`.
      block_size, val_fraction: both splits must hold a window of this size.
      vocab_size: the vocabulary must not be larger than this; 0 for any size.

    Raises:
      SourceError, CorpusError, UnknownCharacterError: before anything is written.
    """
    began = time.perf_counter()
    given = Path(corpus).expanduser()
    if corpus not in sources.NAMED and (given / "tokens.json").is_file():
        found = load(given)
        _require_tokenizer(found, spec, given)
        require_fit(found, block_size, val_fraction, vocab_size)
        return Prepared(found, given, True, time.perf_counter() - began)
    fresh = tokenize(sources.read(corpus, column), spec, unknown, progress)
    require_fit(fresh, block_size, val_fraction, vocab_size)
    folder = folder_of(fresh.meta, data_dir)
    try:
        found = load(folder)
        reused = found.meta == fresh.meta
    except CorpusError:  # missing or damaged: what is in hand takes its place
        reused = False
    if not reused:
        save(fresh, folder)
        found = load(folder)
    return Prepared(found, folder, reused, time.perf_counter() - began)


def _require_tokenizer(corpus: Corpus, spec: str, folder: Path) -> None:
    """Check that a prepared corpus has the tokenizer that was asked for."""
    kind, named = corpus.meta["tokenizer"]["kind"], spec.split(":")[0]
    same = kind == KINDS[named] if named in KINDS else corpus.tokenizer == tokenizer_of(Path(spec))
    if not same:
        raise CorpusError(f"{folder} was prepared with {kind}, but --tokenizer is {spec}: give --tokenizer {folder}")
