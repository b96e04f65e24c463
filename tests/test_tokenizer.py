import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import tokenizer
from jaxgpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, UnknownCharacterError

ANY_TEXT = st.text(st.characters())  # surrogates included


@pytest.mark.smoke
@given(ANY_TEXT.filter(bool))
def test_char_decode_inverts_encode(text):
    tok = CharTokenizer.train(text)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert list(tok.chars) == sorted(set(text))
    assert ids.shape == (len(text),)


@pytest.mark.smoke
@given(ANY_TEXT)
def test_byte_decode_inverts_encode(text):
    tok = ByteTokenizer()
    assert tok.decode(tok.encode(text)) == text


@given(ANY_TEXT.filter(bool))
def test_json_round_trip(text):
    for tok in (CharTokenizer.train(text), ByteTokenizer()):
        assert tokenizer.from_json(json.loads(json.dumps(tok.to_json()))) == tok


@pytest.mark.parametrize("chars", ["\ud83d\ude00", "a\ud800\udbff\udc00\udfff😀"])
def test_json_keeps_surrogates_separate(chars):
    tok = CharTokenizer(chars)
    assert tokenizer.from_json(json.loads(json.dumps(tok.to_json()))) == tok
    assert tok.decode(tok.encode(chars)) == chars


@given(st.text(min_size=1))
def test_token_bytes_are_the_bytes_of_the_text(text):
    for tok in (CharTokenizer.train(text), ByteTokenizer()):
        assert b"".join(tok.token_bytes[i] for i in tok.encode(text)) == text.encode()
        assert len(tok.token_bytes) == tok.vocab_size


def test_example_of_the_lecture_notes():
    """'encoder: take a string, output a list of integers; decoder: take a list of integers'."""
    tok = CharTokenizer.train("hello")
    assert tok.encode("hello").tolist() == [1, 0, 2, 2, 3]
    assert tok.decode([1, 0, 2, 2, 3]) == "hello"


def test_unknown_character_is_reported_with_its_position():
    with pytest.raises(UnknownCharacterError) as caught:
        CharTokenizer("abc").encode("abéc")
    assert caught.value.position == 2
    for detail in ("'é'", "U+00E9", "E WITH ACUTE", "position 2", "3 characters", "--unknown skip"):
        assert detail in str(caught.value)


def test_knows_marks_characters_that_can_be_encoded():
    assert CharTokenizer("ab").knows("a\U0010ffffb").tolist() == [True, False, True]
    assert ByteTokenizer().knows("é").all()


@pytest.mark.parametrize("tok", [CharTokenizer("abc"), ByteTokenizer()])
@pytest.mark.parametrize("ids", [[-1], [0, 256]])
def test_ids_outside_the_vocabulary_are_refused(tok, ids):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tok.decode(ids)


def test_ids_must_be_integers():
    for ids in ([0.5], [True]):
        with pytest.raises(ValueError, match="integers"):
            CharTokenizer("abc").decode(ids)
    assert CharTokenizer("abc").decode([]) == ""


@pytest.mark.parametrize(
    "tok", [CharTokenizer("abcdef"), ByteTokenizer(), BPETokenizer((*ByteTokenizer().token_bytes, b"th"))]
)
def test_ids_of_any_shape_are_decoded_in_order(tok):
    assert tok.decode(np.array([[0, 1], [2, 3]])) == tok.decode([0, 1, 2, 3])
    assert tok.decode(3) == tok.decode([3])


def test_incomplete_utf8_decodes_to_the_replacement_character():
    assert ByteTokenizer().decode([0xC3]) == "�"


@pytest.mark.parametrize(
    "tree",
    [
        *({}, None, [], {"kind": "bpe"}, {"kind": "byte", "x": 1}, {"kind": "char"}, {"kind": "char", "chars": 3}),
        *({"kind": "char", "chars": codes} for codes in ([-1], [0x110000], ["a"], [1.0], [True])),
    ],
)
def test_invalid_json_is_refused(tree):
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizer.from_json(tree)


@pytest.mark.parametrize("chars", ["", "aa"])
def test_empty_and_duplicate_vocabularies_are_refused(chars):
    with pytest.raises(ValueError, match="each of them once"):
        CharTokenizer(chars)


@pytest.mark.parametrize(
    ("tok", "typed", "expected"),
    [
        (CharTokenizer("\nab"), "a\r\nb\r", "a\nb\n"),
        (ByteTokenizer(), "\ufeffa\r\n\r\nb", "a\n\nb"),
        (CharTokenizer("\n\rab"), "a\r\nb\r", "a\r\nb\r"),
    ],
)
def test_line_ends_become_those_of_the_training_text(tok, typed, expected):
    assert tokenizer.normalize_line_ends(tok, typed) == expected


def test_encoding_is_vectorized():
    """Encoding a million characters takes a few array operations: the test counts Python calls."""
    import sys

    text = "the cat sat on the mat" * 50_000
    tok = CharTokenizer.train(text)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        ids = tok.encode(text)
    finally:
        sys.setprofile(None)
    assert len(ids) == len(text)
    assert calls < 200
    assert isinstance(ids, np.ndarray)
