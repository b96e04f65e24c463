import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import files
from jaxgpt.cli import places
from jaxgpt.config import UsageError
from jaxgpt.files import SealError

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4)
trees = st.dictionaries(st.text().filter(lambda key: key != "seal"), values, min_size=1)


@given(trees)
def test_what_is_sealed_comes_back(tree):
    assert repr(files.unseal(files.seal(tree).encode())) == repr(tree)


@given(trees, st.data())
def test_no_byte_of_a_sealed_text_changes_unseen(tree, data):
    whole = files.seal(tree).encode()
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))])
    for damaged in (whole[:place], whole[:place] + flipped + whole[place + 1 :], whole + b" "):
        with pytest.raises(SealError):
            files.unseal(damaged)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'{"seal": 3}', b"[" * 100_000, b"\xff"])
def test_what_was_never_sealed_is_refused(data):
    with pytest.raises(SealError):
        files.unseal(data)


@pytest.mark.parametrize("body", [b"{nope", b'{"a": ' + b"[" * 100_000, b"\xff"])
def test_a_seal_of_what_is_not_json_is_refused(body):
    digest = hashlib.sha256(body + b"\n}\n").hexdigest().encode()
    with pytest.raises(SealError, match="it is not JSON"):
        files.unseal(body + b',\n  "seal": "' + digest + b'"\n}\n')


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        patch.setattr("pathlib.Path.replace" if call == "replace" else "os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_that_cannot_be_written_to_is_named_and_one_that_can_is_left_empty(tmp_path):
    places.require_writable(tmp_path / "new" / "folder", "--runs-dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "x", tmp_path / "file"):
        with pytest.raises(UsageError, match=r"cannot be written to: .*; name another folder: --runs-dir"):
            places.require_writable(folder, "--runs-dir")


def test_a_file_that_cannot_be_written_is_reported_before_there_is_anything_to_write(tmp_path):
    places.require_file(None, "--out")
    places.require_file(tmp_path / "new.json", "--out")
    assert list(tmp_path.iterdir()) == []
    for path, said in (
        (tmp_path, "is a folder or a device: name a file, --out FILE"),
        (Path("/dev/null"), "is a folder or a device"),
        (tmp_path / "no" / "x.json", "there is no folder"),
    ):
        with pytest.raises(UsageError, match=said):
            places.require_file(path, "--out")
