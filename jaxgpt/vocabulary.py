"""Read the tokenizer of a tokens.json, of GPT-2's vocabulary files or of a Hugging Face folder."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxgpt import tokenizer
from jaxgpt.config import shown
from jaxgpt.corpus import CorpusError, read_meta
from jaxgpt.tokenizer import BPETokenizer, Tokenizer

MERGES, VOCABULARY = ("vocab.bpe", "merges.txt"), ("encoder.json", "vocab.json")
"""The names of the same file at OpenAI and at Hugging Face."""
FILES = ("tokenizer.json", *MERGES, *VOCABULARY)
"""Files of a Hugging Face folder that may hold a byte-level BPE."""
OTHER_FILES = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Files with a WordPiece or SentencePiece vocabulary, which is not supported."""

Parts = tuple[dict[str, Any], list[Any], list[str]]
"""A vocabulary as files have it: the id of each token, pairs of tokens to merge in order, names of special tokens."""


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokens.json or of the folder that holds it, or of a Hugging Face folder.

    Raises:
      CorpusError: there is none, or it cannot be used.
    """
    path = Path(os.path.expanduser(path))
    folder = path if path.is_dir() else path.parent
    if path.name in FILES or (path.is_dir() and has_tokenizer(path) and not (path / "tokens.json").is_file()):
        try:
            return read_folder(folder)
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
    """Whether a folder holds a vocabulary of its own, also one that `read_tokenizer` refuses."""
    return any((folder / name).is_file() for name in ("tokens.json", *FILES, *OTHER_FILES))


def read_folder(folder: Path) -> BPETokenizer:
    """The tokenizer of a Hugging Face folder, from its tokenizer.json or else from its vocab.json and merges.txt.

    Raises:
      ValueError: a file is damaged or missing; or text would get other ids than there: the vocabulary is not a
        byte-level BPE with GPT-2's split pattern, or text is changed before it is split.
      OSError: a file cannot be read.
    """
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and _json_object(settings).get("add_prefix_space"):
        raise ValueError("add_prefix_space is true, expected false")
    if (folder / "tokenizer.json").is_file():
        parts = _parse_tokenizer_json(_json_object(folder / "tokenizer.json"))
    else:
        merges, vocabulary = find_file(MERGES, [folder]), find_file(VOCABULARY, [folder])
        if not merges or not vocabulary:
            raise ValueError("expected tokenizer.json, or vocab.json and merges.txt, of a byte-level BPE")
        added = folder / "added_tokens.json"
        more = _json_object(added) if added.is_file() else {}
        parts = _parse_two_files(merges.read_text("utf-8-sig"), _json_object(vocabulary), more)
    found = _assemble(*parts)
    _require_reachable_merges(found, parts[1])
    return found


def parse(merges: str, vocabulary: str | bytes) -> BPETokenizer:
    """The tokenizer of a vocab.bpe (a line with the version, then a merge a line) and an encoder.json (token to id).

    Raises:
      ValueError: the files are something else, or do not agree.
    """
    return _assemble(*_parse_two_files(merges, _parse_object(vocabulary, "the vocabulary"), {}))


def find_file(names: tuple[str, ...], folders: list[Path]) -> Path | None:
    """The first file of one of these names in one of the folders."""
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def byte_of_letter() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes in GPT-2's files (bytes_to_unicode of its encoder.py)."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _parse_two_files(merges: str, ids: dict[str, Any], added: dict[str, Any]) -> Parts:
    """Special tokens are those in brackets, such as <|endoftext|>, that are not the result of a merge."""
    lines = merges.splitlines()
    pairs = [line.split(" ") for line in lines[bool(lines and lines[0].startswith("#version")) :]]
    ids, merged = ids | added, set(map("".join, pairs))
    return ids, pairs, [word for word in ids if re.fullmatch(r"<[^<>]+>|\[[^][]+\]", word) and word not in merged]


def _parse_tokenizer_json(tree: dict[str, Any]) -> Parts:
    """The format of Hugging Face's tokenizers library."""
    model, split, added = tree.get("model"), tree.get("pre_tokenizer"), tree.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(split, dict) or not isinstance(added, list):
        raise ValueError("expected a model, a pre_tokenizer and added_tokens")
    for name, value, *allowed in (
        ("the model's type", model.get("type", "BPE"), "BPE"),
        ("the model's dropout", model.get("dropout"), None, 0),
        ("the model's continuing_subword_prefix", model.get("continuing_subword_prefix"), None, ""),
        ("the model's end_of_word_suffix", model.get("end_of_word_suffix"), None, ""),
        ("the normalizer", tree.get("normalizer"), None),
        ("the pre_tokenizer's type", split.get("type"), "ByteLevel"),
        ("the pre_tokenizer's add_prefix_space", split.get("add_prefix_space", True), False),
        ("the pre_tokenizer's use_regex", split.get("use_regex", True), True),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {shown(value)}, expected {allowed[0]!r}")
    special = {}
    for token in added:
        match token:
            case {"content": str(word), "id": int(i), "special": True}:
                special[word] = i
            case _:
                raise ValueError(f"added token {shown(token)}, expected content, an id and special true")
    ids, merges = model.get("vocab"), model.get("merges")
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ValueError("the model has no vocab or no merges")
    return ids | special, [pair.split(" ") if isinstance(pair, str) else pair for pair in merges], list(special)


def _assemble(ids: dict[str, Any], merges: list[Any], special: list[str]) -> BPETokenizer:
    """The tokenizer of the parts of a vocabulary.

    Raises:
      ValueError: they do not agree. Expected are ids from 0 without gaps, the 256 bytes before the merges, and special
        tokens before or after all these.
    """
    byte_of = byte_of_letter()
    for pair in merges:
        match pair:
            case [str(), str()]:
                continue
        raise ValueError(f"merge {shown(pair)}, expected two tokens")
    if any(type(i) is not int for i in ids.values()):
        raise ValueError("the vocabulary is not a JSON object of token to id")
    words = sorted(ids, key=ids.__getitem__)
    first = next((i for i, word in enumerate(words) if word not in special), len(words))
    last = first + 256 + len(merges)
    if (
        sorted(ids.values()) != list(range(len(ids)))
        or words[first + 256 : last] != list(map("".join, merges))
        or not set(special).issuperset(words[last:])
    ):
        raise ValueError("the merges and the vocabulary do not agree: expected 256 bytes, then the merges in order")
    if other := set("".join(words[first:last])) - byte_of.keys():
        raise ValueError(f"character {min(other)!r} does not stand for a byte in GPT-2's files")
    tokens = tuple(bytes(map(byte_of.__getitem__, word)) for word in words[first:last])
    return BPETokenizer(tokens, (*words[:first], *words[last:]), leading=first)


def _require_reachable_merges(found: BPETokenizer, merges: list[Any]) -> None:
    """Check that each token results from the merge listed for it, as in every vocabulary that was learned.

    A BPETokenizer merges any two tokens that together are a third one, Hugging Face's library only the listed pairs.
    The two agree if the merges of lower rank turn the bytes of each token into its listed pair.

    Raises:
      ValueError: they do not.
    """
    ranks, byte_of = {token: rank for rank, token in enumerate(found.tokens)}, byte_of_letter()
    for rank, pair in enumerate(merges, 256):
        parts = [bytes([byte]) for byte in found.tokens[rank]]
        while len(parts) > 2:
            least, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if least >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if parts != [bytes(map(byte_of.__getitem__, word)) for word in pair]:
            raise ValueError(f"the merge {' '.join(pair)} is not reached by the merges before it")


def _json_object(path: Path) -> dict[str, Any]:
    return _parse_object(path.read_bytes(), path.name)


def _parse_object(data: str | bytes, name: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{name} is not a JSON object")
    return tree
