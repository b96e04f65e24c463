"""Tokenizers: characters, UTF-8 bytes, or byte-level BPE as in GPT-2.

A tokenizer is immutable and stored as JSON. All three have

- `vocab_size`: V; ids run from 0 to V - 1.
- `token_bytes`: the UTF-8 bytes of each token, V of them.
- `encode(text)`: ids (N,); raises UnknownCharacterError if a character is not in the vocabulary.
- `knows(text)`: whether each character is in the vocabulary, bool (len(text),).
- `decode(ids)`: the inverse of `encode`; invalid UTF-8, such as half a character, becomes U+FFFD. Raises ValueError if
  an id is outside the vocabulary.
- `to_json()`: the input of `from_json`.

`prepare/vocabularies.py` learns a BPE, or reads that of GPT-2 or a Hugging Face model.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxgpt.config import MissingExtraError, UsageError, shown

Ids = NDArray[np.integer[Any]]

MAX_TOKENS, MAX_TOKEN_BYTES = 2**20, 256
"""Limits of a BPE vocabulary; GPT-2's longest token has 128 bytes."""
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""Splits text into words before BPE: GPT-2's pattern, in tiktoken's faster form (tiktoken_ext/openai_public.py)."""


class UnknownCharacterError(UsageError):
    """A text has a character that is not in the vocabulary.

    Args:
      position: of the character in the text, from 0.
      known: a description of the characters in the vocabulary.
      where: replaces the position in the message.
    """

    def __init__(self, character: str, position: int, known: str, where: str = ""):
        name = unicodedata.name(character, "no name")
        super().__init__(
            f"character {character!r} (U+{ord(character):04X}, {name}) at {where or f'position {position}'} is not "
            f"among the {known}; --unknown skip leaves such characters out"
        )
        self.character, self.position, self.known = character, position, known


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character, in the order of `chars`, as in the notes.

    >>> tokenizer = CharTokenizer.train("hello")
    >>> tokenizer.chars
    'ehlo'
    >>> tokenizer.encode("hole").tolist()
    [1, 3, 2, 0]
    >>> tokenizer.decode([1, 3, 2, 0])
    'hole'
    """

    chars: str

    def __post_init__(self) -> None:
        if len(set(self.chars)) != len(self.chars) or not self.chars:
            raise ValueError("a character vocabulary needs at least one character, each of them once")

    @classmethod
    def train(cls, text: str | Iterable[str]) -> "CharTokenizer":
        """The sorted distinct characters of a text, which may be given in pieces."""
        seen = np.zeros(0x110000, bool)
        for piece in [text] if isinstance(text, str) else text:
            seen[code_points(piece)] = True
        return cls("".join(map(chr, np.flatnonzero(seen))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        return [char.encode("utf-8", "surrogatepass") for char in self.chars]

    @cached_property
    def _id_of_code(self) -> NDArray[np.int32]:
        codes = code_points(self.chars)
        table = np.full(int(codes.max()) + 2, -1, np.int32)  # the last entry is for all larger code points
        table[codes] = np.arange(len(codes), dtype=np.int32)
        return table

    def _ids(self, text: str) -> NDArray[np.int32]:
        """The id of each character, -1 if it is unknown."""
        table = self._id_of_code
        return table[np.minimum(code_points(text), len(table) - 1)]

    def knows(self, text: str) -> NDArray[np.bool_]:
        return self._ids(text) >= 0

    def encode(self, text: str) -> Ids:
        ids = self._ids(text)
        if ids.size and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            raise UnknownCharacterError(text[position], position, f"{self.vocab_size} characters of the vocabulary")
        return ids

    def decode(self, ids: ArrayLike) -> str:
        checked = checked_ids(ids, self.vocab_size)
        return code_points(self.chars)[checked].tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        """The characters as a string, or as code points if JSON would merge two surrogates into one character."""
        halves = re.search("[\ud800-\udbff][\udc00-\udfff]", self.chars)
        return {"kind": "char", "chars": code_points(self.chars).tolist() if halves else self.chars}


@dataclass(frozen=True)
class ByteTokenizer:
    """One id per UTF-8 byte; encodes any text.

    >>> ByteTokenizer().encode("é").tolist()
    [195, 169]
    """

    vocab_size = 256
    token_bytes = tuple(bytes([byte]) for byte in range(256))

    def knows(self, text: str) -> NDArray[np.bool_]:
        return np.ones(len(text), bool)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        data = checked_ids(ids, 256).astype(np.uint8).tobytes()
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


@dataclass(frozen=True)
class BPETokenizer:
    """One id per token, in the order of their merges, with special tokens before or after them.

    No text encodes to a special token: "<|endoftext|>" in a text is thirteen ordinary characters. Surrogates are
    unknown characters, as UTF-8 cannot encode them.

    >>> tokenizer = BPETokenizer((*ByteTokenizer().token_bytes, b"th", b"the"))
    >>> tokenizer.encode("the hat").tolist()
    [257, 32, 104, 97, 116]
    """

    tokens: tuple[bytes, ...] = field(repr=False)
    special: tuple[str, ...] = ()
    leading: int = 0
    """Number of special tokens with the first ids; the others have the last ids."""

    def __post_init__(self) -> None:
        tokens, special = set(self.tokens), set(self.special)
        missing = set(ByteTokenizer.token_bytes) - tokens
        sizes = [len(token) for token in (*self.tokens, *self.special)]
        for wrong, problem in (
            (len(sizes) > MAX_TOKENS, f"{len(sizes):,} tokens, expected at most {MAX_TOKENS:,}"),
            (0 in sizes, "a token is empty"),
            (max(sizes, default=0) > MAX_TOKEN_BYTES, f"a token is longer than {MAX_TOKEN_BYTES} bytes"),
            (len(tokens) + len(special) < len(sizes), "a token is listed twice"),
            (not 0 <= self.leading <= len(special), f"{self.leading} leading of {len(special)} special tokens"),
            (missing, f"no token for {len(missing)} of the 256 bytes, such as {min(missing, default=b'')!r}"),
        ):
            if wrong:
                raise ValueError(f"not a BPE vocabulary: {problem}")

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + len(self.special)

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        special = [name.encode() for name in self.special]
        return [*special[: self.leading], *self.tokens, *special[self.leading :]]

    @cached_property
    def _encoding(self) -> Any:
        try:
            import tiktoken
        except ImportError as error:
            raise MissingExtraError("encoding with a BPE vocabulary", "tiktoken", "data") from error
        ranks = {token: rank for rank, token in enumerate(self.tokens, self.leading)}
        return tiktoken.Encoding("jaxgpt", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def knows(self, text: str) -> NDArray[np.bool_]:
        codes = code_points(text)
        return (codes < 0xD800) | (codes > 0xDFFF)

    def encode(self, text: str) -> Ids:
        try:
            text.encode()  # tiktoken would silently replace surrogates
        except UnicodeEncodeError as error:
            at = error.start
            raise UnknownCharacterError(text[at], at, "characters that UTF-8 can write") from error
        return np.array(self._encoding.encode_ordinary(text), np.int32)

    def decode(self, ids: ArrayLike) -> str:
        checked = checked_ids(ids, self.vocab_size).ravel().tolist()
        return b"".join(self.token_bytes[i] for i in checked).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        """Bytes of tokens become Latin-1 characters."""
        tokens = [token.decode("latin-1") for token in self.tokens]
        tree = {"kind": "bpe", "pattern": "gpt2", "tokens": tokens, "special": list(self.special)}
        return tree | ({"leading": self.leading} if self.leading else {})


Tokenizer = CharTokenizer | ByteTokenizer | BPETokenizer


def from_json(tree: Any) -> Tokenizer:
    """The inverse of `to_json`; a ValueError if `tree`, which may come from any file, is not a tokenizer."""
    match tree:
        case {"kind": "char", "chars": str(chars), **rest} if not rest:
            return CharTokenizer(chars)
        case {"kind": "char", "chars": list(codes), **rest} if not rest:
            if all(type(code) is int and 0 <= code < 0x110000 for code in codes):
                return CharTokenizer("".join(map(chr, codes)))
        case {"kind": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"kind": "bpe", "pattern": str(pattern), "tokens": list(tokens), "special": list(special), **rest} if (
            rest.keys() <= {"leading"} and type(rest.get("leading", 0)) is int
        ):
            if pattern != "gpt2":
                raise ValueError(f"not a BPE vocabulary: split pattern {shown(pattern)}, expected 'gpt2'")
            if other := [value for value in (*tokens, *special) if not isinstance(value, str)]:
                raise ValueError(f"not a BPE vocabulary: token {shown(other[0])}, expected a string")
            try:
                "".join(special).encode()
                found = tuple(token.encode("latin-1") for token in tokens)
            except UnicodeEncodeError as error:
                token = error.object[:40]
                raise ValueError(f"not a BPE vocabulary: token {token!r} is not {error.encoding}") from error
            return BPETokenizer(found, tuple(special), tree.get("leading", 0))
    raise ValueError(
        f"not a tokenizer: {shown(tree)}; expected the kind 'char' with its chars, 'byte', or 'bpe' with its "
        "pattern, tokens and special tokens"
    )


def normalize_line_ends(tokenizer: Tokenizer, text: str) -> str:
    """`text` with LF line ends and no byte order mark, as `prepare` reads a file.

    Unchanged if a character vocabulary has CR: then the training text kept its line ends."""
    if isinstance(tokenizer, CharTokenizer) and tokenizer.knows("\r").all():
        return text
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def drop_unknown(tokenizer: Tokenizer, text: str) -> str:
    """`text` without its unknown characters."""
    known = tokenizer.knows(text)
    return text if known.all() else "".join(compress(text, known))


def code_points(text: str) -> NDArray[np.uint32]:
    """Unicode code points, (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def checked_ids(ids: ArrayLike, vocab_size: int) -> Ids:
    """`ids` as int32; a ValueError if they are not integers, or one is outside the vocabulary."""
    array = np.asarray(ids)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"expected integers as ids, found {array.dtype}")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"id {outside[0]} is outside the vocabulary, expected 0 to {vocab_size - 1}")
    return array.astype(np.int32)
