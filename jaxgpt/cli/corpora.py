"""Names of corpora: what they mean, and the folder of a prepared corpus."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.cli import places
from jaxgpt.cli.places import local_path
from jaxgpt.corpus import Corpus, CorpusError, load, mix

HUB = {
    "fineweb": "hf://datasets/HuggingFaceFW/fineweb/sample/10BT",
    "fineweb-edu": "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT",
    "openwebtext": "hf://datasets/Skylion007/openwebtext",
}
"""Short names of datasets on the Hugging Face Hub, whose text is in the column `text`."""
NAMED = ("python-docs", "python-stdlib", "shakespeare", *HUB)
"""All texts that `prepare` knows by name."""


def find_prepared(corpus: str, meta: dict[str, Any], data_dir: Path, verified: bool = False) -> Corpus | None:
    """The corpus or mixture that `meta` describes, if all of it is prepared on this machine.

    Args:
      corpus: as in `prepare_corpus`. Each part is in its folder of `data_dir`, or is a prepared folder itself, or was
        fetched into the cache.
      verified: as in `load`, for folders in `data_dir`.

    Raises:
      CorpusError: a folder is damaged.
    """
    parts, names, folders = list[tuple[float, Corpus]](), mixture(corpus), folders_of(meta, data_dir)
    for (share, name), wanted in zip(names, folders, strict=False):
        for folder in (wanted, local_path(name), cached_folder(wanted.name)):
            if folder and is_prepared(folder):
                part = load(folder, verified and folder == wanted)
                if folder_of(part.meta, data_dir) == wanted:
                    parts.append((share, part))
                    break
    if not len(parts) == len(names) == len(folders):
        return None
    whole = mix(parts) if "parts" in meta else parts[0][1]
    return whole if whole.meta["sha256"] == meta["sha256"] else None


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` made a folder: it has a tokens.json, but not among texts. At a URL the tokens.json is enough,
    because a server may not list files."""
    if not is_tokens_json(folder / "tokens.json"):
        return False
    others = [] if is_url(str(folder)) else [path.name for path in folder.iterdir() if path.name != "tokens.json"]
    return not others or any(re.fullmatch(r"tokens-\d{5}\.bin", name) for name in others)


def is_tokens_json(file: Path) -> bool:
    """Whether `file` begins as a tokens.json of `prepare`. Its name is not enough: a server may answer any name."""
    return begins_with(file, b'{\n  "format": ')


def begins_with(file: Path, begin: bytes) -> bool:
    """Whether there is such a file, and it begins with these bytes."""
    if not file.is_file():
        return False
    with file.open("rb") as found:
        return found.read(len(begin)) == begin


def folder_of(meta: dict[str, Any], data_dir: Path) -> Path:
    """The folder of the corpus that `meta` describes. Its name depends on the ids and the vocabulary."""
    both = hashlib.sha256(json.dumps([meta["sha256"], meta["tokenizer"]]).encode()).hexdigest()
    return data_dir / f"{meta['source']}-{meta['tokenizer']['kind']}-{both[:8]}"


def folders_of(meta: dict[str, Any], data_dir: Path) -> list[Path]:
    """The folder of each part of a mixture, or the one folder of another corpus."""
    return [folder_of(part | {"tokenizer": meta["tokenizer"]}, data_dir) for part in meta.get("parts", [meta])]


def cached_folder(name: str) -> Path | None:
    """The copy in the cache of a prepared folder at a URL; `name` is that of `folder_of`."""
    cache = places.cache_dir()
    return cache / "corpora" / name if cache else None


def mixture(corpus: str) -> list[tuple[float, str]]:
    """The parts of a mixture with their weights; any other corpus is its only part.

    >>> mixture("0.7*wiki.jsonl + 0.3*code")
    [(0.7, 'wiki.jsonl'), (0.3, 'code')]
    >>> mixture("notes.txt")
    [(1.0, 'notes.txt')]
    """
    weight = r"[0-9]*\.?[0-9]+"
    names = re.split(rf" \+ (?=\s*{weight}\*)", corpus)
    parts = [re.fullmatch(rf"({weight})\*(\S.*)", name.strip()) for name in names]
    found = [(float(part[1]), part[2]) for part in parts if part]
    if len(found) < 2 or len(found) < len(parts):
        return [(1.0, corpus)]
    if not all(share > 0 for share, _ in found) or len({absolute(part) for _, part in found}) < len(found):
        raise CorpusError(f"{corpus!r}: expected parts that differ, each with a weight above 0")
    if (least := min(share for share, _ in found) / sum(share for share, _ in found)) < 1e-3:
        raise CorpusError(f"{corpus!r}: the least weight is {least:.6g} of all, expected a thousandth or more")
    return found


def absolute(corpus: str) -> str:
    """`corpus` with absolute paths, which are valid in any working directory."""
    found = mixture(corpus)
    if len(found) > 1:
        shares = (np.format_float_positional(share, trim="-") for share, _ in found)
        return " + ".join(f"{share}*{absolute(part)}" for share, (_, part) in zip(shares, found, strict=True))
    if corpus in NAMED or is_url(corpus):
        return corpus
    path = local_path(corpus)
    return str(path.absolute() if path.is_fifo() else path.resolve())  # /dev/stdin, not the pipe it links to


def is_url(corpus: str) -> bool:
    """Whether a corpus is at a URL, such as gs://bucket/texts."""
    return "://" in corpus
