"""No file makes a reader hang, use too much memory, or raise an undocumented error: seeds, mutations, old findings."""

import gzip
import importlib.util
import inspect
import json
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.huggingface import gpt2
from jaxgpt.huggingface.gpt2 import InteropError
from jaxgpt.prepare import documents
from jaxgpt.prepare.sources import SourceError
from tests.faults.fuzz_targets import TARGETS, TINY, mutated, nested

ROOT = Path(__file__).parents[2]
REGRESSIONS = sorted((ROOT / "tests" / "faults" / "regressions").glob("*/*"))
READERS = pytest.mark.parametrize("reader", TARGETS)


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_old_findings_stay_fixed(path):
    TARGETS[path.parent.name].run(path.read_bytes())


@READERS
def test_readers_handle_their_seeds(reader):
    for data in TARGETS[reader].seeds():
        TARGETS[reader].run(data)


@READERS
@given(data=st.data())
def test_readers_handle_mutated_seeds(reader, data):
    content = data.draw(st.sampled_from(TARGETS[reader].seeds()))
    for seed in data.draw(st.lists(st.integers(0, 2**32), min_size=1, max_size=4)):
        content = mutated(content, seed)
    TARGETS[reader].run(content)


@READERS
@given(st.binary(max_size=64))
def test_readers_handle_any_bytes(reader, data):
    for prefix in (b"", b"header\0", b"a.jsonl.gz\0"):
        TARGETS[reader].run(prefix + data)


@READERS
def test_readers_handle_nesting_of_any_depth(reader):
    """Reading and writing overflow the stack at depths a few levels apart, near the recursion limit."""
    left = sys.getrecursionlimit() - len(inspect.stack(0))
    for depth in (*range(left - 30, left + 1), 3000, 9000, 100_000):
        for data in nested(depth):
            TARGETS[reader].run(data)


@pytest.fixture
def peak():
    """peak(): the most bytes that Python and NumPy have held during this test."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_gzip_bomb_is_refused_before_it_fills_memory(tmp_path, peak):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 2**20) * 200)
    with pytest.raises(SourceError, match=r"a\.jsonl\.gz unpacks to more than 67,108,864 bytes"):
        list(documents.pieces(path, "text"))
    assert peak() < 2**27


def test_a_highly_compressible_text_is_not_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "the cat"}\n' * 100_000))
    assert len("".join(documents.pieces(path, "text"))) == 9 * 100_000 - 2


def write_folder(tmp_path, header, size=0, **config):
    """Write a GPT-2 folder: `header`, `size` zero bytes of tensor data, and a config with replaced values."""
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    tree = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | config))
    return tmp_path


@pytest.mark.parametrize("name", ["n_layer", "vocab_size", "n_positions", "n_embd"])
def test_a_huge_number_in_a_config_allocates_no_memory(tmp_path, peak, name):
    folder = write_folder(tmp_path, {}, **{name: 2**31 - 4})
    with pytest.raises(InteropError, match=r"do not fit|n_layer is"):
        gpt2.load(folder)
    assert peak() < 2**24


@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.bias", "../../a"])
@pytest.mark.parametrize("kind", ["F32", "U8", "F8_E4M3"])
def test_a_tensor_that_does_not_match_the_model_is_not_read(tmp_path, peak, name, kind):
    length = 2**28
    shape = [length // 4] if kind == "F32" else [length]
    header = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, length]}}
    with pytest.raises(InteropError, match=r"do not fit|n_layer is|expected F32, BF16, F16"):
        gpt2.load(write_folder(tmp_path, header, length))
    assert peak() < 2**24
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    header = {"wte.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    with pytest.raises(InteropError, match="cannot be read"):
        gpt2.load(write_folder(tmp_path, header, 16))


def test_two_names_for_one_tensor_are_refused(tmp_path):
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = {"wte.weight": one, "transformer.wte.weight": one | {"data_offsets": [4, 8]}}
    with pytest.raises(InteropError, match=r"holds 'wte\.weight' a second time"):
        gpt2.load(write_folder(tmp_path, header, 8))


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_half_precision_is_read_as_float32(tmp_path, kind):
    data = (TINY / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, offset = json.loads(data[8:end]), 0
    for value in header.values():
        if "dtype" in value:
            size = 2 * int(np.prod(value["shape"]))
            value |= {"dtype": kind, "data_offsets": [offset, offset + size]}
            offset += size
    _, params = gpt2.load(write_folder(tmp_path, header, offset))
    assert params["wte"]["embedding"].dtype == np.float32


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a" * 300, "\ud800"]
)
def test_an_index_that_names_a_file_outside_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    write_folder(folder, {})
    (folder / "model.safetensors").unlink()
    for value in (name, name + ".safetensors", [name], {name: name}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": value}}))
        with pytest.raises(InteropError, match="has no file"):
            gpt2.load(folder)


@pytest.mark.slow
def test_a_short_fuzzing_run_has_no_findings(tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs Atheris: pip install --group fuzz (Linux)")
    command = [sys.executable, ROOT / "scripts" / "fuzz", "--seconds", "1", "--keep", tmp_path, *TARGETS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"coverage +[1-9].* no finding\n", done.stdout)) == len(TARGETS), done.stdout


def test_a_finding_is_kept_in_the_folder_of_its_reader(tmp_path):
    """Fuzz a reader in which `json.loads` always fails."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs Atheris: pip install --group fuzz (Linux)")
    (tmp_path / "sitecustomize.py").write_text("import json\njson.loads = lambda *_: 1 // 0\n")
    command = [sys.executable, ROOT / "scripts" / "fuzz", "--seconds", "1", "--keep", tmp_path / "kept", "config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ZeroDivisionError" in done.stdout
    [kept] = (tmp_path / "kept" / "config").iterdir()
    assert f"kept as {kept}" in done.stdout


@pytest.mark.smoke
def test_an_unknown_reader_is_refused_by_name():
    command = [sys.executable, ROOT / "scripts" / "fuzz", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no reader 'nonsense', expected one of config, meta" in done.stderr
