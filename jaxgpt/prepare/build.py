"""A text, or a mixture of texts, to a prepared corpus: tokenized once, found again, fetched from a URL."""

import hashlib
import json
import shutil
import sys
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
from jaxgpt.corpus import Corpus, CorpusError, load, mix, read_meta, shards_of, train_size
from jaxgpt.prepare import documents, sources
from jaxgpt.prepare.encode import LOCK, PROGRESS, InterruptionError, encode
from jaxgpt.prepare.sources import Text
from jaxgpt.prepare.vocabularies import KINDS, read_tokenizer, tokenizer_for
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError

Progress = Callable[[str, float], None]
"""Shows what is being done, and what share of it is done, from 0 to 1."""


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus, its folder (of a mixture the folder around), and whether it was there before."""

    corpus: Corpus
    folder: Path
    reused: bool


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
      SourceError, CorpusError, UnknownCharacterError: tokens stay on disk only where the same call can continue.
    """
    fit = partial(require_fit, block_size=block_size, val_fraction=val_fraction, vocab_size=vocab_size)
    named = mixture(corpus)
    folders = {name: folder for _, name in named if (folder := _prepared_folder(name))}
    there = {name: load(folder) for name, folder in folders.items()}
    texts = {name: sources.open_text(name, column) for _, name in named if name not in there}
    if column != "text" and texts and not any(text.has_columns for text in texts.values()):
        raise sources.SourceError(
            f"--column is {column}, but {corpus} is plain text: only JSON Lines (.jsonl) and Parquet have columns"
        )
    if texts:
        tok = tokenizer_for(spec, list(texts.values()), progress)
    else:
        name, first = next(iter(there.items()))
        tok, kind = first.tokenizer, KINDS.get(spec.split(":")[0])
        if kind != tok.to_json()["kind"] if kind else tok != read_tokenizer(Path(spec)):
            found = first.meta["tokenizer"]["kind"]
            raise CorpusError(f"{name} was prepared with {found}, but --tokenizer is {spec}: give --tokenizer {name}")
    for name, part in there.items():
        if part.tokenizer != tok:
            raise CorpusError(f"{name} was prepared with another vocabulary than the rest: --tokenizer {name}")
        fit(part.meta, tok)
    made = {name: _prepare(text, tok, unknown, column, data_dir, fit, progress) for name, text in texts.items()}
    parts = there | {name: part for name, (part, _) in made.items()}
    reused = all(old for _, old in made.values())
    if len(named) > 1:
        return Prepared(mix([(share, parts[name]) for share, name in named]), data_dir, reused)
    (whole,) = parts.values()
    return Prepared(whole, folders.get(corpus) or folder_of(whole.meta, data_dir), reused)


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
                f"block_size + 1 = {block_size + 1}: give more text, or a smaller --block-size"
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
    new = [folder for folder in (work, *work.parents) if not folder.exists()]
    while not (found := _find(text, tok, unknown, data_dir, progress)):
        lock = filelock.FileLock(work / LOCK, timeout=0)
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            meta = encode(text, tok, unknown, work, progress)
            fit(meta, tok)
            files.write_atomically(work / "tokens.json", files.seal(meta).encode())
            folder = folder_of(meta, data_dir)
            _rename(work, folder)
            return load(folder), False
        except InterruptionError as error:
            print(f"jaxgpt: {error}: its preparation starts anew", file=sys.stderr)
            shutil.rmtree(work)
        except filelock.Timeout:
            print(f"jaxgpt: another process is preparing this text in {work}; waiting for it", file=sys.stderr)
            with suppress(OSError):  # the folder has its final name by now
                lock.acquire(timeout=-1, poll_interval=0.2)
                if not (work / PROGRESS).exists():  # made by filelock
                    shutil.rmtree(work)
        except BaseException as error:
            if lock.is_locked and (work / PROGRESS).exists() and not isinstance(error, UnknownCharacterError):
                print(f"jaxgpt: the same command will continue from {work}", file=sys.stderr)
            elif lock.is_locked:
                shutil.rmtree(work, ignore_errors=True)  # it may have its final name by now
            with suppress(OSError):
                for empty in filter(Path.exists, new):
                    empty.rmdir()
            if not isinstance(error, OSError):
                raise
            problem = f"{data_dir} cannot be written: {error.strerror}"
            raise CorpusError(f"{problem}; name another folder: --data-dir") from error
        finally:
            lock.release()
    fit(found.meta, tok)
    return found, True


def _rename(work: Path, folder: Path) -> None:
    """Give a folder its final name. One that is there is damaged, or is of another text with the same ids."""
    aside = work.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    work.rename(folder)
    for name in (PROGRESS, LOCK):  # after the rename, so that no other process takes the lock before
        (folder / name).unlink(missing_ok=True)
    files.sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _find(text: Text, tok: Tokenizer, unknown: str, data_dir: Path, progress: Progress) -> Corpus | None:
    """The corpus of a text, if it was prepared with this tokenizer and is whole: nothing is locked or written."""
    plain, candidates = tok.to_json(), list[dict[str, Any]]()
    for path in sorted(data_dir.glob(f"{escape(text.name)}-{plain['kind']}-*/tokens.json")):
        with suppress(CorpusError):
            meta = read_meta(path)
            fits = meta["tokenizer"] == plain and (unknown == "skip" or not meta.get("skipped_characters"))
            if fits and meta["source"] == text.name and folder_of(meta, data_dir) == path.parent:
                candidates.append(meta)
    if not candidates:
        return None
    sha256 = hashlib.sha256()
    for piece in () if text.version else text.pieces(partial(progress, "reading")):
        sha256.update(piece.encode("utf-8", "surrogatepass"))
    for meta in candidates:
        if meta["source_sha256"] == (text.version or sha256.hexdigest()):
            with suppress(CorpusError):  # it is damaged
                return load(folder_of(meta, data_dir))
    return None


def _prepared_folder(corpus: str) -> Path | None:
    """The folder of a corpus that is prepared already, here or, as a copy in the cache, at a URL."""
    with sources.store_errors(corpus):
        if not corpus or corpus in NAMED or not is_prepared(sources.path_of(corpus)):
            return None
    return fetch(corpus) if is_url(corpus) else local_path(corpus)


def fetch(url: str) -> Path:
    """A copy in the cache of a prepared folder at a URL: each file is fetched once, checked, whole or not there.

    Raises:
      SourceError: it cannot be fetched.
      CorpusError: it differs from its tokens.json.
    """
    with sources.store_errors(url):
        store = sources.path_of(url)
        meta = read_meta(store / "tokens.json")
        if "parts" in meta:
            raise CorpusError(f"{store / 'tokens.json'}: it is that of a mixture in a run, not of a prepared folder")
        if not (here := cached_folder(folder_of(meta, Path()).name)):
            raise CorpusError(f"{url} needs a cache folder for its copy, but there is none: set XDG_CACHE_HOME")
        sealed = files.seal(meta).encode()

        def is_here(name: str, sha256: str) -> bool:
            return (here / name).is_file() and files.sha256(here / name) == sha256

        missing = [shard for shard in shards_of(meta) if not is_here(shard["file"], shard["sha256"])]
        if not missing and is_here("tokens.json", hashlib.sha256(sealed).hexdigest()):
            return here
        here.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(here / LOCK):  # the processes of a host fetch it together
            for shard in missing:
                path, copy = here / shard["file"], here / f".{shard['file']}.part"
                if is_here(path.name, shard["sha256"]):  # by another process meanwhile
                    continue
                with (store / path.name).open("rb") as source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target, documents.PIECE)
                if (found := files.sha256(copy)) != shard["sha256"]:
                    copy.unlink()
                    raise CorpusError(f"{store / path.name} has SHA-256 {found}, expected {shard['sha256']}")
                copy.replace(path)
            files.write_atomically(here / "tokens.json", sealed)
    return here
