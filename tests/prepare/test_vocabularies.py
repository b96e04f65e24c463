import json
import os
import signal
import sys
import threading

import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jaxgpt.config import UsageError
from jaxgpt.prepare.sources import SourceError
from jaxgpt.prepare.vocabularies import learn_bpe, load_gpt2, parse
from jaxgpt.tokenizer import MAX_TOKEN_BYTES, MAX_TOKENS, PATTERN, BPETokenizer, ByteTokenizer

TEXT = "the cat sat on the mat, that cat's hat été 中文\n" * 9


class TestLearning:
    def test_the_first_merge_is_the_most_frequent_pair(self):
        assert learn_bpe(["aab aab aab cab"], 257).tokens[256] == b"ab"

    def test_result_depends_on_the_text_alone(self):
        assert learn_bpe([TEXT], 300) == learn_bpe(list(TEXT), 300)
        assert learn_bpe([TEXT[5:]], 300) != learn_bpe([TEXT], 300)

    @pytest.mark.parametrize("size", [256, 257, 280])
    def test_the_vocabulary_has_the_size_asked_for(self, size):
        tok = learn_bpe([TEXT], size)
        assert tok.vocab_size == size
        assert tok.tokens == learn_bpe(list(TEXT), 300).tokens[:size]
        assert set(tok.tokens[:256]) == set(ByteTokenizer().token_bytes)

    def test_vocabulary_of_a_short_text_is_smaller(self):
        for size in (300, MAX_TOKENS):
            assert learn_bpe(["ab"], size).vocab_size == 257

    def test_very_long_words_are_cut(self, monkeypatch):
        """The trainer's time grows with the square of the length of a word."""
        lengths = []

        class Recorder:
            def __init__(self, model):
                self.tokenizer = Tokenizer(model)

            def train_from_iterator(self, parts, trainer):
                parts = list(parts)
                lengths.extend(map(len, parts))
                self.tokenizer.pre_tokenizer = self.pre_tokenizer
                self.tokenizer.train_from_iterator(parts, trainer)

            def get_vocab(self):
                return self.tokenizer.get_vocab()

        monkeypatch.setattr("tokenizers.Tokenizer", Recorder)
        assert max(map(len, learn_bpe(["x" * 400_000], 400).tokens)) <= MAX_TOKEN_BYTES
        assert sum(lengths) == 400_000
        assert max(lengths) <= 2**15

    def test_lone_surrogates_are_ignored(self):
        assert learn_bpe(["\ud800".join("abab")], 300).tokens[256:] == learn_bpe(["abab"], 300).tokens[256:]

    def test_signal_interrupts_learning(self):
        handled = threading.Event()

        def interrupt(*_):
            handled.set()
            raise InterruptedError

        def endless():
            os.kill(os.getpid(), signal.SIGINT)
            assert handled.wait(10), "the signal was not handled during learning"
            while True:
                yield "the cat "

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            with pytest.raises(InterruptedError):
                learn_bpe(endless(), 300)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_signal_interrupts_merging(self, monkeypatch):
        """The trainer has read the text and cannot be stopped: it ends later, in its thread."""
        may_end, ended = threading.Event(), threading.Event()

        class Merging:
            def __init__(self, model):
                pass

            def train_from_iterator(self, parts, trainer):
                list(parts)
                may_end.wait(0.2)  # then the main thread waits for this one
                os.kill(os.getpid(), signal.SIGINT)
                may_end.wait(10)
                ended.set()

        def interrupt(*_):
            raise InterruptedError

        monkeypatch.setattr("tokenizers.Tokenizer", Merging)
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            with pytest.raises(InterruptedError):
                learn_bpe(["the cat"], 300)
            assert not ended.is_set()
        finally:
            may_end.set()
            signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("size", [255, 0, MAX_TOKENS + 1])
    def test_size_out_of_range_is_refused(self, size):
        with pytest.raises(UsageError, match=rf"vocabulary of {size}, expected 256 to 1048576"):
            learn_bpe(["abc"], size)


@pytest.fixture
def files(tmp_path):
    """A small vocabulary in GPT-2's two files, written by Hugging Face's tokenizers."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    folder = tmp_path / "written"
    folder.mkdir()
    model.model.save(str(folder))
    merges, vocabulary = folder / "merges.txt", folder / "vocab.json"
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text()) | {"<|endoftext|>": 280}))
    return merges, vocabulary


@pytest.fixture
def expected():
    return BPETokenizer(learn_bpe([TEXT], 280).tokens, ("<|endoftext|>",))


@pytest.mark.smoke
def test_parsed_vocabulary_equals_the_one_that_was_written(files, expected):
    tok = parse(*(path.read_text() for path in files))
    assert tok == expected
    assert tok.vocab_size == 281
    assert tok.decode([280]) == "<|endoftext|>"


def test_inconsistent_files_are_refused(files):
    merges, vocabulary = (path.read_text() for path in files)
    swapped = merges.splitlines()
    swapped[1:3] = swapped[2:0:-1]
    for wrong in ("\n".join(swapped), merges.rsplit("\n", 2)[0], merges + "a b\n"):
        with pytest.raises(ValueError, match="do not agree"):
            parse(wrong, vocabulary)
    gap = json.loads(vocabulary) | {"<|endoftext|>": 281}
    with pytest.raises(ValueError, match="do not agree"):
        parse(merges, json.dumps(gap))


def test_load_gpt2_returns_tiktokens_vocabulary(expected, monkeypatch):
    ranks = {token: rank for rank, token in enumerate(expected.tokens)}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 280})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    assert load_gpt2() == expected


def test_unreachable_download_error_says_what_to_fetch(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(SourceError, match=r"no network.*vocab\.json and merges\.txt.*--tokenizer FOLDER"):
        load_gpt2()


def test_missing_tiktoken_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UsageError, match=r"GPT-2's vocabulary needs tiktoken.*pip install tiktoken"):
        load_gpt2()
