"""A text, or a mixture of texts, to a prepared corpus: tokenized once, found again, fetched from a store."""

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxgpt import files as disk
from jaxgpt import gpt2
from jaxgpt.corpus import (
    FORMAT,
    KINDS,
    Corpus,
    CorpusError,
    checked_meta,
    folder_of,
    folders_of,
    load,
    read_meta,
    require_fit,
    save,
    shards_of,
    tokenizer_of,
)
from jaxgpt.prepare import encode, files, sources
from jaxgpt.shards import joined
from jaxgpt.tokenizer import ByteTokenizer, CharTokenizer, Ids, Progress, Tokenizer, unseen

FORM = ("format", "shards")
"""What tokens.json says of its shards: it may differ between folders of the same ids."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: the corpus, where it lies, and whether it lay there already."""

    corpus: Corpus
    folder: Path
    reused: bool
    seconds: float


def prepare_corpus(
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
    """Tokenize a corpus into a folder of `data_dir`, once; an equal one that lies there is used again, and nothing is
    written then. While another process prepares the same text, this one waits, and prints that it does.

    Args:
      corpus, column: as in `sources.open_stream`, or a folder that `prepare` made, here or at a URL; or a mixture of
        such, "0.7*a.txt + 0.3*b.txt", whose parts share a tokenizer and have a folder each.
      spec, unknown, progress: as in `tokenize`.
      block_size, val_fraction: both splits must hold a window of this size.
      vocab_size: the vocabulary must not be larger than this; 0 for any size.

    Raises:
      SourceError, CorpusError, UnknownCharacterError: no tokens stay on disk then, but for shards of a text of
        more than encode.SHARD tokens, which the next attempt finds.
    """
    began = time.perf_counter()
    fit = partial(require_fit, block_size=block_size, val_fraction=val_fraction, vocab_size=vocab_size)
    shares = sources.mixture(corpus)
    streams = [None if _is_prepared(name) else sources.open_stream(name, column) for _, name in shares]
    texts = [stream for stream in streams if stream]
    if column != "text" and texts and not any(stream.documents for stream in texts):
        raise sources.SourceError(
            f"--column is {column}, but {corpus} is plain text: only JSON Lines (.jsonl) and Parquet have columns"
        )
    if len(shares) == 1:
        found, folder, reused = _prepare(corpus, streams[0], spec, None, unknown, data_dir, column, fit, progress)
        return Prepared(found, folder, reused, time.perf_counter() - began)
    tok = tokenizer_for(spec, texts, progress) if texts else load(_prepared_folder(shares[0][1])).tokenizer
    each = [
        _prepare(name, stream, spec, tok, unknown, data_dir, column, fit, progress)
        for (_, name), stream in zip(shares, streams, strict=True)
    ]
    found = mixed([(share, part) for (share, _), (part, _, _) in zip(shares, each, strict=True)])
    return Prepared(found, data_dir, all(reused for _, _, reused in each), time.perf_counter() - began)


def _prepare(
    corpus: str,
    stream: sources.Stream | None,
    spec: str,
    tok: Tokenizer | None,
    unknown: str,
    data_dir: Path,
    column: str,
    fit: Callable[[Corpus], None],
    progress: Progress,
) -> tuple[Corpus, Path, bool]:
    """One corpus, by the tokenizer `tok` or that of `spec`: itself, its folder, and whether it lay there already.

    Without a stream it is a prepared folder."""
    if stream is None:
        folder = _prepared_folder(corpus)
        found = load(folder)
        if tok is None:
            _require_tokenizer(found, spec, folder)
        elif found.tokenizer != tok:
            raise CorpusError(f"{corpus} was prepared with another vocabulary than the rest: --tokenizer {corpus}")
        fit(found)
        return found, folder, True
    tok = tok or tokenizer_for(spec, [stream], progress)
    about = json.dumps([stream.origin, unknown, column, tok.to_json()])
    work = data_dir / f".{stream.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.part"
    while True:
        if there := _find(stream, tok, unknown, data_dir, progress):
            fit(there)
            return there, folder_of(there.meta, data_dir), True
        with suppress(encode.WaitedError):
            return _make(stream, tok, unknown, data_dir, work, fit, progress)


def _find(stream: sources.Stream, tok: Tokenizer, unknown: str, data_dir: Path, progress: Progress) -> Corpus | None:
    """The corpus of a text, if it was prepared with this tokenizer and is whole: nothing is locked or written.

    Its origin is where the text was read now; tokens.json keeps the one from which it was prepared.
    """
    plain, candidates = tok.to_json(), list[dict[str, Any]]()
    for path in sorted(data_dir.glob(f"{escape(stream.name)}-{plain['kind']}-*/tokens.json")):
        with suppress(CorpusError):
            meta = read_meta(path)
            fits = meta["tokenizer"] == plain and (unknown == "skip" or not meta.get("skipped_characters"))
            if fits and meta["source"] == stream.name and folder_of(meta, data_dir) == path.parent:
                candidates.append(meta)
    if not candidates:
        return None
    notes, sha256, read = list[str](), hashlib.sha256(), 0

    def seen(n: int) -> None:
        nonlocal read
        read += n
        progress("reading", min(1.0, read / max(1, stream.size)))

    for piece in stream.pieces(notes, seen):
        sha256.update(piece.encode("utf-8", "surrogatepass"))
    for meta in candidates:
        if meta["source_sha256"] == sha256.hexdigest():
            with suppress(CorpusError):  # it is damaged
                found = load(folder_of(meta, data_dir))
                return Corpus(found.tokens, tok, found.meta | {"origin": stream.origin, "notes": notes})
    return None


def _make(
    stream: sources.Stream,
    tok: Tokenizer,
    unknown: str,
    data_dir: Path,
    work: Path,
    fit: Callable[[Corpus], None],
    progress: Progress,
) -> tuple[Corpus, Path, bool]:
    """The corpus of a text, encoded; as `_prepare`."""
    with encode.encode(stream, tok, unknown, work, progress) as encoded:
        meta = _meta(stream, tok, encoded)
        done: list[Ids] = [np.memmap(work / shard["file"], encoded.rest.dtype, mode="r") for shard in encoded.shards]
        fresh = Corpus(joined(done or [encoded.rest]), tok, meta)
        fit(fresh)
        folder = folder_of(meta, data_dir)
        found = None
        with suppress(CorpusError):  # missing or damaged: what is in hand takes its place
            there = load(folder)  # from another process meanwhile, or from another text that gives the same ids
            if (there.meta["sha256"], there.tokenizer) == (meta["sha256"], tok):
                found = Corpus(there.tokens, tok, there.meta | {k: v for k, v in meta.items() if k not in FORM})
        if found is None and encoded.shards:
            _finish(work, meta, folder)
        elif found is None:
            save(fresh, folder)
        shutil.rmtree(work, ignore_errors=True)
    return found or load(folder), folder, found is not None


def ready(corpus: str, meta: dict[str, Any], data_dir: Path, verified: bool = False) -> Corpus | None:
    """The corpus that `meta` describes, of a text or of a mixture, as it lies prepared; None if not all of it does.

    Args:
      corpus: as in `prepare`; each part lies in its folder of `data_dir`, or is a folder that `corpus` names.
      verified: as in `corpus.load`, of the folders in `data_dir`; what is named may be another copy on each machine.

    Raises:
      SourceError, CorpusError: it lies there, but cannot be had, or is damaged.
    """
    shares, folders = sources.mixture(corpus), folders_of(meta, data_dir)
    if len(shares) != len(folders):
        return None
    parts = []
    for (share, name), folder in zip(shares, folders, strict=True):
        if (folder / "tokens.json").is_file():
            part = load(folder, verified)
        elif _is_prepared(name):
            part = load(_prepared_folder(name))
        else:
            return None
        if folder_of(part.meta, data_dir) != folder:  # another text, or another tokenizer
            return None
        parts.append((share, part))
    found = mixed(parts) if "parts" in meta else parts[0][1]
    return found if found.meta["sha256"] == meta["sha256"] else None


def _finish(work: Path, meta: dict[str, Any], folder: Path) -> None:
    """Make the folder of shards that were written on the way the corpus's own: tokens.json, name."""
    aside = work.with_suffix(".old")
    try:
        disk.write_atomically(work / "tokens.json", disk.seal(meta).encode())
        (work / encode.PROGRESS).unlink(missing_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():  # it was damaged, or another process has put it there since
            folder.rename(aside)
        work.rename(folder)
        (folder / encode.LOCK).unlink()  # only now, so that nobody takes it between
        disk.sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise CorpusError(f"{folder} cannot be written: {error.strerror}; name another folder: --data-dir") from error


def mixed(parts: Sequence[tuple[float, Corpus]]) -> Corpus:
    """Corpora of one tokenizer as one, each with its weight in training: `Corpus.parts`."""
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


def _is_prepared(corpus: str) -> bool:
    """Whether it is a folder that `prepare` made, here or at a URL, and not one of texts with some tokens.json."""
    if not corpus or corpus in sources.NAMED:
        return False
    with sources.reached(corpus):
        file = sources.inside(corpus, "tokens.json")
        if not file.is_file():
            return False
        if sources.is_url(corpus):  # whose server may list nothing, or have an answer for any name
            return sources.is_ours(file)
        others = [path.name for path in file.parent.iterdir() if path.name != "tokens.json"]
        return not others or any(re.fullmatch(r"tokens(-\d{5})?\.bin", name) for name in others)


def _prepared_folder(corpus: str) -> Path:
    """The folder itself, or its copy on this machine."""
    return fetched(corpus) if sources.is_url(corpus) else sources.place(corpus)


def fetched(url: str) -> Path:
    """A prepared folder at a URL as a copy in the cache: each file fetched once, checked, whole or not there.

    Raises:
      SourceError: it cannot be fetched.
      CorpusError: it is not what its tokens.json says.
    """
    with sources.reached(url):
        data = sources.inside(url, "tokens.json").read_bytes()
        try:
            shards = shards_of(checked_meta(disk.unseal(data)))
        except ValueError as error:
            raise CorpusError(f"{url}/tokens.json: {error}") from error
        if not (cache := sources.cache_dir()):
            raise CorpusError(
                f"{url} needs a cache folder for its copy, but there is no home folder: set XDG_CACHE_HOME"
            )
        here = cache / "corpora" / hashlib.sha256(data).hexdigest()[:16]
        missing = [shard for shard in shards if not _is_whole(here / shard["file"], shard["sha256"])]
        if not missing and _is_whole(here / "tokens.json", hashlib.sha256(data).hexdigest()):
            return here
        here.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(here / ".lock"):  # the processes of a host come for it together
            for shard in missing:
                path = here / shard["file"]
                if _is_whole(path, shard["sha256"]):
                    continue
                partial_file = path.with_name(f".{path.name}.part")
                with sources.inside(url, shard["file"]).open("rb") as source, partial_file.open("wb") as target:
                    shutil.copyfileobj(source, target, files.PIECE)
                if (found := disk.sha256(partial_file)) != shard["sha256"]:
                    partial_file.unlink()
                    raise CorpusError(f"{url}/{shard['file']} has SHA-256 {found}, expected {shard['sha256']}")
                partial_file.replace(path)
            disk.write_atomically(here / "tokens.json", data)
    return here


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and disk.sha256(path) == sha256


def _require_tokenizer(corpus: Corpus, spec: str, folder: Path) -> None:
    """Check that a prepared corpus has the tokenizer that was asked for."""
    kind, named = corpus.meta["tokenizer"]["kind"], spec.split(":")[0]
    same = kind == KINDS[named] if named in KINDS else corpus.tokenizer == tokenizer_of(Path(spec))
    if not same:
        raise CorpusError(f"{folder} was prepared with {kind}, but --tokenizer is {spec}: give --tokenizer {folder}")


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
    tok = tokenizer_for(spec, [source.stream()], progress)
    with (
        tempfile.TemporaryDirectory(prefix="jaxgpt-") as folder,
        encode.encode(source.stream(), tok, unknown, Path(folder) / "work", progress) as found,
    ):
        shards = [np.fromfile(Path(folder) / "work" / shard["file"], found.rest.dtype) for shard in found.shards]
    return Corpus(np.concatenate([*shards, found.rest]), tok, _meta(source.stream(), tok, found))


def tokenizer_for(spec: str, streams: Sequence[sources.Stream], progress: Progress = unseen) -> Tokenizer:
    """The tokenizer that `spec` names, as in `tokenize`; "char" and "bpe:SIZE" are learnt from all of the texts.

    Raises:
      UsageError: `spec` names no tokenizer, or one that cannot be had.
    """

    def text() -> Iterator[str]:
        read, size = 0, max(1, sum(stream.size for stream in streams))

        def seen(n: int) -> None:
            nonlocal read
            read += n
            progress("learning a vocabulary", min(1.0, read / size))

        for i, stream in enumerate(streams):
            yield "\n" * bool(i and spec != "char")
            yield from stream.pieces([], seen)

    match spec:
        case "ascii":
            return CharTokenizer("\n" + "".join(map(chr, range(32, 127))))
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return gpt2.load()
        case _ if spec == "char" or re.fullmatch("bpe:[0-9]{1,7}", spec):
            return encode.learn(text, spec)
    return tokenizer_of(Path(spec))


def _meta(stream: sources.Stream, tok: Tokenizer, found: encode.Encoded) -> dict[str, Any]:
    """What tokens.json says of the ids of a text."""
    only = {"file": "tokens-00000.bin", "count": len(found.rest), "sha256": found.sha256}
    return {
        "format": FORMAT,
        "dtype": found.rest.dtype.name,
        "count": sum(shard["count"] for shard in found.shards) + len(found.rest),
        "sha256": found.sha256,
        "shards": found.shards or [only],
        "source": stream.name,
        "origin": stream.origin,
        "source_sha256": found.source_sha256,
        "notes": found.notes,
        "skipped_characters": found.skipped,
        "tokenizer": tok.to_json(),
    }
