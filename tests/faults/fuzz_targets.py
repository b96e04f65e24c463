"""Fuzz targets: the readers of untrusted files, each as a function of bytes.

For any bytes, a reader must return a valid object or raise the error that it documents. If a target raises, its reader
has a bug. `scripts/fuzz` looks for such inputs; `test_fuzz_targets.py` replays those found before. For a reader of
several files, an input is the name (or the text) of one of them, a zero byte, and the file.
"""

import atexit
import functools
import gzip
import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import config as configs
from jaxgpt import corpus, files, tokenizer
from jaxgpt.cli import corpora
from jaxgpt.huggingface import gpt2 as gpt2_folder
from jaxgpt.prepare import documents
from jaxgpt.prepare import vocabularies as vocabulary
from jaxgpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, UnknownCharacterError

TINY = Path(__file__).parents[1] / "goldens" / "hf-gpt2-tiny"
TEXT = "the cat sat\n"


@dataclass(frozen=True)
class Target:
    """A reader: the function to run on bytes, and the seed inputs."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def run_config(data: bytes) -> None:
    try:
        config = configs.from_tree(files.json_object(data, "the config"))
    except ValueError:
        return
    assert configs.from_tree(json.loads(json.dumps(asdict(config)))) == config


def seeds_config() -> list[bytes]:
    default = json.dumps(asdict(configs.Config())).encode()
    return [default, b"{}", b'{"model": {"n_embd": 64, "n_head": 4}, "train": {"steps": 9, "eval_every": 50}}']


def run_meta(data: bytes) -> None:
    """tokens.json without its seal, which would refuse every mutation."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(tree, dict):
        return
    try:
        meta = corpus.checked_meta(tree)
        corpora.folders_of(meta, TINY)
        tok = tokenizer.from_json(meta["tokenizer"])
    except ValueError as error:
        _refuse_unicode_error(error)
        return
    names = [] if "parts" in meta else [shard["file"] for shard in meta["shards"]]
    assert all(name == Path(name).name for name in names), "the file of a shard is outside its folder"
    assert tokenizer.from_json(tok.to_json()) == tok
    assert len(tok.token_bytes) == tok.vocab_size
    tok.decode(np.arange(tok.vocab_size))
    try:
        assert tok.decode(tok.encode(TEXT)) == TEXT
    except UnknownCharacterError:
        assert not tok.knows(TEXT).all()


def seeds_meta() -> list[bytes]:
    tokenizers = [CharTokenizer.train(TEXT), CharTokenizer("é\ud83d\ude42🙂"), ByteTokenizer(), _tiny_bpe()]
    plain = {"format": corpus.FORMAT, "dtype": "uint16", "count": 3, "sha256": "", "source": "a", "origin": "b"}
    plain |= {"source_sha256": "", "notes": [], "skipped_characters": 0}
    shards = {"shards": [{"file": "tokens-00000.bin", "count": 3, "sha256": ""}]}
    parts = {"parts": [{"source": "a", "count": 1, "sha256": ""}, {"source": "b", "count": 2, "sha256": ""}]}
    metas = [plain | more | {"tokenizer": tok.to_json()} for tok in tokenizers for more in (shards, parts)]
    return [json.dumps(meta).encode() for meta in metas]


def run_gpt2_folder(data: bytes) -> None:
    """config.json, model.safetensors, its header alone, or the index of shards, in a folder that is otherwise valid."""
    name, _, content = data.partition(b"\0")
    folder = _folders().get(name.decode("latin-1"))
    if folder is None:
        return
    if name == b"header":
        content = struct.pack("<Q", len(content)) + content + _tensors()[1]
        name = b"model.safetensors"
    (folder / name.decode()).write_bytes(content)
    try:
        config, params = gpt2_folder.load(folder)
    except gpt2_folder.InteropError:
        return
    found = gpt2_folder.to_tensors(config, params)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        row.name: row.shape for row in gpt2_folder.table(config)
    }
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(np.float32)}


def seeds_gpt2_folder() -> list[bytes]:
    header = _tensors()[0]
    first = min(json.loads(header).keys() - {"__metadata__"})
    index = {"metadata": {"total_size": 9}, "weight_map": {first: "shard.safetensors"}}
    return [
        b"config.json\0" + (TINY / "config.json").read_bytes(),
        b"header\0" + header,
        b"header\0" + header.replace(b'"F32"', b'"F8_E4M3"', 1),
        b"model.safetensors\0" + (TINY / "model.safetensors").read_bytes()[:3000],
        b"model.safetensors.index.json\0" + json.dumps(index).encode(),
        b'model.safetensors.index.json\0{"weight_map": {"a": "../elsewhere/model.safetensors", "b": "/etc/passwd"}}',
    ]


def run_vocabulary(data: bytes) -> None:
    """merges.txt, a zero byte and vocab.json."""
    merges, _, ids = data.decode("utf-8", "replace").partition("\0")
    try:
        tok = vocabulary.parse(merges, ids)
    except ValueError as error:
        _refuse_unicode_error(error)
        return
    assert tok.decode(tok.encode(TEXT)) == TEXT


def seeds_vocabulary() -> list[bytes]:
    letters = {byte: letter for letter, byte in vocabulary.byte_of_letter().items()}
    tokens = ["".join(letters[byte] for byte in token) for token in _tiny_bpe().tokens]
    ids = {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}
    return [f"#version: 0.2\nt h\nth e\n\0{json.dumps(ids, ensure_ascii=False)}".encode(), b"\0{}"]


def run_text(data: bytes) -> None:
    """A text file by its name: .jsonl, .jsonl.gz or any other."""
    name, _, content = data.partition(b"\0")
    if name not in (b"a.txt", b"a.jsonl", b"a.jsonl.gz"):
        return
    path = _scratch() / name.decode()
    path.write_bytes(content)
    try:
        text = "".join(documents.normalized(documents.pieces(path, "text")))
    except documents.SourceError:
        return
    assert "\r" not in text


def seeds_text() -> list[bytes]:
    rows = b'{"text": "the cat"}\r\n\n{"id": 3, "text": "\\u2028 \\ud800 sat"}\n'
    return [
        b"a.jsonl\0" + rows,
        b"a.jsonl.gz\0" + gzip.compress(rows, mtime=0),
        b"a.jsonl.gz\0" + gzip.compress(bytes(10**6), mtime=0),
        b"a.txt\0\xef\xbb\xbfa\r\nb\rc",
        b"a.txt\0" + "é".encode("utf-16"),
    ]


def run_seal(data: bytes) -> None:
    try:
        tree = files.unseal(data)
    except files.SealError:
        return
    assert files.seal(tree).encode() == data


def seeds_seal() -> list[bytes]:
    sealed = files.seal({"a": [1, 2.5, None, True], "é": {"b": "\ud800"}}).encode()
    return [sealed, b'{"seal": ""}', sealed.decode().encode("utf-16")]


def mutated(data: bytes, seed: int) -> bytes:
    """`data` with values of its JSON replaced, removed or inserted; if it is not JSON, with a few bytes changed.

    Byte mutations rarely give valid JSON. Bugs are found by values of another type, such as a list instead of a string.
    """
    rng = random.Random(seed)
    prefix, zero, content = data.rpartition(b"\0")
    try:
        root = [json.loads(content)]
    except (ValueError, RecursionError):
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.randbytes(rng.randrange(3)) + data[at + rng.randrange(2) :]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parent: Any = root
        while True:
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            if not isinstance(parent[key], dict | list) or not parent[key] or rng.random() < 0.3:
                break
            parent = parent[key]
        choice = rng.random()
        if choice < 0.7:
            parent[key] = _odd_value(rng, parent[key])
        elif parent is not root and choice < 0.8:
            del parent[key]
        elif isinstance(parent, dict):
            parent[rng.choice([str(_odd_value(rng, "")), str(key) + "_", *parent])] = _odd_value(rng, parent[key])
        elif parent is not root:
            parent.insert(rng.randrange(len(parent) + 1), rng.choice(parent))
    try:
        return prefix + zero + json.dumps(root[0], ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a number with too many digits, or nesting too deep to write
        return data


def _odd_value(rng: random.Random, value: Any) -> Any:
    deep: Any = []
    for _ in range(rng.choice((5, 200, 900))):
        deep = [deep]
    values = [None, True, False, "", "a", "\ud800", "🙂" * 300, {}, [], {"a": 1}, [[]], deep]
    values += [0, 1, -1, 2, 255, 2**16, 10**9, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**400, 10**4299]
    values += [-0.0, 1e-320, 1e308, float("nan"), float("inf")]
    if type(value) in (int, float):
        values += [value + 1, value - 1, value * 2, -value, value * 10**5, "3"] * 2
    return rng.choice(values)


def nested(depth: int) -> list[bytes]:
    """JSON inputs nested to `depth`: one for each place where a reader examines or prints a value."""
    deep = b"[" * depth + b"]" * depth
    return [
        deep,
        b'{"a":' * depth + b"0" + b"}" * depth,
        b'{"model": {"n_head": %s}, "seal": 1}' % deep,
        b'{"model": %s}' % deep,
        *(seeds_meta()[0].replace(old, deep) for old in (b'"char"', b'"uint16"')),
        seeds_meta()[-1].replace(b'["', b"[" + deep + b',"', 1),
        b'config.json\0{"model_type": %s}' % deep,
        b'config.json\0{"model_type": "gpt2", "activation_function": %s}' % deep,
        b'config.json\0{"model_type": "gpt2", "n_embd": %s}' % deep,
        b"header\0" + deep,
        b'model.safetensors.index.json\0{"weight_map": {"a": %s}}' % deep,
        b"\0" + deep,
        b'\0{"<|endoftext|>": %s}' % deep,
        b'a.jsonl\0{"text": %s}' % deep,
    ]


def _refuse_unicode_error(error: ValueError) -> None:
    """Raise UnicodeErrors: readers document ValueError, but must not leak this subclass."""
    if isinstance(error, UnicodeError):
        raise error


def _tiny_bpe() -> BPETokenizer:
    return BPETokenizer((*ByteTokenizer().token_bytes, b"th", b"the"), ("<|endoftext|>",))


@functools.cache
def _scratch() -> Path:
    """A temporary folder, deleted when this process exits."""
    folder = tempfile.mkdtemp(prefix="jaxgpt-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _folders() -> dict[str, Path]:
    """For each file that an input replaces, a GPT-2 folder in which all other files are valid."""
    found = {}
    for name in ("config.json", "model.safetensors", "header", "model.safetensors.index.json"):
        found[name] = Path(shutil.copytree(TINY, _scratch() / name.replace(".", "-")))
    sharded = found["model.safetensors.index.json"]  # the index is read only if there is no model.safetensors
    (sharded / "model.safetensors").rename(sharded / "shard.safetensors")
    return found


@functools.cache
def _tensors() -> tuple[bytes, bytes]:
    """The JSON header of the tiny model's safetensors file, and the tensor data after it."""
    data = (TINY / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end], data[end:]


TARGETS = {
    "config": Target(run_config, seeds_config),
    "meta": Target(run_meta, seeds_meta),
    "gpt2-folder": Target(run_gpt2_folder, seeds_gpt2_folder),
    "vocabulary": Target(run_vocabulary, seeds_vocabulary),
    "text": Target(run_text, seeds_text),
    "seal": Target(run_seal, seeds_seal),
}
