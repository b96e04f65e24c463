"""A text, or a mixture of texts, to a prepared corpus: tokenized once, found again, fetched from a URL."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import filelock

from jaxgpt import files
from jaxgpt.cli.corpora import NAMED, cached_folder, folder_of, is_prepared, is_url, local_path, mixture
from jaxgpt.corpus import Corpus, CorpusError, checked_meta, load, mix, read_meta, shards_of, train_size
from jaxgpt.prepare import documents, sources
from jaxgpt.prepare.encode import WaitedError, WorkFolder, encode
from jaxgpt.prepare.sources import SourceError, Text
from jaxgpt.prepare.vocabularies import KINDS, read_tokenizer, tokenizer_for
from jaxgpt.tokenizer import Tokenizer

Progress = Callable[[str, float], None]
"""Shows what is being done, and what share of it is done, from 0 to 1."""


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus, its folder, whether it was there before, and how long it took."""

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
    progress: Progress = lambda what, share: None,
) -> Prepared:
    """Tokenize a corpus into a folder of `data_dir`. One that is there is used again, and nothing is written then.

    While another process prepares the same text, this one waits, and prints so.

    Args:
      corpus, column: as in `sources.open_text`, or a folder that `prepare` made, here or at a URL; or a mixture of
        such, "0.7*a.txt + 0.3*b.txt", whose parts share a tokenizer and have a folder each.
      spec: as in `tokenizer_for`.
      unknown: "skip" leaves out characters outside the vocabulary and counts them in `meta`.
      block_size, val_fraction: both splits must hold a window of this size.
      vocab_size: the vocabulary must not be larger; 0 for any size.

    Raises:
      SourceError, CorpusError, UnknownCharacterError: no tokens stay on disk then, except the first shards of a text of
        more than encode.SHARD tokens, which the next attempt uses.
    """
    began = time.perf_counter()
    fit = partial(require_fit, block_size=block_size, val_fraction=val_fraction, vocab_size=vocab_size)
    named = mixture(corpus)
    texts = [None if _is_prepared(name) else sources.open_text(name, column) for _, name in named]
    new = [text for text in texts if text]
    if column != "text" and new and not any(text.documents for text in new):
        raise SourceError(
            f"--column is {column}, but {corpus} is plain text: only JSON Lines (.jsonl) and Parquet have columns"
        )
    tok = tokenizer_for(spec, new, progress) if new else None
    parts, folder, reused = list[tuple[float, Corpus]](), data_dir, True
    for (share, name), text in zip(named, texts, strict=True):
        if text and tok:
            part, old = _prepare(text, tok, unknown, column, data_dir, fit, progress)
            folder, reused = folder_of(part.meta, data_dir), reused and old
        else:
            folder = fetch(name) if is_url(name) else local_path(name)
            part = load(folder)
            kind, spec_kind = part.meta["tokenizer"]["kind"], KINDS.get(spec.split(":")[0])
            if len(named) == 1 and not (
                kind == spec_kind if spec_kind else part.tokenizer == read_tokenizer(Path(spec))
            ):
                raise CorpusError(
                    f"{folder} was prepared with {kind}, but --tokenizer is {spec}: give --tokenizer {folder}"
                )
            if tok and part.tokenizer != tok:
                raise CorpusError(f"{name} was prepared with another vocabulary than the rest: --tokenizer {name}")
            fit(part.meta, part.tokenizer)
        tok = tok or part.tokenizer
        parts.append((share, part))
    if len(named) == 1:
        return Prepared(parts[0][1], folder, reused, time.perf_counter() - began)
    return Prepared(mix(parts), data_dir, reused, time.perf_counter() - began)


def require_fit(
    meta: dict[str, Any], tok: Tokenizer, block_size: int, val_fraction: float, vocab_size: int = 0
) -> None:
    """Check that both splits hold a window of `block_size` inputs and their targets, and that the vocabulary has at
    most `vocab_size` ids (0: any number).

    Raises:
      CorpusError: they do not.
    """
    if 0 < vocab_size < tok.vocab_size:
        raise CorpusError(
            f"vocab_size is {vocab_size}, expected at least the {tok.vocab_size} ids of {meta['source']}, "
            "or 0 to take those"
        )
    n_train = train_size(meta["count"], val_fraction)
    for name, n in (("training", n_train), ("validation", meta["count"] - n_train)):
        if n < block_size + 1:
            raise CorpusError(
                f"the {name} split of {meta['source']} has {n:,} tokens, expected at least "
                f"block_size + 1 = {block_size + 1}: give more text"
                + (", or a smaller --block-size" if block_size > 1 else "")
            )


def _prepare(
    text: Text,
    tok: Tokenizer,
    unknown: str,
    column: str,
    data_dir: Path,
    fit: Callable[[dict[str, Any], Tokenizer], None],
    progress: Progress,
) -> tuple[Corpus, bool]:
    """The corpus of a text, and whether it was there before."""
    about = json.dumps([text.origin, unknown, column, tok.to_json()])
    work = data_dir / f".{text.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.part"
    while True:
        if found := _find(text, tok, unknown, data_dir, progress):
            fit(found.meta, tok)
            return found, True
        with suppress(WaitedError), WorkFolder(work) as held:
            meta = encode(text, tok, unknown, held, progress)
            fit(meta, tok)
            folder = folder_of(meta, data_dir)
            with suppress(CorpusError):  # missing or damaged: the new one replaces it
                there = load(folder)  # from another process since, or from another text with the same ids
                if (there.meta["sha256"], there.tokenizer) == (meta["sha256"], tok):
                    shutil.rmtree(work, ignore_errors=True)
                    of_text = {name: value for name, value in meta.items() if name not in ("format", "shards")}
                    return Corpus(there.tokens, tok, there.meta | of_text), True
            held.finish(meta, folder)
            return load(folder), False


def _find(text: Text, tok: Tokenizer, unknown: str, data_dir: Path, progress: Progress) -> Corpus | None:
    """The corpus of a text, if it was prepared with this tokenizer and is whole: nothing is locked or written.

    Its origin is where the text was read now; tokens.json keeps the one from which it was prepared.
    """
    plain, candidates = tok.to_json(), list[dict[str, Any]]()
    for path in sorted(data_dir.glob(f"{escape(text.name)}-{plain['kind']}-*/tokens.json")):
        with suppress(CorpusError):
            meta = read_meta(path)
            fits = meta["tokenizer"] == plain and (unknown == "skip" or not meta.get("skipped_characters"))
            if fits and meta["source"] == text.name and folder_of(meta, data_dir) == path.parent:
                candidates.append(meta)
    if not candidates:
        return None
    notes, sha256 = list[str](), hashlib.sha256()
    for piece in text.pieces(notes, partial(progress, "reading")):
        sha256.update(piece.encode("utf-8", "surrogatepass"))
    for meta in candidates:
        if meta["source_sha256"] == sha256.hexdigest():
            with suppress(CorpusError):  # it is damaged
                found = load(folder_of(meta, data_dir))
                return Corpus(found.tokens, tok, found.meta | {"origin": text.origin, "notes": notes})
    return None


def _is_prepared(corpus: str) -> bool:
    """Whether it is a folder that `prepare` made, here or at a URL."""
    if not corpus or corpus in NAMED:
        return False
    with sources.store_errors(corpus):
        if not is_url(corpus):
            return is_prepared(local_path(corpus))
        file = sources.inside(corpus, "tokens.json")  # a server may list nothing, or have an answer for any name
        return file.is_file() and sources.is_ours(file)


def fetch(url: str) -> Path:
    """A copy in the cache of a prepared folder at a URL: each file is fetched once, checked, whole or not there.

    Raises:
      SourceError: it cannot be fetched.
      CorpusError: it differs from its tokens.json.
    """
    with sources.store_errors(url):
        data = sources.inside(url, "tokens.json").read_bytes()
        try:
            meta = checked_meta(files.unseal(data))
            if "parts" in meta:
                raise ValueError("it is that of a mixture in a run, expected that of a prepared folder")
        except ValueError as error:
            raise CorpusError(f"{url}/tokens.json: {error}") from error
        if not (here := cached_folder(folder_of(meta, Path()).name)):
            raise CorpusError(
                f"{url} needs a cache folder for its copy, but there is no home folder: set XDG_CACHE_HOME"
            )
        wanted = {here / shard["file"]: shard["sha256"] for shard in shards_of(meta)}
        wanted[here / "tokens.json"] = hashlib.sha256(data).hexdigest()

        def missing() -> dict[Path, str]:
            return {p: sha256 for p, sha256 in wanted.items() if not p.is_file() or files.sha256(p) != sha256}

        if not missing():
            return here
        here.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(here / ".lock"):  # the processes of a host fetch it together
            for path, sha256 in missing().items():
                partial_file = path.with_name(f".{path.name}.part")
                with sources.inside(url, path.name).open("rb") as source, partial_file.open("wb") as target:
                    shutil.copyfileobj(source, target, documents.PIECE)
                if (found := files.sha256(partial_file)) != sha256:
                    partial_file.unlink()
                    raise CorpusError(f"{url}/{path.name} has SHA-256 {found}, expected {sha256}")
                partial_file.replace(path)
    return here
