"""Byte-level BPE, as GPT-2 has it: text is split into words, and the bytes of each word are merged into tokens."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxgpt.config import MissingExtraError, UsageError, shown
from jaxgpt.tokenizer import Ids, Progress, UnknownCharacterError, checked_ids, code_points, unseen

MAX_TOKENS, MAX_TOKEN_BYTES = 2**20, 256
"""The largest vocabulary that is learnt or read from a file; GPT-2's longest token has 128 bytes."""

PATTERNS = {"gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"}
"""How text is split into words, by name: a file can name one of these and bring none of its own.

"gpt2" is the pattern of GPT-2's encoder.py, in tiktoken's faster spelling (tiktoken_ext/openai_public.py).
"""

CHUNK = 2**18
"""Characters that are encoded at once. A run of white space that is longer than a million overflows the stack of
tiktoken's regular expressions unless it ends its text, and `spans` sees to it that one longer than this does."""

LONGEST = 2**22
"""Characters after which a text is cut where it need not be: one without white space, such as base64 or a genome, would
else be a single part, in memory whole."""

# Before the last white space of several, or the only one. Python's \s has four separators that the pattern's has not.
_CUT = re.compile(r"(?=[^\S\x1c-\x1f][\S\x1c-\x1f])")


@dataclass(frozen=True)
class BPETokenizer:
    """One id per token, in the order in which BPE merges them; special tokens come after them, or before.

    No text encodes to a special token: "<|endoftext|>" in a text is thirteen characters like any others. Half of a
    surrogate pair is no character of UTF-8 and so unknown.

    >>> from jaxgpt.tokenizer import ByteTokenizer
    >>> tokenizer = BPETokenizer((*ByteTokenizer().token_bytes, b"th", b"the"))
    >>> tokenizer.encode("the hat").tolist()
    [257, 32, 104, 97, 116]
    """

    tokens: tuple[bytes, ...] = field(repr=False)
    special: tuple[str, ...] = ()
    pattern: str = "gpt2"
    leading: int = 0
    """How many of the special tokens have the first ids; the others have the last."""

    def __post_init__(self) -> None:
        problem = ""
        if self.pattern not in PATTERNS:
            problem = f"split pattern {self.pattern!r}, expected {', '.join(PATTERNS)}"
        elif self.vocab_size > MAX_TOKENS:
            problem = f"{self.vocab_size:,} tokens, expected at most {MAX_TOKENS:,}"
        elif not all(0 < len(token) <= MAX_TOKEN_BYTES for token in (*self.tokens, *self.special)):
            problem = f"a token is empty or longer than {MAX_TOKEN_BYTES} bytes"
        elif len(set(self.tokens)) < len(self.tokens) or len(set(self.special)) < len(self.special):
            problem = "a token stands there twice, expected each once"
        elif not 0 <= self.leading <= len(self.special):
            problem = f"{self.leading} leading special tokens, expected 0 to {len(self.special)}"
        elif missing := {bytes([byte]) for byte in range(256)} - set(self.tokens):
            problem = f"no token for {len(missing)} of the 256 bytes, such as {min(missing)!r}"
        if problem:
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
            raise MissingExtraError("encoding with a BPE vocabulary", "tiktoken", "bpe") from error
        ranks = {token: rank for rank, token in enumerate(self.tokens, self.leading)}
        return tiktoken.Encoding("jaxgpt", pat_str=PATTERNS[self.pattern], mergeable_ranks=ranks, special_tokens={})

    def knows(self, text: str) -> NDArray[np.bool_]:
        codes = code_points(text)
        return (codes < 0xD800) | (codes > 0xDFFF)

    def encode(self, text: str, progress: Progress = unseen) -> Ids:
        """As `Tokenizer.encode`, on all CPU cores."""
        encoding = self._encoding

        def part(span: tuple[int, int]) -> NDArray[np.int32]:
            piece = text[slice(*span)]
            try:
                piece.encode()  # of itself tiktoken would replace what UTF-8 has not, silently
            except UnicodeEncodeError as error:
                at = error.start
                raise UnknownCharacterError(piece[at], span[0] + at, "characters that UTF-8 can write") from error
            return np.array(encoding.encode_ordinary(piece), np.int32)

        cuts = list(spans(text, CHUNK))
        parts = [np.zeros(0, np.int32)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for (_, end), ids in zip(cuts, pool.map(part, cuts), strict=True):
                parts.append(ids)
                progress("encoding", end / len(text))
        return np.concatenate(parts)

    def decode(self, ids: ArrayLike) -> str:
        """As `Tokenizer.decode`; bytes that are no UTF-8, such as a sample's torn end, become U+FFFD."""
        table = self.token_bytes
        return b"".join(table[i] for i in checked_ids(ids, self.vocab_size)).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        """Plain values; a token's bytes are written as the characters of Latin-1."""
        tokens = [token.decode("latin-1") for token in self.tokens]
        tree = {"kind": "bpe", "pattern": self.pattern, "tokens": tokens, "special": list(self.special)}
        return tree | ({"leading": self.leading} if self.leading else {})


def from_plain(pattern: str, tokens: list[Any], special: list[Any], leading: int = 0) -> BPETokenizer:
    """The tokenizer that `to_json` described.

    Raises:
      ValueError: it describes none: all is checked, since the values come from a file.
    """
    if other := [value for value in (*tokens, *special) if not isinstance(value, str)]:
        raise ValueError(f"not a BPE vocabulary: token {shown(other[0])}, expected a string")
    try:
        "".join(special).encode()
        return BPETokenizer(tuple(token.encode("latin-1") for token in tokens), tuple(special), pattern, leading)
    except UnicodeEncodeError as error:
        raise ValueError(f"not a BPE vocabulary: token {error.object[:40]!r} is not {error.encoding}") from error


def train(text: str, vocab_size: int, progress: Progress = unseen) -> BPETokenizer:
    """`learn` from a text in memory; `progress` is told of it."""

    def told() -> Iterator[str]:
        for begin, end in spans(text, 2**14):
            yield text[begin:end]
            progress("learning a vocabulary", end / len(text))

    return learn(told(), vocab_size)


def learn(parts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """The byte-level BPE of a text: its most frequent pairs are merged until there are `vocab_size` tokens.

    The result is a function of (text, vocab_size) and has no special tokens. A short text may have no pairs left
    before there are so many tokens. Of the text only its different words are kept.

    Args:
      parts: of the text, cut as `spans` cuts it.

    Raises:
      UsageError: `vocab_size` is below 256 or above MAX_TOKENS.
    """
    if not 256 <= vocab_size <= MAX_TOKENS:
        raise UsageError(f"a BPE vocabulary of {vocab_size}, expected 256 to {MAX_TOKENS}, such as bpe:4096")
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("learning a BPE vocabulary", "tokenizers", "bpe") from error

    def pieces() -> Iterator[str]:
        # A word costs the trainer the square of its length, so that endless ones are cut where they must be.
        size, limit = 2**14, 2**15
        for text in parts:
            for begin, end in spans(text, size):
                for start in range(begin, end, limit):
                    yield text[start : min(end, start + limit)].encode("utf-8", "ignore").decode()

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
    )
    model.train_from_iterator(pieces(), trainer)
    ids, table = model.get_vocab(), byte_of_letter()
    return BPETokenizer(tuple(bytes(table[letter] for letter in word) for word in sorted(ids, key=ids.__getitem__)))


def spans(text: str, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of `text`, each at least `size` characters, up to LONGEST, but for the last.

    The parts encode to just what the whole encodes to. They are cut before white space that something else follows:
    there a word always begins, since after something else no word goes on with white space, and of several the pattern
    leaves the last to the word that follows. Nor does the cut change the word before it, since the pattern looks ahead
    only past white space, and takes white space at the end of its text whole.

    Where there is no such place in LONGEST characters, it is cut after so many, and again: no token spans that cut. It
    depends on the text alone and is made whatever the `size`, so that parts of parts are cut nowhere else.
    """
    begin = 0
    while begin < len(text):
        end = _place(text, begin + size, begin + LONGEST)
        if end is None and len(text) - begin > LONGEST:
            last = max((found.start() for found in _CUT.finditer(text, begin, begin + size + 1)), default=begin)
            end = _place(text, begin + LONGEST, last + LONGEST) or last + LONGEST
        end = min(end or len(text), len(text))
        yield begin, end
        begin = end


def _place(text: str, first: int, last: int) -> int | None:
    """The first place from `first` to `last` where a word begins with white space."""
    found = _CUT.search(text, first, last + 2)  # a place is seen by the two characters after it
    return found.start() if found else None


def byte_of_letter() -> dict[str, int]:
    """The printable characters that GPT-2's files write for the 256 bytes (bytes_to_unicode of its encoder.py)."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
