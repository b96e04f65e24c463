"""GPT-2's own vocabulary, from its two files or from tiktoken."""

import json
import os
from pathlib import Path

from jaxgpt.config import MissingExtraError
from jaxgpt.text.bpe import BPETokenizer, byte_of_letter
from jaxgpt.text.files import SourceError
from jaxgpt.text.sources import cache_dir, require_sha256

END_OF_TEXT = "<|endoftext|>"
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# The names of OpenAI and of Hugging Face for the same file, and its SHA-256 as in tiktoken_ext/openai_public.py.
MERGES = ("vocab.bpe", "merges.txt"), "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCABULARY = ("encoder.json", "vocab.json"), "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def load() -> BPETokenizer:
    """GPT-2's tokenizer: 50,256 tokens and <|endoftext|>.

    Its files are looked for in $JAXGPT_DATA (or beside it, if that is a file), in data/ and in the cache; where one
    is missing, tiktoken is asked, which has a cache of its own and else downloads them.

    Raises:
      SourceError: they are not to be had, or are not the expected ones.
    """
    merges, vocabulary = (_find(names) for names, _ in (MERGES, VOCABULARY))
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
    table = byte_of_letter()

    def spelled(word: str) -> bytes:
        if other := set(word) - table.keys():
            raise ValueError(f"character {min(other)!r} stands for no byte in GPT-2's files")
        return bytes(table[letter] for letter in word)

    try:
        ids = json.loads(vocabulary)
    except RecursionError as error:
        raise ValueError(f"the vocabulary is not JSON: {error}") from error
    if not isinstance(ids, dict) or END_OF_TEXT not in ids or any(type(i) is not int for i in ids.values()):
        raise ValueError(f"the vocabulary is no JSON object of token to id, {END_OF_TEXT} among them")
    special = ids.pop(END_OF_TEXT)
    tokens = tuple(map(spelled, sorted(ids, key=ids.__getitem__)))
    merged = tuple(spelled(line.replace(" ", "")) for line in merges.splitlines()[1:])
    if special != len(ids) or sorted(ids.values()) != list(range(len(ids))) or tokens[256:] != merged:
        raise ValueError("the merges and the vocabulary do not agree: expected 256 bytes, then the merges in order")
    return BPETokenizer(tokens, (END_OF_TEXT,))


def _find(names: tuple[str, ...]) -> Path | None:
    candidates = (folder / name for folder in _folders() for name in names)
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
