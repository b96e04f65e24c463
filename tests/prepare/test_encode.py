"""A corpus that is encoded in parts, into shards, has the ids of the whole text encoded in memory."""

import contextlib
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import filelock
import numpy as np
import pytest

from jaxgpt import files
from jaxgpt.cli.corpora import find_prepared
from jaxgpt.config import Config, DataConfig
from jaxgpt.corpus import CorpusError, load
from jaxgpt.prepare import build, encode, sources
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.prepare.sources import SourceError
from jaxgpt.run import Run
from jaxgpt.tokenizer import UnknownCharacterError

LINES = "".join(f"{i} the cat sat on the mat, that cat has a hat\n" for i in range(300))


@pytest.fixture
def small_shards(monkeypatch):
    """Parts and shards so small that a short text has many."""
    monkeypatch.setattr(encode, "PART", 40)
    monkeypatch.setattr(encode, "LONGEST_WORD", 80)
    monkeypatch.setattr(encode, "SHARD", 700)
    monkeypatch.setattr("jaxgpt.prepare.documents.PIECE", 64)


@pytest.mark.parametrize("spec", ["char", "byte", "bpe:300"])
def test_shards_hold_the_ids_of_the_text(tmp_path, small_shards, spec):
    path = tmp_path / "a.txt"
    path.write_text(LINES.replace("\n", "\r\n"), newline="")
    done = prepare_corpus(str(path), spec, data_dir=tmp_path / "data")
    names = sorted(path.name for path in done.folder.iterdir())
    assert len(names) > 3
    assert names == [*(f"tokens-{i:05}.bin" for i in range(len(names) - 1)), "tokens.json"]
    assert [folder.name for folder in (tmp_path / "data").iterdir()] == [done.folder.name]  # no partial folder is left
    found = load(done.folder)
    np.testing.assert_array_equal(np.asarray(found.tokens), found.tokenizer.encode(LINES))
    assert found.meta["sha256"] == hashlib.sha256(np.asarray(found.tokens).tobytes()).hexdigest()
    assert found.meta["source_sha256"] == hashlib.sha256(LINES.encode()).hexdigest()
    assert found.meta["count"] == len(found.tokens)
    assert prepare_corpus(str(path), spec, data_dir=tmp_path / "data").reused
    assert [folder.name for folder in (tmp_path / "data").iterdir()] == [done.folder.name]


def test_unknown_character_is_reported_by_file_and_line(tmp_path, small_shards):
    (tmp_path / "texts").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "texts" / "b.txt"):
        path.write_text(LINES + "é")
    (tmp_path / "texts" / "a.txt").write_text(LINES)
    for corpus, path in (("a.txt", "a.txt"), ("texts", "texts/b.txt")):
        with pytest.raises(UnknownCharacterError) as caught:
            prepare_corpus(str(tmp_path / corpus), "ascii", data_dir=tmp_path / "data")
        where = f"line 301 of the text in {tmp_path / path}"
        assert f"'é' (U+00E9, LATIN SMALL LETTER E WITH ACUTE) at {where} is not among the 96" in str(caught.value)
    done = prepare_corpus(str(tmp_path / "a.txt"), "ascii", unknown="skip", data_dir=tmp_path / "data")
    assert done.corpus.meta["skipped_characters"] == 1
    assert done.corpus.tokenizer.decode(np.asarray(done.corpus.tokens)) == LINES


def test_a_vocabulary_of_more_than_65536_tokens_has_wide_ids(tmp_path):
    text = "".join(map(chr, range(2**16, 2**17 + 100)))
    (tmp_path / "a.txt").write_text(text)
    done = prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data")
    assert done.corpus.tokens[-1] == 2**16 + 99
    assert done.corpus.tokenizer.decode(np.asarray(done.corpus.tokens)) == text


def test_white_space_around_a_dropped_surrogate_is_encoded_as_a_whole(tmp_path, small_shards):
    text = "ab\t\t\ud800\tcd\n" * 100
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    corpus = prepare_corpus(str(tmp_path / "a.jsonl"), "bpe:300", unknown="skip", data_dir=tmp_path / "data").corpus
    assert b"\t\t" in corpus.tokenizer.tokens
    assert corpus.meta["skipped_characters"] == 100, "of all parts"
    np.testing.assert_array_equal(corpus.tokens, corpus.tokenizer.encode(text.replace("\ud800", "")))


def test_shard_sizes(tmp_path, small_shards):
    """A shard ends with the part that fills it, the last one with the text."""
    for n, counts in ((80, [80]), (600, [600]), (720, [720]), (721, [720, 1]), (1500, [720, 720, 60])):
        (tmp_path / "a.txt").write_text("a" * n)
        done = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
        assert [shard["count"] for shard in done.corpus.meta["shards"]] == counts


def test_a_text_goes_on_after_a_shard_of_exactly_the_least_size(tmp_path, small_shards, monkeypatch):
    """As one without white space, whose parts have equal sizes."""
    monkeypatch.setattr(encode, "SHARD", 160)
    for n, counts in ((160, [160]), (161, [160, 1]), (400, [160, 160, 80])):
        (tmp_path / "a.txt").write_text("a" * n)
        done = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
        assert [shard["count"] for shard in done.corpus.meta["shards"]] == counts


def test_failed_preparation_leaves_no_files(tmp_path, small_shards):
    (tmp_path / "a.txt").write_text("a" * 1500 + "é")
    with pytest.raises(UnknownCharacterError):
        prepare_corpus(str(tmp_path / "a.txt"), "ascii", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_files_of_a_killed_process_are_replaced(tmp_path, small_shards):
    (tmp_path / "a.txt").write_text(LINES)
    no_cleanup = mock.patch.object(build.shutil, "rmtree")
    with (
        no_cleanup,
        mock.patch.object(build, "folder_of", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    (work,) = (tmp_path / "data").iterdir()
    assert len(list(work.glob("tokens-*.bin"))) > 3
    (work / "tokens-00099.bin").write_bytes(b"torn")
    done = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    assert bytes(np.asarray(done.corpus.tokens).astype(np.uint8)) == LINES.encode()
    assert [folder.name for folder in (tmp_path / "data").iterdir()] == [done.folder.name]
    assert not (done.folder / "tokens-00099.bin").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupted(at, corpus, spec, **kwargs):
    """Run `prepare_corpus`, but interrupt it at its `at`-th call of `files.sync`, and then return None."""
    n = 0

    def counted(path):
        nonlocal n
        n += 1
        if n == at:
            raise KeyboardInterrupt

    with mock.patch.object(files, "sync", counted), contextlib.suppress(KeyboardInterrupt):
        return prepare_corpus(corpus, spec, **kwargs)


@pytest.mark.parametrize(("spec", "unknown"), [("bpe:300", "skip"), ("ascii", "skip"), ("char", "error")])
def test_interrupted_preparation_resumes_to_the_same_files(tmp_path, small_shards, capsys, spec, unknown):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(LINES[:2000].replace("mat", "mät \x1c\u2028") + "x" * 1000, newline="")
    rows = [f"{i} \ud800 row \ud800\n of a {'long' * (i % 40)} document\r\n" for i in range(60)]
    (texts / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (texts / "c.txt").write_text("\ufeff" + " \n" * 300 + LINES[:1000])

    def prepare(name, at=0):
        return interrupted(at, str(texts), spec, unknown=unknown, data_dir=tmp_path / name)

    expected = contents(prepare("whole").folder)
    assert len(expected) > 4
    # The least n that interrupts nothing: a preparation calls `files.sync` n - 1 times.
    n = next(n for n in range(1, 100) if prepare(f"once-{n}", n) and capsys.readouterr())
    assert n > 3 * (len(expected) - 2)
    capsys.readouterr()
    for at in range(2, n):
        done = prepare(f"once-{at}")
        assert contents(done.folder) == expected, at
        assert list((tmp_path / f"once-{at}").iterdir()) == [done.folder]
    for i in range(100):
        if done := prepare("often", 5 + i % 2):
            break
    assert 1 < i < 99
    assert contents(done.folder) == expected
    assert capsys.readouterr().err.count("the same command will continue from") == i


def test_preparation_that_skipped_characters_is_not_continued_by_one_that_reports_them(tmp_path, small_shards):
    (tmp_path / "a.txt").write_text("é" + LINES)
    assert interrupted(8, str(tmp_path / "a.txt"), "ascii", unknown="skip", data_dir=tmp_path / "data") is None
    with pytest.raises(UnknownCharacterError):
        prepare_corpus(str(tmp_path / "a.txt"), "ascii", data_dir=tmp_path / "data")


def test_preparation_starts_over_only_if_text_already_encoded_has_changed(tmp_path, small_shards, capsys):
    path = tmp_path / "a.txt"
    for n, text in enumerate(["b" + LINES[1:], LINES[:1000], LINES[:-1] + "!", LINES[:1500]]):
        path.write_text(LINES)
        assert interrupted(8, str(path), "byte", data_dir=tmp_path / f"{n}") is None
        path.write_text(text)
        capsys.readouterr()
        done = prepare_corpus(str(path), "byte", data_dir=tmp_path / f"{n}")
        assert capsys.readouterr().err.count(f"{path} has changed: its preparation starts over") == (n < 2)
        assert contents(done.folder) == contents(prepare_corpus(str(path), "byte", data_dir=tmp_path / "new").folder)


def test_preparation_starts_over_if_a_changed_text_is_read_up_to_exactly_its_position(
    tmp_path, small_shards, monkeypatch, capsys
):
    monkeypatch.setattr("jaxgpt.prepare.documents.PIECE", 80)  # a shard of such a text has 720 characters
    path = tmp_path / "a.txt"
    path.write_text("a" * 3000)
    assert interrupted(8, str(path), "byte", data_dir=tmp_path / "data") is None
    path.write_text("b" + "a" * 2999)
    done = prepare_corpus(str(path), "byte", data_dir=tmp_path / "data")
    assert f"{path} has changed: its preparation starts over" in capsys.readouterr().err
    assert done.corpus.tokenizer.decode(done.corpus.tokens) == path.read_text()


def test_preparation_starts_over_if_its_progress_file_is_damaged(tmp_path, small_shards, capsys):
    (tmp_path / "a.txt").write_text(LINES)
    assert interrupted(8, str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data") is None
    (record,) = (tmp_path / "data").glob(".*.part/progress.json")
    record.write_text(record.read_text().replace("position", "positron"))
    done = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    assert "progress.json is damaged: its preparation starts over" in capsys.readouterr().err
    assert bytes(np.asarray(done.corpus.tokens).astype(np.uint8)) == LINES.encode()


@pytest.fixture
def on_lock_wait(monkeypatch):
    """on_lock_wait(action): call `action` whenever a thread waits for a lock without a timeout."""
    acquire = filelock.FileLock.acquire

    def install(action):
        def wrapped(self, timeout=None, **kwargs):
            if timeout == -1:
                action()
            return acquire(self, timeout, **kwargs)

        monkeypatch.setattr(filelock.FileLock, "acquire", wrapped)

    return install


def test_second_preparation_waits_for_the_first_and_reuses_its_files(
    tmp_path, small_shards, monkeypatch, on_lock_wait, capsys
):
    path, rename = tmp_path / "a.txt", build._rename
    path.write_text(LINES)
    renaming, waiting = threading.Event(), threading.Event()
    on_lock_wait(waiting.set)

    def slow(*args):
        renaming.set()
        assert waiting.wait(60)
        rename(*args)

    monkeypatch.setattr(build, "_rename", slow)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(prepare_corpus, str(path), "byte", data_dir=tmp_path / "data")
        assert renaming.wait(60)
        second = prepare_corpus(str(path), "byte", data_dir=tmp_path / "data")
    assert (first.result().reused, second.reused) == (False, True)
    assert second.corpus.meta == first.result().corpus.meta
    assert capsys.readouterr().err.count("waiting for it") == 1
    assert [folder.name for folder in (tmp_path / "data").iterdir()] == [second.folder.name]
    assert ".lock" not in [path.name for path in second.folder.iterdir()]


def test_full_disk_is_reported_and_leaves_no_files(tmp_path, small_shards):
    (tmp_path / "a.txt").write_text(LINES)
    full = mock.patch("os.fsync", side_effect=OSError(28, "No space left on device"))
    with (
        full,
        pytest.raises(
            CorpusError, match=r"data cannot be written: No space left on device; name another folder: --data-dir"
        ),
    ):
        prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text", [LINES, LINES[:60]])
def test_prepared_text_is_reused_without_a_lock_or_a_write(tmp_path, small_shards, monkeypatch, text):
    """Also a copy of the text in another folder, although tokens.json has the path of the first."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text)
    first = prepare_corpus(str(tmp_path / "one" / "a.txt"), "byte", data_dir=tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]}
    monkeypatch.setattr(filelock, "FileLock", None)
    monkeypatch.setattr(files, "write_atomically", None)
    for name in ("one", "two"):
        again = prepare_corpus(str(tmp_path / name / "a.txt"), "byte", data_dir=tmp_path / "data")
        assert (again.folder, again.reused) == (first.folder, True)
        assert again.corpus.meta == first.corpus.meta
        np.testing.assert_array_equal(np.asarray(again.corpus.tokens), np.asarray(first.corpus.tokens))
    assert {path: path.stat().st_mtime_ns for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]} == before


def test_folders_written_by_jaxgpt_are_no_part_of_a_corpus(tmp_path, small_shards, monkeypatch):
    """`jaxgpt train --corpus .` writes into ./data and ./runs, `sweep` into ./sweeps, and `export` anywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(LINES)
    first = prepare_corpus(".", data_dir=tmp_path / "data")
    run = Run.create(tmp_path / "runs", "one", Config(), first.corpus.meta)
    run.metrics_file.write_text("{}\n")
    (tmp_path / "sweeps" / "one").mkdir(parents=True)
    (tmp_path / "sweeps" / "one" / "sweep.json").write_text(files.seal({"program": "jaxgpt sweep 2"}))
    shutil.copytree(first.folder, tmp_path / "exported", ignore=shutil.ignore_patterns("*.bin"))
    (tmp_path / "exported" / "model.safetensors").write_bytes(b"\0")
    again = prepare_corpus(".", data_dir=tmp_path / "data")
    assert (again.reused, again.folder) == (True, first.folder)
    for ours in ("runs/one", "sweeps/one", "exported"):
        with pytest.raises(SourceError, match=f"^{ours} was written by jaxgpt; expected texts, or a prepared folder"):
            prepare_corpus(ours, data_dir=tmp_path / "data")
    notes = prepare_corpus(".", "byte", data_dir=tmp_path / "data").corpus.meta["notes"]
    ours = [f"data/{first.folder.name}", "exported", "runs/one", "sweeps/one"]
    assert notes == [f"{name}: left out, a folder written by jaxgpt" for name in ours]


def test_a_text_whose_name_looks_like_a_pattern_is_reused(tmp_path):
    path = tmp_path / "a[1].txt"
    path.write_text(LINES)
    assert not prepare_corpus(str(path), data_dir=tmp_path / "data").reused
    assert prepare_corpus(str(path), data_dir=tmp_path / "data").reused


def test_a_text_is_not_taken_for_another_whose_name_begins_with_its_own(tmp_path):
    for name in ("a-char-b", "a"):
        (tmp_path / f"{name}.txt").write_text(LINES)
        done = prepare_corpus(str(tmp_path / f"{name}.txt"), data_dir=tmp_path / "data")
        assert (done.corpus.meta["source"], done.reused) == (name, False)


def test_columns_of_a_file_are_continued_separately(tmp_path, small_shards, capsys):
    path, lines = tmp_path / "a.jsonl", LINES.splitlines()[:60]
    path.write_text("".join(json.dumps({"one": line, "two": line[::-1]}) + "\n" for line in lines))
    assert interrupted(8, str(path), "byte", data_dir=tmp_path / "data", column="one") is None
    capsys.readouterr()
    for column, first in (("two", lines[0][::-1]), ("one", lines[0])):
        found = prepare_corpus(str(path), "byte", data_dir=tmp_path / "data", column=column).corpus
        assert found.tokenizer.decode(found.tokens[: len(first)]) == first
    assert capsys.readouterr().err == "", "neither starts over"


def test_texts_that_differ_only_in_skipped_characters_share_their_tokens(tmp_path, small_shards):
    done = []
    for mark in "éü":
        (tmp_path / "a.txt").write_text(LINES + mark)
        done.append(prepare_corpus(str(tmp_path / "a.txt"), "ascii", unknown="skip", data_dir=tmp_path / "data"))
    assert done[0].folder == done[1].folder
    assert done[0].corpus.meta["source_sha256"] != done[1].corpus.meta["source_sha256"]
    with pytest.raises(UnknownCharacterError):  # although a corpus without the "ü" is already prepared
        prepare_corpus(str(tmp_path / "a.txt"), "ascii", data_dir=tmp_path / "data")


def test_folder_with_tokens_of_another_text_is_not_reused(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    first = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    (tmp_path / "a.txt").write_text(LINES + "more")
    other = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    shutil.rmtree(first.folder)
    other.folder.rename(first.folder)
    (tmp_path / "a.txt").write_text(LINES)
    again = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    assert not again.reused
    assert again.corpus.meta == first.corpus.meta


def test_concurrently_prepared_folder_is_replaced_without_a_gap(tmp_path, small_shards, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(LINES)
    rename, remove, counts = build._rename, shutil.rmtree, []

    def rename_after_another_process(work, folder):
        monkeypatch.setattr(build, "_rename", rename)
        prepare_corpus(str(tmp_path / "two" / "a.txt"), "byte", data_dir=tmp_path / "data")

        def remove_and_load(path, **kwargs):
            remove(path, **kwargs)
            counts.append(load(folder).meta["count"])

        monkeypatch.setattr(shutil, "rmtree", remove_and_load)
        rename(work, folder)

    monkeypatch.setattr(build, "_rename", rename_after_another_process)
    done = prepare_corpus(str(tmp_path / "one" / "a.txt"), "byte", data_dir=tmp_path / "data")
    assert counts
    assert load(done.folder).meta["origin"] == str(tmp_path / "one" / "a.txt")
    assert [folder.name for folder in (tmp_path / "data").iterdir()] == [done.folder.name]


def test_damaged_shards_are_replaced(tmp_path, small_shards):
    (tmp_path / "a.txt").write_text(LINES)
    first = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    (first.folder / "tokens-00001.bin").write_bytes(b"damage")
    again = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    assert not again.reused
    assert load(again.folder).meta == first.corpus.meta
    assert [folder.name for folder in (tmp_path / "data").iterdir()] == [first.folder.name]


LIMITED = """
import os, re, resource, sys
from pathlib import Path
from jaxgpt.prepare import build
os.cpu_count = lambda: 2  # each core holds parts in memory
data = 1024 * int(re.search(r"VmData:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
limit = data + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
done = build.prepare_corpus(sys.argv[1], "byte")
print(len(done.corpus.tokens), len(done.corpus.meta["shards"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit a process's own memory")
def test_text_larger_than_memory_is_prepared(tmp_path):
    """With the SHARD that users have: two shards do not fit into the limit."""
    size, limit = 192 * 2**20, 96 * 2**20
    assert 2 * encode.SHARD * np.dtype(np.uint16).itemsize > limit
    with (tmp_path / "a.txt").open("wb") as file:
        for _ in range(192):
            file.write((b"the cat sat on the mat, that cat has a hat\n" * 24_386)[: 2**20])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "a.txt", str(limit)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(size), "6"], done.stderr


def test_parts_of_a_mixture_share_one_vocabulary(tmp_path):
    for name, text in (("a", "abc\n" * 50), ("b", "bcd\n" * 70)):
        (tmp_path / f"{name}.txt").write_text(text)
    spec = f"0.75*{tmp_path}/a.txt + 0.25*{tmp_path}/b.txt"
    corpus = prepare_corpus(spec, data_dir=tmp_path / "data", block_size=8).corpus
    assert corpus.tokenizer.chars == "\nabcd"
    assert [share for share, _ in corpus.parts] == [0.75, 0.25]
    train, val = corpus.split(DataConfig())
    assert corpus.tokenizer.decode(np.asarray(train)) == "abc\n" * 45 + "bcd\n" * 63
    assert corpus.tokenizer.decode(np.asarray(val)) == "abc\n" * 5 + "bcd\n" * 7
    assert corpus.training_parts(DataConfig()) == ((180, 0.75), (252, 0.25))
    few = DataConfig(val_tokens=13)
    assert corpus.training_parts(few) == ((195, 0.75), (272, 0.25))
    train, val = corpus.split(few)
    assert corpus.tokenizer.decode(np.asarray(val)) == "\nabc\n" + "bcd\n" * 2
    assert len(train) == 195 + 272
    assert (
        corpus.meta["sha256"]
        != prepare_corpus(spec.replace("0.75", "0.5"), data_dir=tmp_path / "data").corpus.meta["sha256"]
    )
    assert find_prepared(spec, corpus.meta, tmp_path / "data").meta == corpus.meta
    assert find_prepared(spec.replace("0.75", "0.5"), corpus.meta, tmp_path / "data") is None
    prepared = [str(folder) for folder in sorted((tmp_path / "data").iterdir())]
    same = prepare_corpus(f"0.75*{prepared[0]} + 0.25*{prepared[1]}", data_dir=tmp_path / "data").corpus
    assert same.meta["sha256"] == corpus.meta["sha256"]
    (tmp_path / "c.txt").write_text("xyz\n" * 50)
    with pytest.raises(
        CorpusError, match=r"prepared with char \(\d+ ids\), and --tokenizer char is another vocabulary here: give"
    ):
        prepare_corpus(f"1*{prepared[0]} + 1*{tmp_path}/c.txt", data_dir=tmp_path / "data")
    other = prepare_corpus(f"{tmp_path}/c.txt", data_dir=tmp_path / "da ta").folder
    with pytest.raises(
        CorpusError, match=f"and --tokenizer byte is another vocabulary here: give --tokenizer '{other}'$"
    ):
        prepare_corpus(str(other), "byte")
    with pytest.raises(CorpusError, match=f"than {prepared[0]}: prepare its text with --tokenizer {prepared[0]}$"):
        prepare_corpus(f"1*{prepared[0]} + 1*{other}", data_dir=tmp_path / "data")


def test_a_mixture_is_reused_if_all_of_its_parts_are(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(LINES + name)
    spec = f"1*{tmp_path}/a.txt + 1*{tmp_path}/b.txt"
    prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data")
    assert not prepare_corpus(spec, "byte", data_dir=tmp_path / "data").reused
    assert prepare_corpus(spec, "byte", data_dir=tmp_path / "data").reused


PART = {"source": "a", "count": len(LINES) // 2, "sha256": ""}


class TestStores:
    @pytest.fixture(autouse=True)
    def store(self, tmp_path, monkeypatch):
        fsspec = pytest.importorskip("fsspec", reason="needs the extra: pip install 'jaxgpt[data]'")
        pytest.importorskip("upath", reason="needs the extra: pip install 'jaxgpt[data]'")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.files = fsspec.filesystem("memory")
        yield
        self.files.store.clear()

    def test_texts_are_read_from_the_store(self, tmp_path):
        rows = "".join(json.dumps({"text": line}) + "\n" for line in LINES.splitlines())
        texts = {"/texts/a.jsonl": rows.encode(), "/texts/b.txt": b"the end\r\n"}
        self.files.pipe(texts | {"/texts/.git/x": b"hidden"})
        one = prepare_corpus("memory://texts/a.jsonl", data_dir=tmp_path / "data").corpus
        assert one.tokenizer.decode(one.tokens) == LINES.strip().replace("\n", "\n\n")
        assert one.meta["origin"] == "memory://texts/a.jsonl"
        assert one.meta["source"] == "a"
        both = prepare_corpus("memory://texts", data_dir=tmp_path / "data").corpus
        assert both.tokenizer.decode(both.tokens) == LINES.strip().replace("\n", "\n\n") + "\nthe end\n"
        with pytest.raises(SourceError, match=r"no corpus, file or folder 'memory://texts/c\.txt'"):
            prepare_corpus("memory://texts/c.txt", data_dir=tmp_path / "data")

    def test_query_does_not_hide_the_file_extension_and_is_not_recorded(self, tmp_path):
        self.files.pipe("/texts/a.jsonl.gz?sig=a/b", gzip.compress(b'{"text": "the cat"}\n{"text": "sat"}'))
        found = prepare_corpus("memory://texts/a.jsonl.gz?sig=a/b", data_dir=tmp_path / "data").corpus
        assert found.tokenizer.decode(found.tokens) == "the cat\n\nsat"
        assert (found.meta["source"], found.meta["origin"]) == ("a", "memory://texts/a.jsonl.gz")

    @pytest.mark.parametrize("query", ["", "?raw=true"])
    def test_store_that_answers_to_any_name_is_not_a_prepared_folder(self, tmp_path, monkeypatch, query):
        self.files.pipe(f"/texts/a.txt{query}", LINES.encode())
        strip = type(self.files)._strip_protocol
        answered = staticmethod(lambda path: f"/texts/a.txt{query}" if "a.txt" in path else strip(path))
        monkeypatch.setattr(type(self.files), "_strip_protocol", answered)
        found = prepare_corpus(f"memory://texts/a.txt{query}", data_dir=tmp_path / "data").corpus
        assert found.tokenizer.decode(found.tokens) == LINES

    def test_prepared_folder_is_fetched_once_and_verified(self, tmp_path, small_shards):
        (tmp_path / "a.txt").write_text(LINES)
        folder = prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data").folder
        self.files.put(f"{folder}/", "/prepared/", recursive=True)
        found = prepare_corpus("memory://prepared").corpus
        assert found.meta == load(folder).meta
        np.testing.assert_array_equal(np.asarray(found.tokens), np.asarray(load(folder).tokens))
        shards = [name for name in self.files.ls("/prepared", detail=False) if name.endswith(".bin")]
        for name in shards[1:]:
            self.files.rm(name)  # the cache has them
        with mock.patch.object(filelock, "FileLock", None), mock.patch.object(files, "write_atomically", None):
            assert prepare_corpus("memory://prepared").corpus.meta == found.meta
        (cached,) = (tmp_path / "cache" / "jaxgpt" / "corpora").iterdir()
        (cached / "tokens-00000.bin").write_bytes(b"damage")
        assert prepare_corpus("memory://prepared").corpus.meta == found.meta, "fetched again"
        (cached / "tokens-00000.bin").unlink()
        self.files.pipe(shards[0], b"damage")
        with pytest.raises(CorpusError, match=r"memory://prepared/tokens-00000.bin has SHA-256 .*, expected"):
            prepare_corpus("memory://prepared")
        assert not (cached / "tokens-00000.bin").exists()
        cache, full = tmp_path / "cache" / "jaxgpt", OSError(28, "No space left on device")
        full = mock.patch.object(type(self.files), "get_file", side_effect=full)
        with full, pytest.raises(SourceError, match=f"No space .*; make room in {cache}, or set XDG_CACHE_HOME to"):
            prepare_corpus("memory://prepared")
        assert not [path.name for path in cached.iterdir() if path.name.endswith(".part")]

    def test_tokenizer_of_a_fetched_folder_is_its_local_copy(self, tmp_path):
        (tmp_path / "a.txt").write_text(LINES)
        folder = prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data").folder
        self.files.put(f"{folder}/", "/prepared/", recursive=True)
        copy = tmp_path / "cache" / "jaxgpt" / "corpora" / folder.name
        for corpus in ("memory://prepared", f"1*memory://prepared + 1*{tmp_path}/a.txt"):
            with pytest.raises(CorpusError, match=f"give --tokenizer {copy}$"):
                prepare_corpus(corpus, "byte", data_dir=tmp_path / "data")
            prepare_corpus(corpus, str(copy), data_dir=tmp_path / "data")

    def test_run_finds_the_copy_of_a_prepared_folder_without_the_store(self, tmp_path):
        (tmp_path / "a.txt").write_text(LINES)
        folder = prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data").folder
        self.files.put(f"{folder}/", "/prepared/", recursive=True)
        meta = prepare_corpus("memory://prepared").corpus.meta
        self.files.store.clear()
        assert find_prepared("memory://prepared", meta, tmp_path / "none").meta == meta
        assert find_prepared("memory://prepared", meta | {"sha256": "0" * 64}, tmp_path / "none") is None

    def test_source_name_cannot_put_the_copy_outside_the_cache(self, tmp_path):
        (tmp_path / "a.txt").write_text(LINES)
        folder = prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data").folder
        self.files.put(f"{folder}/", "/prepared/", recursive=True)
        meta = files.unseal((folder / "tokens.json").read_bytes()) | {"source": "../../../escaped"}
        self.files.pipe("/prepared/tokens.json", files.seal(meta).encode())
        prepare_corpus("memory://prepared")
        (cached,) = (tmp_path / "cache" / "jaxgpt" / "corpora").iterdir()
        assert cached.name.startswith("escaped-char-")

    @pytest.mark.parametrize("changes", [{"parts": []}, {"parts": [PART, PART]}, {}, {"parts": [], "shards": None}])
    def test_no_shard_is_written_outside_the_cache(self, tmp_path, changes):
        (tmp_path / "a.txt").write_text(LINES)
        meta = prepare_corpus(str(tmp_path / "a.txt"), "byte", data_dir=tmp_path / "data").corpus.meta
        evil = meta | {"shards": [meta["shards"][0] | {"file": "../../../escaped.txt"}]} | changes
        data = np.frombuffer(LINES.encode(), np.uint8).astype(np.uint16).tobytes()
        self.files.pipe("/store/evil/tokens.json", files.seal(evil).encode())
        for path in ("/store/evil/../../../escaped.txt", "/escaped.txt"):
            self.files.pipe(path, data)
        with pytest.raises(CorpusError, match=r"memory://store/evil/tokens\.json: (its|it is|it has)"):
            prepare_corpus("memory://store/evil", "byte")
        assert not (tmp_path / "cache").exists()
        assert not (tmp_path / "escaped.txt").exists()

    def test_a_run_on_a_mixture_is_no_prepared_folder(self, tmp_path):
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text(LINES + name)
        both = f"1*{tmp_path}/a.txt + 1*{tmp_path}/b.txt"
        meta = prepare_corpus(both, "byte", data_dir=tmp_path / "data").corpus.meta
        self.files.pipe("/runs/one/tokens.json", files.seal(meta).encode())
        with pytest.raises(CorpusError, match=r"memory://runs/one/tokens\.json: it is of a mixture in a run, expected"):
            prepare_corpus("memory://runs/one")

    def test_the_copy_of_a_folder_describes_the_folder_that_was_asked_for(self, tmp_path):
        """Texts with the same tokens share the folder of their copies."""
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.txt").write_text(LINES)
            folder = prepare_corpus(str(tmp_path / name / "a.txt"), "byte", data_dir=tmp_path / f"of-{name}").folder
            self.files.put(f"{folder}/", f"/{name}/", recursive=True)
            found = prepare_corpus(f"memory://{name}", "byte").corpus
            assert found.meta["origin"] == str(tmp_path / name / "a.txt")

    @pytest.mark.parametrize("name", ["gs://bucket/x", "1*gs://bucket/x + 1*python-docs"])
    def test_missing_store_package_error_says_what_to_install(self, tmp_path, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(SourceError, match=r"gs://bucket/x is unavailable: .*gcsfs.*; pip install what it names"):
            prepare_corpus(name, data_dir=tmp_path / "data")

    @pytest.mark.parametrize("call", ["isfile", "_open"])
    @pytest.mark.parametrize("name", ["/texts/a.txt", "/texts/tokens.json"])
    def test_errors_of_a_store_become_source_errors(self, tmp_path, monkeypatch, name, call):
        def expired(*args, **kwargs):
            raise RuntimeError("the token has expired")

        self.files.pipe(name, b"the cat sat\n")
        monkeypatch.setattr(type(self.files), call, expired)
        with pytest.raises(SourceError, match=r"memory://.* is unavailable: the token has expired"):
            prepare_corpus("memory://texts", data_dir=tmp_path / "data")

    def test_store_that_fails_while_an_unknown_character_is_located(self, tmp_path, monkeypatch):
        """The text is read again up to there."""
        opened, open_file = [], type(self.files)._open

        def expire(*args, **kwargs):
            opened.append(args)
            if len(opened) > 1:
                raise RuntimeError("the token has expired")
            return open_file(*args, **kwargs)

        self.files.pipe("/texts/a.txt", ("the cat sat\n" * 5 + "é").encode())
        monkeypatch.setattr(type(self.files), "_open", expire)
        with pytest.raises(SourceError, match=r"^memory://texts/a\.txt is unavailable: the token has expired"):
            prepare_corpus("memory://texts/a.txt", "ascii", data_dir=tmp_path / "data")

    def test_missing_extra_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "upath", None)
        with pytest.raises(sources.MissingExtraError, match=r"memory://a, in a store, needs .*jaxgpt\[data\]"):
            prepare_corpus("memory://a")
