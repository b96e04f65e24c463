"""The tokenizer that --tokenizer names: a fixed one, one learned from the text, or one from files."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from jaxgpt.config import MissingExtraError, UsageError
from jaxgpt.prepare.files import SourceError
from jaxgpt.prepare.sources import Text, data_folders, require_sha256
from jaxgpt.tokenizer import (
    MAX_TOKEN_BYTES,
    MAX_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    split_words,
)
from jaxgpt.vocabulary import MERGES, VOCABULARY, byte_of_letter, find_file, parse, read_tokenizer

KINDS = {"char": "char", "ascii": "char", "byte": "byte", "gpt2": "bpe", "bpe": "bpe"}
"""The kind of tokenizer that --tokenizer gives, by its value before a colon."""
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SHA256 = {
    MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    VOCABULARY: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""Of GPT-2's two files, as in tiktoken_ext/openai_public.py."""


def tokenizer_for(spec: str, texts: Sequence[Text], progress: Callable[[str, float], None]) -> Tokenizer:
    """The tokenizer for texts.

    Args:
      spec: "char" (the characters of the texts), "ascii" (line feed and the 95 printable characters), "byte", "gpt2",
        "bpe:SIZE" (learned from the texts), or a path as in `read_tokenizer`.

    Raises:
      UsageError: `spec` is not a tokenizer, or it is unavailable.
    """

    def pieces() -> Iterator[str]:
        for i, text in enumerate(texts):
            yield "\n" * bool(i and spec != "char")
            yield from text.pieces([], partial(progress, "learning a vocabulary"))

    match spec:
        case "char":
            return CharTokenizer.train(pieces())
        case "ascii":
            return CharTokenizer("\n" + "".join(map(chr, range(32, 127))))
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return load_gpt2()
        case _ if re.fullmatch("bpe:[0-9]{1,7}", spec):
            return learn_bpe(pieces(), int(spec.removeprefix("bpe:")))
    return read_tokenizer(Path(spec))


def learn_bpe(pieces: Iterable[str], vocab_size: int) -> BPETokenizer:
    """The byte-level BPE of a text in pieces: the most frequent pair is merged until there are `vocab_size` tokens.

    The result is a function of (text, vocab_size) and has no special tokens. A short text may run out of pairs before.
    Only the distinct words of the text are in memory.

    Raises:
      UsageError: `vocab_size` is below 256 or above MAX_TOKENS.
    """
    if not 256 <= vocab_size <= MAX_TOKENS:
        raise UsageError(f"a BPE vocabulary of {vocab_size}, expected 256 to {MAX_TOKENS}, such as bpe:4096")
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("learning a BPE vocabulary", "tokenizers", "bpe") from error

    def parts() -> Iterator[str]:
        limit = 2**15  # the trainer takes the square of the length of a word
        for part in split_words(pieces, 2**14):
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
    model.train_from_iterator(parts(), trainer)
    ids, byte_of = model.get_vocab(), byte_of_letter()
    return BPETokenizer(tuple(bytes(byte_of[letter] for letter in word) for word in sorted(ids, key=ids.__getitem__)))


def load_gpt2() -> BPETokenizer:
    """GPT-2's tokenizer: 50,256 tokens and <|endoftext|>.

    Its two files are taken from `data_folders`; without them tiktoken has them in its own cache or downloads them.

    Raises:
      SourceError: they are unavailable or are not the expected files.
    """
    folders = data_folders()
    paths = {names: path for names in SHA256 if (path := find_file(names, folders))}
    if len(paths) == 2:
        for names, path in paths.items():
            require_sha256(path.read_bytes(), SHA256[names], str(path))
        return parse(paths[MERGES].read_text("utf-8"), paths[VOCABULARY].read_bytes())
    try:
        import tiktoken
    except ImportError as error:
        raise MissingExtraError("GPT-2's vocabulary", "tiktoken", "bpe") from error
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        wanted = "".join(
            f"\n  {URL}{names[0]} (or {names[1]} of Hugging Face's gpt2)\n    SHA-256 {sha256}"
            for names, sha256 in SHA256.items()
        )
        raise SourceError(
            f"GPT-2's vocabulary is not in {', '.join(map(str, folders))}, and tiktoken cannot fetch it ({error}); "
            f"fetch these two files elsewhere and put them into one of those folders:{wanted}"
        ) from error
    return BPETokenizer(tuple(map(encoding.decode_single_token_bytes, range(encoding.n_vocab - 1))), ("<|endoftext|>",))
