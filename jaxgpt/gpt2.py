"""Byte-level BPE from elsewhere: GPT-2's own vocabulary, and those of Hugging Face folders."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxgpt.bpe import BPETokenizer, byte_of_letter
from jaxgpt.config import MissingExtraError, shown
from jaxgpt.prepare.files import SourceError
from jaxgpt.prepare.sources import cache_dir, require_sha256

END_OF_TEXT = "<|endoftext|>"
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# The names of OpenAI and of Hugging Face for the same file, and its SHA-256 as in tiktoken_ext/openai_public.py.
MERGES = ("vocab.bpe", "merges.txt"), "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCABULARY = ("encoder.json", "vocab.json"), "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
FILES = ("tokenizer.json", *MERGES[0], *VOCABULARY[0])
"""Where a Hugging Face folder may hold a byte-level BPE."""
OTHER_FILES = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Where it may hold a vocabulary of another kind, which this package cannot use: WordPiece and SentencePiece."""


def load() -> BPETokenizer:
    """GPT-2's tokenizer: 50,256 tokens and <|endoftext|>.

    Its files are looked for in $JAXGPT_DATA (or beside it, if that is a file), in data/ and in the cache; where one
    is missing, tiktoken is asked, which has a cache of its own and else downloads them.

    Raises:
      SourceError: they are not to be had, or are not the expected ones.
    """
    merges, vocabulary = (_find(names, _folders()) for names, _ in (MERGES, VOCABULARY))
    if merges and vocabulary:
        found = ((merges, MERGES), (vocabulary, VOCABULARY))
        return parse(*(_read(path, sha256) for path, (_, sha256) in found))
    try:
        import tiktoken
    except ImportError as error:
        raise MissingExtraError("GPT-2's vocabulary", "tiktoken", "bpe") from error
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        wanted = "".join(
            f"\n  {URL}{names[0]} (or {names[1]} of Hugging Face's gpt2)\n    SHA-256 {sha256}"
            for names, sha256 in (MERGES, VOCABULARY)
        )
        raise SourceError(
            f"GPT-2's vocabulary is not in {', '.join(map(str, _folders()))}, and tiktoken cannot fetch it ({error}); "
            f"fetch these two files elsewhere and put them into one of those folders:{wanted}"
        ) from error
    return BPETokenizer(tuple(map(encoding.decode_single_token_bytes, range(encoding.n_vocab - 1))), (END_OF_TEXT,))


def parse(merges: str, vocabulary: str) -> BPETokenizer:
    """The tokenizer of a vocab.bpe (a line of version, then a merge a line) and an encoder.json (token to id).

    Raises:
      ValueError: they are no such files, or the two do not agree.
    """
    return _assembled(*_of_two_files(merges, vocabulary))


def in_folder(folder: Path) -> BPETokenizer:
    """The tokenizer of a Hugging Face folder, of its tokenizer.json or else of its vocab.json and merges.txt.

    Raises:
      ValueError: a file is damaged or missing, or plain text would become other ids: theirs is not a byte-level BPE
        with GPT-2's split pattern, or changes the text before it is split.
      OSError: a file cannot be read.
    """
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and _object(settings).get("add_prefix_space"):
        raise ValueError("add_prefix_space is true, expected false")
    if (folder / "tokenizer.json").is_file():
        parts = _of_tokenizer_json(_object(folder / "tokenizer.json"))
    else:
        merges, vocabulary = (_find(names, [folder]) for names, _ in (MERGES, VOCABULARY))
        if not merges or not vocabulary:
            raise ValueError("expected tokenizer.json, or vocab.json and merges.txt, of a byte-level BPE")
        added = folder / "added_tokens.json"
        later = _object(added) if added.is_file() else {}
        parts = _of_two_files(merges.read_text("utf-8-sig"), vocabulary.read_text("utf-8-sig"), later)
    tok = _assembled(*parts)
    _require_canonical(tok, parts[1])
    return tok


def _of_two_files(
    merges: str, vocabulary: str, added: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Ids, merges and special tokens, which are the words in brackets, such as <|endoftext|>, that no merge makes.

    Args:
      added: more special tokens with their ids.
    """
    try:
        ids = json.loads(vocabulary)
    except RecursionError as error:
        raise ValueError(f"the vocabulary is not JSON: {error}") from error
    if not isinstance(ids, dict):
        raise ValueError("the vocabulary is not a JSON object of token to id")
    lines = merges.splitlines()
    pairs = [line.split(" ") for line in lines[bool(lines and lines[0].startswith("#version")) :]]
    made = set(map("".join, pairs))
    ids |= added or {}
    return ids, pairs, [word for word in ids if re.fullmatch(r"<[^<>]+>|\[[^][]+\]", word) and word not in made]


def _of_tokenizer_json(tree: dict[str, Any]) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Ids, merges and special tokens of the format of Hugging Face's tokenizers."""

    def require(name: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{name} is {shown(value)}, expected {allowed[0]!r}")

    model, split, added = tree.get("model"), tree.get("pre_tokenizer"), tree.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(split, dict) or not isinstance(added, list):
        raise ValueError("expected a model, a pre_tokenizer and added_tokens")
    require("the model's type", model.get("type", "BPE"), "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(f"the model's {name}", model.get(name), None, 0, "")
    require("the normalizer", tree.get("normalizer"), None)
    require("the pre_tokenizer's type", split.get("type"), "ByteLevel")
    require("the pre_tokenizer's add_prefix_space", split.get("add_prefix_space", True), False)
    require("the pre_tokenizer's use_regex", split.get("use_regex", True), True)
    special = []
    for token in added:
        match token:
            case {"content": str(word), "id": int(), "special": True}:
                special.append(word)
            case _:
                raise ValueError(f"added token {shown(token)}, expected content, an id and special true")
    ids, merges = model.get("vocab"), model.get("merges")
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ValueError("the model has no vocab or no merges")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return ids | {token["content"]: token["id"] for token in added}, pairs, special


def _assembled(ids: dict[str, Any], merges: list[Any], special: list[str]) -> BPETokenizer:
    """The tokenizer of a vocabulary (token to id), its merges in order and the names of its special tokens.

    Raises:
      ValueError: they do not agree: ids run from 0 without gaps, the 256 bytes before the merges, and the special
        tokens before or after all these.
    """
    table, names = byte_of_letter(), set(special)

    def spelled(word: str) -> bytes:
        if other := set(word) - table.keys():
            raise ValueError(f"character {min(other)!r} stands for no byte in GPT-2's files")
        return bytes(table[letter] for letter in word)

    for pair in merges:
        match pair:
            case [str(), str()]:
                continue
        raise ValueError(f"merge {shown(pair)}, expected two tokens")
    if any(type(i) is not int for i in ids.values()):
        raise ValueError("the vocabulary is not a JSON object of token to id")
    words = sorted(ids, key=ids.__getitem__)
    first = next((i for i, word in enumerate(words) if word not in names), len(words))
    last = first + 256 + len(merges)
    if (
        sorted(ids.values()) != list(range(len(ids)))
        or words[first + 256 : last] != list(map("".join, merges))
        or not names.issuperset(words[last:])
    ):
        raise ValueError("the merges and the vocabulary do not agree: expected 256 bytes, then the merges in order")
    return BPETokenizer(tuple(map(spelled, words[first:last])), (*words[:first], *words[last:]), leading=first)


def _require_canonical(tok: BPETokenizer, merges: list[Any]) -> None:
    """Check that each token is reached by the merge listed for it, as in every vocabulary that was learnt.

    A BPETokenizer merges any two tokens that are a third one together, Hugging Face's tokenizers the listed pairs only.
    The two agree if, of each token's bytes, the merges of lower rank make its listed pair.

    Raises:
      ValueError: one is not.
    """
    ranks, letters = {token: rank for rank, token in enumerate(tok.tokens)}, byte_of_letter()
    for rank, pair in enumerate(merges, 256):
        parts = [bytes([byte]) for byte in tok.tokens[rank]]
        while len(parts) > 2:
            least, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if least >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if parts != [bytes(map(letters.__getitem__, word)) for word in pair]:
            raise ValueError(f"the merge {' '.join(pair)} is not reached by the merges before it")


def _object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return tree


def _find(names: tuple[str, ...], folders: list[Path]) -> Path | None:
    candidates = (folder / name for folder in folders for name in names)
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path, sha256: str) -> str:
    data = path.read_bytes()
    require_sha256(data, sha256, str(path))
    return data.decode()


def _folders() -> list[Path]:
    folders = [folder for folder in (Path("data"), cache_dir()) if folder]
    if given := os.environ.get("JAXGPT_DATA"):
        path = Path(os.path.expanduser(given))
        folders.insert(0, path if path.is_dir() else path.parent)
    return folders
