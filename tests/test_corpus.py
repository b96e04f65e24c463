"""Prepared corpora: writing, reuse, damage, splits, tokenizers and mixtures."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import corpus as corpora
from jaxgpt import files
from jaxgpt.cli.corpora import absolute, find_prepared, mixture
from jaxgpt.config import DataConfig, UsageError
from jaxgpt.corpus import CorpusError
from jaxgpt.prepare import vocabularies
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.prepare.sources import SourceError
from jaxgpt.prepare.vocabularies import accepts
from jaxgpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, UnknownCharacterError


@pytest.fixture
def verse(verse, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copy(verse, tmp_path))


@pytest.fixture
def prepared(verse, tmp_path):
    return prepare_corpus(str(verse), data_dir=tmp_path / "data")


@pytest.fixture
def tokenize(tmp_path):
    """tokenize(text, ...): the corpus of a text, which may hold surrogates."""

    def tokenize(text, *spec, **how):
        (tmp_path / "other.jsonl").write_text(json.dumps({"text": text}))
        return prepare_corpus(
            str(tmp_path / "other.jsonl"), *spec, data_dir=tmp_path / "tokenized", block_size=0, **how
        ).corpus

    return tokenize


def test_load_returns_what_prepare_wrote(prepared, verse):
    loaded = corpora.load(prepared.folder)
    assert isinstance(loaded.tokens, np.memmap)
    assert loaded.tokens.dtype == np.uint16
    assert loaded.tokenizer.decode(loaded.tokens) == verse.read_text()
    meta = json.loads((prepared.folder / "tokens.json").read_text())
    assert meta["count"] == len(verse.read_text())
    assert meta["dtype"] == "uint16"
    assert meta["sha256"] == hashlib.sha256((prepared.folder / "tokens-00000.bin").read_bytes()).hexdigest()
    assert meta["source_sha256"] == hashlib.sha256(verse.read_bytes()).hexdigest()
    assert meta["tokenizer"]["chars"] == "\n acehmnost"
    assert meta["origin"] == str(verse)
    assert "840 tokens" in prepared.corpus.summary
    assert sorted(path.name for path in prepared.folder.iterdir()) == ["tokens-00000.bin", "tokens.json"]


def test_prepare_reuses_a_corpus_and_a_changed_text_gets_a_new_folder(prepared, verse, tmp_path):
    again = prepare_corpus(str(verse), data_dir=tmp_path / "data")
    assert again.reused
    assert again.folder == prepared.folder
    verse.write_text(verse.read_text() + "a\n")
    changed = prepare_corpus(str(verse), data_dir=tmp_path / "data")
    assert not changed.reused
    assert changed.folder != prepared.folder
    assert corpora.load(prepared.folder).meta == prepared.corpus.meta


def test_prepare_accepts_a_prepared_folder(prepared):
    again = prepare_corpus(str(prepared.folder))
    assert again.reused
    assert again.corpus.meta == prepared.corpus.meta
    assert prepare_corpus(str(prepared.folder), str(prepared.folder)).reused
    (prepared.folder / "README.md").write_text("of the verse")
    assert prepare_corpus(str(prepared.folder)).corpus.meta == prepared.corpus.meta
    for other in ("byte", "ascii"):
        message = (
            rf"was prepared with char \(11 ids\), and --tokenizer {other} is another vocabulary here: give --tokenizer"
        )
        with pytest.raises(CorpusError, match=message):
            prepare_corpus(str(prepared.folder), other)


def test_a_named_corpus_hides_a_prepared_folder_of_its_name(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared.folder.rename("python-docs")
    assert "CPython" in prepare_corpus("python-docs", "ascii", unknown="skip").corpus.meta["origin"]
    assert prepare_corpus("./python-docs").corpus.meta == prepared.corpus.meta


def test_bpe_of_a_prepared_folder_must_match_the_requested_tokenizer(verse, tmp_path):
    learned = prepare_corpus(str(verse), "bpe:300", data_dir=tmp_path / "data")
    assert prepare_corpus(str(learned.folder), "bpe:300").reused
    assert prepare_corpus(str(learned.folder), "bpe:400").reused, "a short text may give fewer tokens"
    for other in ("gpt2", "bpe:256", "bpe:x"):
        with pytest.raises(UsageError, match=r"was prepared with bpe|no tokenizer 'bpe:x'"):
            prepare_corpus(str(learned.folder), other)
    pairs = (bytes([i // 256, i % 256]) for i in range(50_000))
    assert accepts("gpt2", BPETokenizer((*(bytes([i]) for i in range(256)), *pairs), ("<|endoftext|>",)))


@pytest.mark.parametrize("ours", [True, False])
def test_texts_beside_a_tokens_json_are_read_as_text(prepared, verse, tmp_path, ours):
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(verse, folder / "a.txt")
    shutil.copy(prepared.folder / "tokens.json", folder)
    if not ours:
        (folder / "tokens.json").write_text('{"tokens": 3}')
    vocabulary = str(prepared.folder) if ours else "byte"
    found = prepare_corpus(str(folder), vocabulary, data_dir=tmp_path / "data").corpus
    text = found.tokenizer.decode(found.tokens)
    assert text == verse.read_text() + ("" if ours else '\n{"tokens": 3}')
    assert found.meta["notes"] == ["tokens.json: left out, a vocabulary written by jaxgpt"] * ours


def test_damaged_prepared_folder_is_not_read_as_text(prepared):
    shard, meta = prepared.folder / "tokens-00000.bin", prepared.folder / "tokens.json"
    for damage_file in (shard.unlink, partial(meta.write_text, "")):
        shutil.copytree(prepared.folder, copy := prepared.folder.with_name("copy"))
        damage_file()
        with pytest.raises(UsageError, match=r"tokens-00000\.bin (is missing|is not UTF-8 text: byte 0x00)"):
            prepare_corpus(str(prepared.folder))
        shutil.rmtree(prepared.folder)
        copy.rename(prepared.folder)


def test_texts_with_equal_ids_do_not_share_a_folder(verse, tmp_path):
    first = prepare_corpus(str(verse), data_dir=tmp_path / "data")
    verse.write_text(verse.read_text().replace("a", "b"))
    second = prepare_corpus(str(verse), data_dir=tmp_path / "data")
    assert first.corpus.meta["sha256"] == second.corpus.meta["sha256"]
    assert first.folder != second.folder
    assert find_prepared(str(second.folder), first.corpus.meta, tmp_path / "none") is None
    assert find_prepared(str(first.folder), first.corpus.meta, tmp_path / "none").meta == first.corpus.meta


def test_lone_surrogates_are_loaded_as_written(tmp_path):
    path = tmp_path / "halves.jsonl"
    path.write_text(
        r'{"text": "split \ud83d emoji"}' + "\n" + r'{"text": "\ude00, and a whole one \ud83d\ude00"}' + "\n"
    )
    done = prepare_corpus(str(path), data_dir=tmp_path / "data")
    loaded = corpora.load(done.folder)
    assert loaded.tokenizer == done.corpus.tokenizer
    assert loaded.tokenizer.decode(loaded.tokens) == "split \ud83d emoji\n\n\ude00, and a whole one 😀"
    assert prepare_corpus(str(path), data_dir=tmp_path / "data").reused
    assert prepare_corpus(str(done.folder)).corpus.meta == loaded.meta


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens.json"])
def test_prepare_replaces_a_damaged_corpus(prepared, verse, tmp_path, name):
    (prepared.folder / name).write_text("damage")
    again = prepare_corpus(str(verse), data_dir=tmp_path / "data")
    assert not again.reused
    assert corpora.load(prepared.folder).meta == prepared.corpus.meta


def test_default_split_is_90_to_10(prepared):
    train, val = prepared.corpus.split(DataConfig())
    n = int(0.9 * len(prepared.corpus.tokens))
    assert (len(train), len(val)) == (n, len(prepared.corpus.tokens) - n)
    np.testing.assert_array_equal(np.concatenate([train, val]), prepared.corpus.tokens)


def test_val_tokens_limits_the_validation_split(prepared):
    tokens = prepared.corpus.tokens
    train, val = prepared.corpus.split(DataConfig(val_tokens=20))
    np.testing.assert_array_equal(train, tokens[:-20])
    np.testing.assert_array_equal(val, tokens[-20:])
    assert prepared.corpus.training_parts(DataConfig(val_tokens=20)) == ((len(tokens) - 20, 1.0),)
    for enough in (0, 84, 85, 2**31 - 1):
        assert len(prepared.corpus.split(DataConfig(val_tokens=enough))[1]) == 84


def test_default_val_tokens_limits_only_large_texts():
    """The validation splits of Tiny Shakespeare, python-docs and python-stdlib (data/README.md) stay whole; that of
    OpenWebText does not."""
    tokenizer = ByteTokenizer()
    for n, expected in ((1_115_394, 111_540), (465_126, 46_513), (11_054_222, 1_105_423), (9 * 10**9, 4_000_000)):
        text = np.broadcast_to(np.uint16(0), n)
        assert len(corpora.Corpus(text, tokenizer, {}).split(DataConfig())[1]) == expected


def test_vocabularies_above_16_bits_use_uint32(tokenize):
    text = "".join(chr(0x10000 + i) for i in range(2**16 + 1))
    corpus = tokenize(text)
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokenizer.decode(corpus.tokens) == text
    narrow = tokenize(text[:-1])
    assert narrow.tokens.dtype == np.uint16


def test_vocabulary_of_another_corpus_can_be_reused(prepared, tokenize):
    spec, text = str(prepared.folder / "tokens.json"), "the zebra sat"
    with pytest.raises(UnknownCharacterError, match="'z'"):
        tokenize(text, spec)
    skipped = tokenize(text, spec, unknown="skip")
    assert skipped.tokenizer == prepared.corpus.tokenizer
    assert skipped.tokenizer.decode(skipped.tokens) == "the ea sat"
    assert skipped.meta["skipped_characters"] == 3
    assert tokenize(text, str(prepared.folder), unknown="skip").meta == skipped.meta


def test_byte_tokenizer_gives_utf8_bytes(tokenize):
    corpus = tokenize("é\n", "byte")
    assert corpus.tokens.tolist() == [0xC3, 0xA9, 10]


def test_too_little_text_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 4)
    with pytest.raises(CorpusError, match=r"validation split of a has 4 tokens.*block_size \+ 1 = 9"):
        prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data", block_size=8)
    with pytest.raises(CorpusError, match="training split"):
        prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data", block_size=8, val_fraction=0.9)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(CorpusError, match=r"give more text$"):  # prepare has no --block-size
        prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_both_splits_of_a_prepared_text_must_hold_a_window_and_its_targets(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 4)  # the validation split has 4 tokens
    done = prepare_corpus(str(tmp_path / "a.txt"), data_dir=tmp_path / "data", block_size=3)
    for corpus in (tmp_path / "a.txt", done.folder):
        assert prepare_corpus(str(corpus), data_dir=tmp_path / "data", block_size=3).reused
        with pytest.raises(CorpusError, match=r"has 4 tokens, expected at least block_size \+ 1 = 5"):
            prepare_corpus(str(corpus), data_dir=tmp_path / "data", block_size=4)


def test_column_is_refused_for_plain_text(verse, prepared, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"body": verse.read_text()}, indent=1))
    (folder / "b.ndjson").write_text(json.dumps({"body": verse.read_text()}))
    for corpus in (str(verse), "python-docs", str(folder / "a.json"), f"1*{verse} + 1*python-docs"):
        with pytest.raises(SourceError, match=r"--column is body, but .* is plain text"):
            prepare_corpus(corpus, data_dir=tmp_path / "none", column="body")
    assert not (tmp_path / "none").exists()
    for corpus in (str(folder / "b.ndjson"), str(folder), f"1*{verse} + 1*{folder}/b.ndjson"):
        prepare_corpus(corpus, data_dir=tmp_path / "new", column="body")
    assert prepare_corpus(str(prepared.folder), column="body").reused


def test_unknown_tokenizer_is_refused(tokenize):
    for spec in ("words", "~words", "bpe", "bpe:", "bpe:many", "bpe:-300", "bpe:4_096", "bpe:99999999"):
        with pytest.raises(CorpusError, match="expected char, ascii, byte, gpt2, bpe:SIZE such as bpe:4096, the path"):
            tokenize("text", spec)
    with pytest.raises(UsageError, match="vocabulary of 255, expected 256 to"):
        tokenize("text", "bpe:255")


def test_a_bpe_is_learned_saved_and_used_again(verse, tmp_path, tokenize):
    done = prepare_corpus(str(verse), "bpe:300", data_dir=tmp_path / "data")
    assert done.folder.name.startswith("text-bpe-")
    loaded = corpora.load(done.folder)
    assert loaded.tokenizer.decode(loaded.tokens) == verse.read_text()
    assert 256 < loaded.tokenizer.vocab_size <= 300
    assert len(loaded.tokens) < len(verse.read_text()) / 2
    assert prepare_corpus(str(verse), "bpe:300", data_dir=tmp_path / "data").reused
    other = tokenize("the zebra \ud800 sat", str(done.folder), unknown="skip")
    assert other.tokenizer == loaded.tokenizer
    assert other.tokenizer.decode(other.tokens) == "the zebra  sat"
    assert other.meta["skipped_characters"] == 1
    learned = tokenize("the zebra \ud800 sat", "bpe:300", unknown="skip")
    assert learned.meta["skipped_characters"] == 1


def test_gpt2_tokenizer_by_name(monkeypatch, tokenize):
    tok = BPETokenizer(tuple(ByteTokenizer().token_bytes), ("<|endoftext|>",))
    monkeypatch.setattr(vocabularies, "load_gpt2", lambda: tok)
    corpus = tokenize("é<|endoftext|>", "gpt2")
    assert corpus.tokens.tolist() == list("é<|endoftext|>".encode())
    assert corpus.tokenizer.vocab_size == 257


NEXT_SHARD = {"file": "tokens-00001.bin", "sha256": ""}
MIXTURE_PART = {"source": "a", "count": 420, "sha256": ""}


def damage(folder, name, change):
    path = folder / name
    if change is None:
        path.unlink()
    elif name == "tokens-00000.bin":
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
    else:
        meta = files.unseal(path.read_bytes())
        change(meta)
        path.write_text(files.seal(meta))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens-00000.bin", None, "is missing; jaxgpt prepare makes it"),
        ("tokens-00000.bin", lambda data: data.pop(), "1,679 bytes, expected 1,680"),
        ("tokens-00000.bin", lambda data: data.__setitem__(5, data[5] ^ 1), "is damaged"),
        ("tokens.json", None, "cannot be read"),
        ("tokens.json", lambda meta: meta.pop("sha256"), "no sha256 of type str"),
        ("tokens.json", lambda meta: meta.update(count="840"), "no count of type int"),
        ("tokens.json", lambda meta: meta.update(dtype="object"), "dtype object"),
        ("tokens.json", lambda meta: meta.update(format=99), "format 99"),
        ("tokens.json", lambda meta: meta.update(tokenizer={"kind": "words"}), "not a tokenizer"),
        ("tokens.json", lambda meta: meta.pop("shards"), "its shards are None, expected a list"),
        (
            "tokens.json",
            lambda meta: meta["shards"][0].update(file="../tokens-00000.bin"),
            "expected file tokens-00000",
        ),
        ("tokens.json", lambda meta: meta["shards"].append(NEXT_SHARD | {"count": 0}), "its shard 1 is"),
        (
            "tokens.json",
            lambda meta: meta["shards"].append(NEXT_SHARD | {"count": 1}),
            "its shards have 841 tokens, expected",
        ),
        ("tokens.json", lambda meta: meta.update(parts=[]), r"its parts are \[\], expected a list of 2 or more"),
        (
            "tokens.json",
            lambda meta: meta.update(parts=[{"source": "a"}] * 2),
            "expected a source, a count and a sha256",
        ),
        (
            "tokens.json",
            lambda meta: meta.update(parts=[meta["shards"][0], NEXT_SHARD | {"count": 1}]),
            "expected a source, a count and a sha256",
        ),
        ("tokens.json", lambda meta: meta.update(parts=[MIXTURE_PART] * 2), "describes the mixture of a run"),
    ],
)
def test_load_names_the_damage(prepared, name, change, message):
    damage(prepared.folder, name, change)
    with pytest.raises(CorpusError, match=message):
        corpora.load(prepared.folder)


def test_verified_corpus_is_only_checked_for_its_size(prepared, tmp_path):
    damage(prepared.folder, "tokens-00000.bin", lambda data: data.__setitem__(5, data[5] ^ 1))
    assert len(corpora.load(prepared.folder, verified=True).tokens) == 840
    found = partial(find_prepared, str(prepared.folder), prepared.corpus.meta, verified=True)
    assert len(found(prepared.folder.parent).tokens) == 840
    with pytest.raises(CorpusError, match="is damaged"):
        found(tmp_path / "none")  # this process may be the only one that reads the folder
    damage(prepared.folder, "tokens-00000.bin", lambda data: data.pop())
    with pytest.raises(CorpusError, match="1,679 bytes, expected 1,680"):
        corpora.load(prepared.folder, verified=True)


def test_tokens_json_without_a_seal_is_refused(prepared):
    (prepared.folder / "tokens.json").write_text("{")
    with pytest.raises(CorpusError, match="it has no seal"):
        corpora.load(prepared.folder)


def test_char_vocabulary_is_sorted(prepared):
    assert prepared.corpus.tokenizer == CharTokenizer("\n acehmnost")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_joined_arrays_are_indexed_like_one(sizes, data):
    whole = np.arange(sum(sizes)).astype(np.uint16)
    tokens = corpora.Joined(np.split(whole, np.cumsum(sizes)[:-1]))
    begin, end = (data.draw(st.integers(-7, 30)) for _ in range(2))
    np.testing.assert_array_equal(np.asarray(tokens[begin:end]), whole[begin:end])
    assert len(tokens) == len(whole)
    if len(whole):
        indices = np.array(data.draw(st.lists(st.lists(st.integers(0, len(whole) - 1), min_size=2, max_size=2))), int)
        np.testing.assert_array_equal(tokens[indices.reshape(-1, 2)], whole[indices.reshape(-1, 2)])
    with pytest.raises(IndexError, match="tokens"):
        tokens[np.array([len(whole)])]
    with pytest.raises(IndexError, match="expected integers as indices, found bool"):
        tokens[np.array([True])]


def test_joining_one_array_returns_it():
    one = np.zeros(3, np.uint16)
    assert corpora.joined([one]) is one


def test_mixtures_are_parsed():
    assert mixture("0.7*a + .3*b c") == [(0.7, "a"), (0.3, "b c")]
    assert mixture("2*/C + D/a  +  1*b + c.txt") == [(2, "/C + D/a"), (1, "b + c.txt")]
    for one in ("a.txt", "a + b.txt", "0.5*a.txt", "2*a + b", "a + 2*b", "a + 2*b + 1*c"):
        assert mixture(one) == [(1.0, one)]
    with pytest.raises(CorpusError, match="parts that differ, each with a weight above 0"):
        mixture("0*a + 1*b")
    for same in ("1*a + 1*a", "1*a + 1*./a"):  # a run stores absolute paths, which must differ too
        with pytest.raises(CorpusError, match="parts that differ"):
            mixture(same)
    assert absolute("1*/x/a + 2*python-docs") == "1*/x/a + 2*python-docs"
    assert absolute("gs://bucket/a.txt") == "gs://bucket/a.txt"
    for shares in ([2e6, 4e3], [5e-5, 1e-6], [0.123456789, 0.1]):  # a config stores this text, and it is parsed again
        text = absolute(f"{shares[0]:.12f}*/x/a + {shares[1]:.12f}*/x/b")
        assert mixture(text) == [(shares[0], "/x/a"), (shares[1], "/x/b")]
    assert mixture("1*a + 999*b") == [(1, "a"), (999, "b")]
    with pytest.raises(CorpusError, match=r"the least weight is 0\.0005 of all"):
        mixture("1*a + 1999*b")
    with pytest.raises(CorpusError, match=r"the least weight is 0\.000999001 of all, expected a thousandth"):
        mixture("1*a + 1000*b")


def test_all_paths_of_a_text_become_one(verse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(verse)
    for path in ("text.txt", "link", f"../{tmp_path.name}/text.txt"):
        assert absolute(path) == str(verse.resolve())


def test_id_just_beyond_the_vocabulary_is_damage(prepared):
    path = prepared.folder / "tokens-00000.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[5] = prepared.corpus.tokenizer.vocab_size
    tokens.tofile(path)
    damage(prepared.folder, "tokens.json", lambda meta: meta["shards"][0].update(sha256=files.sha256(path)))
    with pytest.raises(CorpusError, match="has id 11, expected ids below vocab_size = 11"):
        corpora.load(prepared.folder)


def test_joined_slice_may_begin_inside_a_piece_and_no_index_is_negative():
    tokens = corpora.Joined([np.arange(4), np.arange(4, 12)])
    assert np.asarray(tokens[2:10]).tolist() == list(range(2, 10))
    with pytest.raises(IndexError, match="indices from -1 to 3 of 12 tokens"):
        tokens[np.array([3, -1])]


def test_hash_of_a_mixture_depends_on_its_weights(prepared):
    one, other = (corpora.mix([(share, prepared.corpus), (1.0, prepared.corpus)]).meta for share in (1.0, 2.0))
    assert one["sha256"] != other["sha256"]
