"""Tokenizers by the value of --tokenizer: fixed, learned from the text, or read from files."""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from threading import Event
from typing import Any

from jaxgpt import tokenizer
from jaxgpt.cli.places import local_path
from jaxgpt.config import MissingExtraError, UsageError, shown
from jaxgpt.corpus import CorpusError, read_meta
from jaxgpt.files import json_object
from jaxgpt.prepare.documents import SourceError
from jaxgpt.prepare.encode import split_words
from jaxgpt.prepare.sources import Text
from jaxgpt.tokenizer import MAX_TOKEN_BYTES, MAX_TOKENS, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

LEARNED = re.compile("bpe:([0-9]{1,7})")
GPT2_SIZE = 50_257


def tokenizer_for(spec: str, texts: Iterable[Text]) -> Tokenizer:
    """The tokenizer for texts.

    Args:
      spec: "char" (the characters of the texts), "ascii" (line feed and the 95 printable characters), "byte", "gpt2",
        "bpe:SIZE" (learned from the texts), or a path as in `read_tokenizer`.

    Raises:
      UsageError: `spec` is not a tokenizer, or it is unavailable.
    """
    pieces = chain.from_iterable(text.pieces("learning a vocabulary") for text in texts)
    if spec == "char":
        return CharTokenizer.train(pieces)
    if spec == "ascii":
        return CharTokenizer("\n" + "".join(map(chr, range(32, 127))))
    if spec == "byte":
        return ByteTokenizer()
    if spec == "gpt2":
        return load_gpt2()
    if learned := LEARNED.fullmatch(spec):
        return learn_bpe(pieces, int(learned[1]))
    return read_tokenizer(local_path(spec))


def accepts(spec: str, found: Tokenizer) -> bool:
    """Whether `spec`, as in `tokenizer_for`, may stand for the tokenizer of a prepared corpus. Neither its text nor the
    files of GPT-2 are at hand, so that a BPE is known by its size; a short text may give less than SIZE."""
    if spec in ("char", "byte"):
        return found.to_json()["kind"] == spec
    if spec == "gpt2":
        return isinstance(found, BPETokenizer) and found.vocab_size == GPT2_SIZE
    if learned := LEARNED.fullmatch(spec):
        return isinstance(found, BPETokenizer) and found.vocab_size <= int(learned[1])
    return found == tokenizer_for(spec, [])


def learn_bpe(pieces: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn a byte-level BPE: the most frequent pair of tokens is merged until there are `vocab_size` tokens.

    The result depends only on the text, whatever its pieces, and on vocab_size, and has no special tokens. A short text
    may run out of pairs earlier. Memory grows with the number of different words.

    Raises:
      UsageError: `vocab_size` is below 256 or above MAX_TOKENS.
    """
    if not 256 <= vocab_size <= MAX_TOKENS:
        raise UsageError(f"a BPE vocabulary of {vocab_size}, expected 256 to {MAX_TOKENS}, such as bpe:4096")
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("learning a BPE vocabulary", "tokenizers", "data") from error

    stopped = Event()

    def parts() -> Iterator[str]:
        limit = 2**15  # the trainer's time grows with the square of the length of a word
        for part in split_words(pieces, 2**14):
            if stopped.is_set():
                raise KeyboardInterrupt
            for i in range(0, len(part), limit):
                yield part[i : i + limit].encode("utf-8", "ignore").decode()

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
    )
    pool = ThreadPoolExecutor(1)  # the main thread waits in Python, so that Ctrl-C reaches it
    try:
        pool.submit(model.train_from_iterator, parts(), trainer).result()
    finally:
        stopped.set()
        pool.shutdown(wait=False)  # once it has read the text, the trainer cannot be stopped
    ids, byte_of = model.get_vocab(), byte_of_letter()
    return BPETokenizer(tuple(bytes(byte_of[letter] for letter in word) for word in sorted(ids, key=ids.__getitem__)))


def load_gpt2() -> BPETokenizer:
    """GPT-2's tokenizer, 50,256 tokens and <|endoftext|>, from tiktoken, which downloads it once.

    Raises:
      UsageError: it is unavailable.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise MissingExtraError("GPT-2's vocabulary", "tiktoken", "data") from error
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"tiktoken cannot fetch GPT-2's vocabulary ({error}); fetch vocab.json and merges.txt from "
            "https://huggingface.co/gpt2 into a folder, and give its path: --tokenizer FOLDER"
        ) from error
    return BPETokenizer(tuple(map(encoding.decode_single_token_bytes, range(encoding.n_vocab - 1))), ("<|endoftext|>",))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokens.json, of its folder, or of a Hugging Face folder.

    Raises:
      CorpusError: there is none, or it cannot be used.
    """
    saved = path / "tokens.json" if path.is_dir() else path
    if saved.is_file():
        hint = "expected a tokens.json of jaxgpt, or the folder of a Hugging Face model"
        return tokenizer.from_json(read_meta(saved, hint)["tokenizer"])
    if not path.is_dir():
        raise CorpusError(
            f"no tokenizer {str(path)!r}: expected char, ascii, byte, gpt2, bpe:SIZE such as bpe:4096, "
            "the path of a tokens.json, or a folder with the byte-level BPE of a Hugging Face model"
        )
    try:
        return read_vocabulary(path)
    except (OSError, ValueError) as error:
        hint = "to use other tokens, name a tokenizer, such as --tokenizer byte"
        raise CorpusError(f"the vocabulary of {path} cannot be used: {error}; {hint}") from error


def read_vocabulary(folder: Path) -> BPETokenizer:
    """The byte-level BPE of a Hugging Face folder: tokenizer.json, else vocab.json and merges.txt.

    Raises:
      ValueError: a file is damaged or missing, or text would get other ids than with Hugging Face's library: the
        vocabulary is not a byte-level BPE with GPT-2's split pattern, or text is changed before it is split.
      OSError: a file cannot be read.
    """

    def read(name: str) -> dict[str, Any]:
        return json_object((folder / name).read_bytes(), name) if (folder / name).is_file() else {}

    if read("tokenizer_config.json").get("add_prefix_space"):
        raise ValueError("add_prefix_space is true, expected false")
    if tree := read("tokenizer.json"):
        return _from_tokenizer_json(tree)
    merges, vocabulary = folder / "merges.txt", folder / "vocab.json"
    if not (merges.is_file() and vocabulary.is_file()):
        raise ValueError("expected tokenizer.json, or vocab.json and merges.txt, of a byte-level BPE")
    return parse(merges.read_text("utf-8-sig"), vocabulary.read_bytes(), read("added_tokens.json"))


def byte_of_letter() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's files (bytes_to_unicode in its encoder.py)."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def parse(merges: str, vocabulary: str | bytes, added: dict[str, Any] | None = None) -> BPETokenizer:
    """The tokenizer of a merges.txt (a version line, then one merge per line) and a vocab.json (token to id).

    Special tokens are written in brackets, such as <|endoftext|>, and are not the result of a merge.

    Raises:
      ValueError: the files are something else, or do not agree.
    """
    pairs = [line.split(" ") for i, line in enumerate(merges.splitlines()) if i or not line.startswith("#version")]
    ids, merged = json_object(vocabulary, "the vocabulary") | (added or {}), set(map("".join, pairs))
    special = [word for word in ids if word not in merged and re.fullmatch(r"<[^<>]+>|\[[^][]+\]", word)]
    return _assemble(ids, pairs, special)


def _from_tokenizer_json(tree: dict[str, Any]) -> BPETokenizer:
    """The tokenizer of a tokenizer.json of Hugging Face's tokenizers library."""
    model, split, added = tree.get("model"), tree.get("pre_tokenizer"), tree.get("added_tokens") or []
    if not (isinstance(model, dict) and isinstance(split, dict) and isinstance(added, list)):
        raise ValueError("expected a model, a pre_tokenizer and added_tokens")
    expected = {
        "the model's type": (model.get("type", "BPE"), "BPE"),
        "the model's dropout": (model.get("dropout") or None, None),
        "the model's continuing_subword_prefix": (model.get("continuing_subword_prefix") or None, None),
        "the model's end_of_word_suffix": (model.get("end_of_word_suffix") or None, None),
        "the normalizer": (tree.get("normalizer"), None),
        "the pre_tokenizer's type": (split.get("type"), "ByteLevel"),
        "the pre_tokenizer's add_prefix_space": (split.get("add_prefix_space", True), False),
        "the pre_tokenizer's use_regex": (split.get("use_regex", True), True),
    }
    for name, (value, wanted) in expected.items():
        if value != wanted:
            raise ValueError(f"{name} is {shown(value)}, expected {wanted!r}")
    for token in added:
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and token.get("special") is True):
            raise ValueError(f"added token {shown(token)}, expected content, an id and special true")
    special = {token["content"]: token.get("id") for token in added}
    ids, merges = model.get("vocab"), model.get("merges")
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ValueError("the model has no vocab or no merges")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return _assemble(ids | special, pairs, list(special))


def _assemble(ids: dict[str, Any], merges: list[Any], special: list[str]) -> BPETokenizer:
    """The tokenizer of a vocabulary (token to id), the pairs of tokens to merge, in order, and the special tokens.

    A BPETokenizer merges any two tokens that together form a third, Hugging Face's library only the listed pairs. Both
    give the same ids if for each pair, the merges of lower rank turn the bytes of its result into that pair, as they do
    in every vocabulary that was learned.

    Raises:
      ValueError: the files do not agree. Ids must run from 0 without gaps: the 256 bytes, then the merges in order;
        special tokens come before or after all these.
    """
    for pair in merges:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair)):
            raise ValueError(f"merge {shown(pair)}, expected two tokens")
    if any(type(i) is not int for i in ids.values()):
        raise ValueError("the vocabulary is not a JSON object of token to id")
    words, byte_of = sorted(ids, key=ids.__getitem__), byte_of_letter()
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
    tokens = [bytes(map(byte_of.__getitem__, word)) for word in words[first:last]]
    found = BPETokenizer(tuple(tokens), (*words[:first], *words[last:]), leading=first)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, pair in enumerate(merges, 256):
        parts = [bytes([byte]) for byte in tokens[rank]]
        while len(parts) > 2:
            least, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if least >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if parts != [bytes(map(byte_of.__getitem__, word)) for word in pair]:
            raise ValueError(f"the merge {' '.join(pair)} is not reached by the merges before it")
    return found
