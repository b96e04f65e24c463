"""Sealed JSON, atomic writes, and checks that a path can be written to."""

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
def test_unseal_inverts_seal(tree):
    assert repr(files.unseal(files.seal(tree).encode())) == repr(tree)


@given(trees, st.data())
def test_any_change_of_a_sealed_text_is_detected(tree, data):
    whole = files.seal(tree).encode()
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([whole[position] ^ (1 << data.draw(st.integers(0, 7)))])
    for damaged in (whole[:position], whole[:position] + flipped + whole[position + 1 :], whole + b" "):
        with pytest.raises(SealError):
            files.unseal(damaged)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'{"seal": 3}', b"[" * 100_000, b"\xff"])
def test_data_without_a_seal_is_refused(data):
    with pytest.raises(SealError):
        files.unseal(data)


@pytest.mark.parametrize("body", [b"{nope", b'{"a": ' + b"[" * 100_000, b"\xff"])
def test_seal_of_invalid_json_is_refused(body):
    digest = hashlib.sha256(body + b"\n}\n").hexdigest().encode()
    with pytest.raises(SealError, match="it is not JSON"):
        files.unseal(body + b',\n  "seal": "' + digest + b'"\n}\n')


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{nope", "x is not JSON"),
        (b"\xff", "x is not JSON"),
        ("[" * 100_000, "x is not JSON"),
        ("3", "x is 3, expected"),
    ],
)
def test_data_without_a_json_object_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        files.json_object(data, "x")
    assert files.json_object(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}, "a byte order mark is accepted"


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def raise_disk_full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, raise_disk_full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'$"):
            files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_require_writable_names_the_folder_and_leaves_no_files(tmp_path):
    places.require_writable(tmp_path / "new" / "folder", "--runs-dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "x", tmp_path / "file"):
        with pytest.raises(UsageError, match=r"cannot be written to: .*; name another folder: --runs-dir"):
            places.require_writable(folder, "--runs-dir")


def test_require_file_refuses_unwritable_paths(tmp_path):
    places.require_file(None, "--out")
    places.require_file(tmp_path / "new.json", "--out")
    assert list(tmp_path.iterdir()) == []
    for path, message in (
        (tmp_path, "is a folder or a device: name a file, --out FILE"),
        (Path("/dev/null"), "is a folder or a device"),
        (tmp_path / "no" / "x.json", "there is no folder"),
    ):
        with pytest.raises(UsageError, match=message):
            places.require_file(path, "--out")


def test_atomic_write_syncs_the_file_and_then_its_entry(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append((os.fstat(file).st_ino, file)))
    files.write_atomically(tmp_path / "file", b"new")
    assert [inode for inode, _ in synced] == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
    for _, file in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
