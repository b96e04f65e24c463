"""Strings to integers and back. A tokenizer is a value: immutable, and plain JSON on disk."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxgpt.config import UsageError, shown
from jaxgpt.prepare.files import plain

Ids = NDArray[np.integer[Any]]
Progress = Callable[[str, float], None]
"""Is told now and then what is being done, and what share of it is done, from 0 to 1."""


def unseen(what: str, share: float) -> None:
    """A `Progress` that shows nothing."""


class UnknownCharacterError(UsageError):
    """A text holds a character that the vocabulary does not."""

    def __init__(self, character: str, position: int, known: str, where: str = ""):
        name = unicodedata.name(character, "no name")
        super().__init__(
            f"character {character!r} (U+{ord(character):04X}, {name}) at {where or f'position {position}'} is not "
            f"among the {known}; --unknown skip leaves such characters out"
        )
        self.character, self.position, self.known = character, position, known


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """V: ids run from 0 to V - 1."""
        ...

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 bytes that each id stands for, V of them."""
        ...

    def encode(self, text: str, progress: Progress = unseen) -> Ids:
        """Integer ids, (N,).

        Args:
          progress: told how far it is by a tokenizer that takes its time.

        Raises:
          UnknownCharacterError: a character is not in the vocabulary.
        """
        ...

    def knows(self, text: str) -> NDArray[np.bool_]:
        """Whether each character of `text` is in the vocabulary, (len(text),)."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """The text of the ids, the inverse of `encode`.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` turns back into an equal tokenizer."""
        ...


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
            raise ValueError("a character vocabulary needs at least one character, and each of them once")

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The vocabulary of `text`: its different characters, sorted."""
        return cls.learn([text])

    @classmethod
    def learn(cls, parts: Iterable[str]) -> "CharTokenizer":
        """The vocabulary of a text in parts."""
        seen = np.zeros(0x110000, bool)
        for part in parts:
            seen[code_points(part)] = True
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
        table = np.full(int(codes.max()) + 2, -1, np.int32)  # the last entry stands for all codes beyond
        table[codes] = np.arange(len(codes), dtype=np.int32)
        return table

    def _ids(self, text: str) -> NDArray[np.int32]:
        table = self._id_of_code
        return table[np.minimum(code_points(text), len(table) - 1)]

    def knows(self, text: str) -> NDArray[np.bool_]:
        return self._ids(text) >= 0

    def encode(self, text: str, progress: Progress = unseen) -> Ids:
        ids = self._ids(text)
        if ids.size and ids.min() < 0:
            position = int(np.argmin(ids >= 0))
            raise UnknownCharacterError(text[position], position, f"{self.vocab_size} characters of the vocabulary")
        return ids

    def decode(self, ids: ArrayLike) -> str:
        checked = checked_ids(ids, self.vocab_size)
        return code_points(self.chars)[checked].tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        """As `Tokenizer.to_json`; code points in place of a string that JSON would not give back, since it makes one
        character of the two halves of a surrogate pair."""
        halves = re.search("[\ud800-\udbff][\udc00-\udfff]", self.chars)
        return {"kind": "char", "chars": code_points(self.chars).tolist() if halves else self.chars}


@dataclass(frozen=True)
class ByteTokenizer:
    """One id per UTF-8 byte: 256 ids, and no text that it cannot encode.

    >>> ByteTokenizer().encode("é").tolist()
    [195, 169]
    """

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def token_bytes(self) -> Sequence[bytes]:
        return [bytes([byte]) for byte in range(256)]

    def knows(self, text: str) -> NDArray[np.bool_]:
        return np.ones(len(text), bool)

    def encode(self, text: str, progress: Progress = unseen) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """As `Tokenizer.decode`; bytes that are no UTF-8, such as a sample's torn end, become U+FFFD."""
        data = checked_ids(ids, 256).astype(np.uint8).tobytes()
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


def as_prepared(tokenizer: Tokenizer, text: str) -> str:
    """`text` as `prepare` reads a file: with LF line ends and no byte order mark.

    It stays as it is if CR is in a vocabulary of characters: then the training text kept its line ends.
    """
    if isinstance(tokenizer, CharTokenizer) and tokenizer.knows("\r").all():
        return text
    return "".join(plain([text], []))


def encode_typed(tokenizer: Tokenizer, text: str | bytes) -> Ids:
    """The ids of a text `as_prepared`, which may be given as bytes; those need not be UTF-8 for a byte tokenizer.

    Raises:
      UsageError: the bytes are not UTF-8, and it is another tokenizer.
      UnknownCharacterError: as `Tokenizer.encode`.
    """
    if isinstance(text, str):
        return tokenizer.encode(as_prepared(tokenizer, text))
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text, np.uint8).astype(np.int32)
    try:
        return tokenizer.encode(as_prepared(tokenizer, text.decode()))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"byte 0x{text[error.start]:02x} at offset {error.start} of the text is not UTF-8, which only a run with "
            "--tokenizer byte takes"
        ) from error


def without_unknown(tokenizer: Tokenizer, text: str) -> str:
    """`text` without the characters that are outside the vocabulary."""
    known = tokenizer.knows(text)
    return text if known.all() else "".join(char for char, keep in zip(text, known, strict=True) if keep)


def from_json(tree: Any) -> Tokenizer:
    """The tokenizer that `to_json` described.

    Raises:
      ValueError: the description is not one of a tokenizer.
    """
    match tree:
        case {"kind": "char", "chars": str(chars), **rest} if not rest:
            return CharTokenizer(chars)
        case {"kind": "char", "chars": list(codes), **rest} if not rest:
            if all(type(code) is int and 0 <= code < 0x110000 for code in codes):
                return CharTokenizer("".join(map(chr, codes)))
        case {"kind": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"kind": "bpe", "pattern": str(pattern), "tokens": list(tokens), "special": list(special), **rest} if (
            rest.keys() <= {"leading"} and type(leading := rest.get("leading", 0)) is int
        ):
            from jaxgpt import bpe  # it imports this module

            return bpe.from_plain(pattern, tokens, special, leading)
    raise ValueError(
        f"not a tokenizer: {shown(tree)}; expected the kind 'char' with its chars, 'byte', or 'bpe' with its "
        "pattern, tokens and special tokens"
    )


def code_points(text: str) -> NDArray[np.uint32]:
    """Unicode code points, (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def checked_ids(ids: ArrayLike, vocab_size: int) -> Ids:
    """`ids` as int32.

    Raises:
      ValueError: one is no integer, or outside a vocabulary of `vocab_size`.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise ValueError(f"ids are integers, found {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise ValueError(f"id {outside} is outside the vocabulary, which runs from 0 to {vocab_size - 1}")
    return array.astype(np.int32)
