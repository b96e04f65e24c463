"""Prepare corpora: tokenize a text or a mixture once, and find or fetch what is prepared already."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import filelock

from jaxgpt import files
from jaxgpt.cli import places
from jaxgpt.cli.corpora import NAMED, cached_folder, folder_of, is_prepared, is_url, mixture
from jaxgpt.cli.places import local_path
from jaxgpt.corpus import Corpus, CorpusError, load, mix, read_meta, train_size
from jaxgpt.display.text import count
from jaxgpt.prepare import documents, sources
from jaxgpt.prepare.encode import LOCK, PROGRESS, InterruptionError, encode
from jaxgpt.prepare.sources import Progress, Text
from jaxgpt.prepare.vocabularies import accepts, tokenizer_for
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError


class Prepared(NamedTuple):
    """A prepared corpus, its folder (of a mixture `data_dir`), and whether it was prepared before."""

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
    """Tokenize a corpus into a folder of `data_dir`, or reuse it; wait if another process is preparing the same text.

    Args:
      corpus, column: as in `sources.open_text`; or a prepared folder, local or at a URL; or a mixture of these,
        "0.7*a.txt + 0.3*b.txt", with one tokenizer and a folder for each.
      spec: as in `tokenizer_for`.
      unknown: "skip" drops characters outside the vocabulary and counts them in `meta`.
      block_size, val_fraction: both splits must hold a window of this size.
      vocab_size: upper limit of the vocabulary; 0 for no limit.

    Raises:
      SourceError, CorpusError, UnknownCharacterError: tokens stay on disk only if the same call can continue.
    """
    names = mixture(corpus)
    parts = {name: part for _, name in names if (part := _already_prepared(name))}
    opened = {name: sources.open_text(name, column) for _, name in names if name not in parts}
    texts = {name: replace(text, progress=progress) for name, text in opened.items()}
    paths = (sources.path_of(path) for text in texts.values() for path in text.readers)
    if column != "text" and texts and not any(documents.holds_documents(path, column) for path in paths):
        raise sources.SourceError(
            f"--column is {column}, but {corpus} is plain text: only JSON Lines (.jsonl) and Parquet have columns"
        )
    tok = tokenizer_for(spec, texts.values()) if texts else next(iter(parts.values())).corpus.tokenizer
    fit = partial(_require_fit, block_size=block_size, val_fraction=val_fraction)
    for name, part in parts.items():
        own, (other, first) = part.corpus.tokenizer, next(iter(parts.items()))
        if own != first.corpus.tokenizer:
            fix = f"prepare its text with --tokenizer {quote(str(first.folder))}"
            raise CorpusError(f"{name} was prepared with another vocabulary than {other}: {fix}")
        if own != tok or not (texts or accepts(spec, own)):
            found, fix = f"{own.to_json()['kind']} ({own.vocab_size:,} ids)", quote(str(part.folder))
            problem = f"and --tokenizer {spec} is another vocabulary here: give --tokenizer {fix}"
            raise CorpusError(f"{name} was prepared with {found}, {problem}")
        fit(part.corpus.meta)
    if 0 < vocab_size < tok.vocab_size:
        raise CorpusError(
            f"vocab_size is {vocab_size}, expected at least the {tok.vocab_size} ids of {corpus}, or 0 to take those; "
            "an imported model needs a --tokenizer of fewer ids"
        )
    for name, text in texts.items():
        parts[name] = _prepare(text, tok, unknown, column, data_dir, fit)
    if len(names) == 1:
        return parts[corpus]
    whole = mix([(share, parts[name].corpus) for share, name in names])
    return Prepared(whole, data_dir, all(part.reused for part in parts.values()))


def _require_fit(meta: dict[str, Any], block_size: int, val_fraction: float) -> None:
    """Raise a CorpusError unless both splits hold a window of `block_size` inputs and their targets."""
    n_train = train_size(meta["count"], val_fraction)
    for name, n in (("training", n_train), ("validation", meta["count"] - n_train)):
        if n < block_size + 1:
            raise CorpusError(
                f"the {name} split of {meta['source']} has {count(n, 'token')}, expected at least "
                f"block_size + 1 = {block_size + 1}: give more text" + ", or a smaller --block-size" * (block_size > 1)
            )


def _prepare(
    text: Text, tok: Tokenizer, unknown: str, column: str, data_dir: Path, fit: Callable[[dict[str, Any]], None]
) -> Prepared:
    """Find the corpus of a text in `data_dir`, or encode it there."""
    about = json.dumps([text.origin, unknown, column, tok.to_json()])
    work = data_dir / f".{text.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.part"
    new = [folder for folder in (work, *work.parents) if not folder.exists()]
    while not (found := _find(text, tok, unknown, data_dir)):
        lock = filelock.FileLock(work / LOCK, timeout=0)
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            meta = encode(text, tok, unknown, work)
            fit(meta)
            files.write_atomically(work / "tokens.json", files.seal(meta).encode())
            folder = folder_of(meta, data_dir)
            _rename(work, folder)
            return Prepared(load(folder), folder, False)
        except InterruptionError as error:
            print(f"jaxgpt: {error}: its preparation starts over", file=sys.stderr)
            shutil.rmtree(work)
        except filelock.Timeout:
            print(f"jaxgpt: another process is preparing this text in {work}; waiting for it", file=sys.stderr)
            with suppress(OSError):  # the folder may have its final name by now
                lock.acquire(timeout=-1, poll_interval=0.2)
                if not (work / PROGRESS).exists():  # then filelock made the folder
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
    fit(found.corpus.meta)
    return found


def _rename(work: Path, folder: Path) -> None:
    """Give a finished folder its final name. An older one of it is damaged, or of another text with the same ids."""
    aside = work.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    work.rename(folder)
    for name in (PROGRESS, LOCK):  # after the rename, so that no other process takes the lock before it
        (folder / name).unlink(missing_ok=True)
    files.sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _find(text: Text, tok: Tokenizer, unknown: str, data_dir: Path) -> Prepared | None:
    """The corpus of a text if it was prepared with this tokenizer and is intact. Locks and writes nothing."""
    plain, sha256 = tok.to_json(), text.version
    for path in sorted(data_dir.glob(f"{escape(text.name)}-{plain['kind']}-*/tokens.json")):
        with suppress(CorpusError):  # it is damaged
            meta = read_meta(path)
            same = meta["tokenizer"] == plain and (unknown == "skip" or not meta.get("skipped_characters"))
            if same and meta["source"] == text.name and folder_of(meta, data_dir) == path.parent:
                sha256 = sha256 or text.sha256()
                if meta["source_sha256"] == sha256:
                    return Prepared(load(path.parent), path.parent, True)
    return None


def _already_prepared(corpus: str) -> Prepared | None:
    """The corpus of a prepared folder, local or at a URL; None if `corpus` is something else."""
    with sources.store_errors(corpus):
        if not corpus or corpus in NAMED or not is_prepared(sources.path_of(corpus)):
            return None
    if is_url(corpus):
        return _fetch(corpus)
    return Prepared(load(local_path(corpus)), local_path(corpus), True)


def _fetch(url: str) -> Prepared:
    """Copy a prepared folder at a URL into the cache: each file once, and only if its SHA-256 is right."""
    with sources.store_errors(url, places.cache_dir(), "XDG_CACHE_HOME"):
        store: Any = sources.path_of(url)
        meta = read_meta(store / "tokens.json")
        if "parts" in meta:
            raise CorpusError(
                f"{store / 'tokens.json'}: it is of a mixture in a run, expected one of a prepared folder"
            )
        if not (here := cached_folder(folder_of(meta, Path()).name)):
            raise CorpusError(f"{url} needs a cache folder for its copy, but there is none: set XDG_CACHE_HOME")
        with suppress(CorpusError):  # it is not there yet, or is damaged
            if (kept := load(here)).meta == meta:
                return Prepared(kept, here, True)
        here.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(here / LOCK):  # the processes of a host may fetch it at the same time
            for shard in meta["shards"]:
                path, target = store / shard["file"], here / shard["file"]
                if target.is_file() and files.sha256(target) == shard["sha256"]:
                    continue
                copy = here / f".{shard['file']}.part"
                try:
                    store.fs.get_file(path.path, copy)
                    if (found := files.sha256(copy)) != shard["sha256"]:
                        raise CorpusError(f"{path} has SHA-256 {found}, expected {shard['sha256']}")
                    copy.replace(target)
                finally:
                    copy.unlink(missing_ok=True)
            files.write_atomically(here / "tokens.json", files.seal(meta).encode())
    return Prepared(load(here), here, True)
