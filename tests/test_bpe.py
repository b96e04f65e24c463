"""BPE against GPT-2's algorithm, and the splitting of a text into parts that are encoded alone."""

import json
import sys
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer
from jaxgpt.config import UsageError
from jaxgpt.prepare import encode
from jaxgpt.prepare.encode import split_words
from jaxgpt.prepare.vocabularies import learn_bpe
from jaxgpt.tokenizer import BPETokenizer, ByteTokenizer, UnknownCharacterError

BYTES = tuple(ByteTokenizer().token_bytes)
SAMPLE = "the cat sat on the mat, that cat's hat  \n\n    it'll be 1234 été 中文 🙂\n" * 9
TOKENIZER = learn_bpe([SAMPLE], 300)
# Every class of the split pattern: letters, digits, symbols, contractions and white space, including 0x1c, which only
# Python's \s matches.
HARD = st.text(st.sampled_from("tha's1.中é\u0301🙂 \n\t\u00a0\u2028\u3000\x1c\x85\u200b"), max_size=60)
HARD |= st.lists(st.sampled_from(["the", " ", "  ", "\n", "\n\n", " \n", "'ll", "'", "12", "...", "\x1c"])).map("".join)

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def reference(tok, text):
    """BPE as in GPT-2's encoder.py: in each word, merge the adjacent pair of lowest rank until there is none."""
    rank = {token: i for i, token in enumerate(tok.tokens)}
    ids = []
    for word in regex.findall(GPT2_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while pairs := [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


@pytest.mark.smoke
@given(st.text() | HARD)
def test_decode_inverts_encode_and_token_bytes_spell_the_text(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(TOKENIZER.token_bytes[i] for i in ids) == text.encode()
    assert TOKENIZER.knows(text).tolist() == [True] * len(text)


@given(HARD)
def test_encoding_matches_gpt2_reference(text):
    assert TOKENIZER.encode(text).tolist() == reference(TOKENIZER, text)


def test_merges_shorten_the_encoding():
    assert len(TOKENIZER.encode(SAMPLE)) < 0.6 * len(SAMPLE.encode())


@given(HARD, st.integers(1, 20), st.integers(1, 9))
@settings(max_examples=300)
def test_ids_of_the_parts_are_ids_of_the_whole_text(text, size, step):
    parts = list(split_words([text[i : i + step] for i in range(0, len(text), step)], size))
    assert "".join(parts) == text
    assert parts == list(split_words([text], size))
    for split in (TOKENIZER._encoding.encode_ordinary, lambda text: regex.findall(GPT2_PATTERN, text)):
        assert [ids for part in parts for ids in split(part)] == split(text)


@given(HARD, st.integers(1, 8), st.integers(1, 9))
def test_splitting_can_start_after_any_part(text, size, step):
    with mock.patch.object(encode, "LONGEST_WORD", 8):
        parts = list(split_words([text], size))
        for n in range(len(parts)):
            begin = len("".join(parts[:n]))
            rest = [text[i : i + step] for i in range(begin, len(text), step)]
            assert list(split_words(rest, size, begin)) == parts[n:]


@given(st.text(st.sampled_from("a \n\ud800"), max_size=30), st.integers(1, 9))
def test_surrogates_can_be_dropped_before_or_after_splitting(text, size):
    kept = tokenizer.drop_unknown(TOKENIZER, text)
    parts = [tokenizer.drop_unknown(TOKENIZER, part) for part in split_words([text], size)]
    assert [i for part in parts for i in TOKENIZER.encode(part)] == TOKENIZER.encode(kept).tolist()


def test_parts_are_shorter_than_twice_the_size():
    assert max(map(len, split_words([SAMPLE], 10))) < 20


@given(st.text(st.sampled_from("abc d\x1c"), max_size=90), st.lists(st.integers(1, 7), min_size=2, max_size=2))
def test_cuts_in_long_words_do_not_depend_on_size(text, sizes):
    with mock.patch.object(encode, "LONGEST_WORD", 8):
        cuts_in_words = []
        for size in sizes:
            parts = list(split_words([text], size))
            assert "".join(parts) == text
            assert max(map(len, parts), default=0) <= 8 + size
            ends = np.cumsum([len(part) for part in parts])[:-1].tolist()
            cuts_in_words.append([end for end in ends if not encode._WORD_START.match(text, end)])
    assert cuts_in_words[0] == cuts_in_words[1]


def test_text_without_white_space_is_split_in_linear_time():
    held, searched = [], []

    class NoWordStart:
        def search(self, text, begin):
            held.append(len(text))
            searched.append(len(text) - begin)

    with mock.patch.object(encode, "LONGEST_WORD", 5000), mock.patch.object(encode, "_WORD_START", NoWordStart()):
        assert [len(part) for part in split_words(["x" * 1000] * 2000, 1000)] == [5000] * 400
    assert max(held) <= 5000 + 1000
    assert sum(searched) <= 2_000_000 + len(searched), "each character once, and one before each block"


@pytest.mark.parametrize("space", [" ", "\n", "\t", " \n"])
def test_long_white_space_is_split_and_encoded(space):
    """A run long enough to overflow the stack of a backtracking regular expression."""
    run = space * (1_500_000 // len(space))
    text = f"x{run}\x1c{run}x"
    assert "".join(TOKENIZER.decode(TOKENIZER.encode(part)) for part in split_words([text], encode.PART)) == text


@given(st.text(st.characters(), max_size=9).filter(bool), st.integers(0xD800, 0xDFFF))
def test_lone_surrogate_is_an_unknown_character(text, code):
    text += chr(code)
    known = TOKENIZER.knows(text)
    with pytest.raises(UnknownCharacterError, match=r"UTF-8 can write; --unknown skip") as caught:
        TOKENIZER.encode(text)
    assert caught.value.position == int(np.argmin(known))
    assert caught.value.character == text[caught.value.position]
    rest = "".join(char for char, keep in zip(text, known, strict=True) if keep)
    assert TOKENIZER.decode(TOKENIZER.encode(rest)) == rest


def test_special_token_in_a_text_is_encoded_as_plain_text():
    tok = BPETokenizer(BYTES, ("<|endoftext|>",))
    assert tok.vocab_size == 257
    assert tok.encode("<|endoftext|>").tolist() == list(b"<|endoftext|>")
    assert tok.decode([104, 256, 105]) == "h<|endoftext|>i"
    assert len(tok.token_bytes) == 257


def test_decode_replaces_invalid_utf8_and_refuses_unknown_ids():
    assert TOKENIZER.decode([TOKENIZER.tokens.index(b"\xc3")]) == "\ufffd"
    with pytest.raises(ValueError, match="outside the vocabulary, expected 0 to 299"):
        TOKENIZER.decode([300])


@pytest.mark.smoke
@pytest.mark.parametrize("tok", [TOKENIZER, BPETokenizer(BYTES, ("<|endoftext|>", "<|é|>"))])
def test_json_round_trip(tok):
    assert tokenizer.from_json(json.loads(json.dumps(tok.to_json()))) == tok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": r"(a+)+$"}, r"split pattern '\(a\+\)\+\$', expected 'gpt2'"),
        ({"pattern": 3}, "not a tokenizer"),
        ({"more": 1}, "not a tokenizer"),
        ({"tokens": BYTES[:9]}, "not a tokenizer"),
        ({"tokens": []}, "no token for 256 of the 256 bytes"),
        ({"tokens": [chr(byte) for byte in range(255)]}, r"no token for 1 .* such as b'\\xff'"),
        ({"tokens": [chr(byte) for byte in [*range(256), 7]]}, "listed twice"),
        ({"tokens": [*map(chr, range(256)), ""]}, "is empty"),
        ({"tokens": [*map(chr, range(256)), "x" * 257]}, "is longer"),
        ({"tokens": [*map(chr, range(256)), "中"]}, "latin-1"),
        ({"tokens": [*map(chr, range(256)), 3]}, "token 3, expected a string"),
        ({"special": ["<|a|>", "<|a|>"]}, "listed twice"),
        ({"special": ["\ud800"]}, "utf-8"),
        ({"special": [None]}, "expected a string"),
        ({"special": list(map(str, range(2**20)))}, "at most 1,048,576"),
    ],
)
def test_invalid_bpe_json_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.from_json({**BPETokenizer(BYTES).to_json(), **change})


def test_longest_token_and_largest_vocabulary_are_accepted():
    assert BPETokenizer((*BYTES, b"x" * 256)).vocab_size == 257
    assert BPETokenizer(BYTES, tuple(map(str, range(2**20 - 256)))).vocab_size == 2**20


@pytest.mark.parametrize(
    ("library", "use"),
    [("tiktoken", lambda: BPETokenizer(BYTES).encode("a")), ("tokenizers", lambda: learn_bpe(["a"], 300))],
)
def test_missing_library_error_names_what_to_install(monkeypatch, library, use):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"needs {library}.*pip install {library} \(or 'jaxgpt\[data\]'\)"):
        use()
