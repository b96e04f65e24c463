import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import cli
from jaxgpt.cli.runs import start
from jaxgpt.config import UsageError
from jaxgpt.sample import CHUNK, SamplingParams, until, write
from jaxgpt.start import load_model
from jaxgpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, UnknownCharacterError, encode_prompt
from jaxgpt.train import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

    folder = tmp_path_factory.mktemp("write")
    (folder / "text.txt").write_text("naïve café, déjà vu\n" * 30)
    config = Config(
        DataConfig(corpus=str(folder / "text.txt"), tokenizer="byte"),
        ModelConfig(block_size=16, n_layer=1, n_head=1, n_embd=16, vocab_size=300),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        TrainConfig(steps=10, scan_steps=10, eval_every=10, eval_batches=0),
    )
    run, corpus = start(config, "bytes", folder / "runs", folder / "data")
    return fit(run, corpus).run


def texts(run, *args, **kwargs):
    return ["".join(pieces) for pieces in write(*load_model(run), *args, **kwargs)]


def test_a_text_begins_with_its_prompt_and_repeats_with_its_seed(run):
    (one,) = texts(run, "café", 40, seed=3)
    assert one.startswith("café")
    assert texts(run, "café", 40, seed=3) == [one]
    assert texts(run, "café", 40, seed=4) != [one]


def test_line_ends_of_a_prompt_and_a_stop_are_those_of_the_training_text(run):
    assert texts(run, "\ufeffcafé\r\ndéjà\r", 40) == texts(run, "café\ndéjà\n", 40)
    (long,) = texts(run, "café\n", 1500)
    ahead = long.removeprefix("café\n")
    assert "\n" in ahead
    assert texts(run, "café\r\n", 1500, stop=["\r\n"]) == ["café\n" + ahead.partition("\n")[0]]


def test_the_first_of_many_is_the_only_one(run):
    many = texts(run, "na", 40, samples=3)
    assert len(set(many)) == 3
    assert texts(run, "na", 40) == many[:1]


def test_characters_split_between_pieces_stay_whole(run):
    """16 tokens a piece and two bytes an é: joined pieces must decode as the whole does."""
    from jaxgpt.sample import _texts

    ids = run.tokenizer.encode("é" * 20)
    pieces = [ids[:15], ids[15:16], ids[16:]]
    assert "".join(_texts(run.tokenizer, "", iter(pieces))) == "é" * 20
    assert "".join(_texts(run.tokenizer, "", iter([ids[:1]]))) == "�"
    assert "".join(_texts(run.tokenizer, ids[:3], iter([ids[3:]]))) == "é" * 20, "nor after a prompt of bytes"


@pytest.mark.parametrize(
    "options",
    [
        {"n_tokens": -1},
        {"sampling": SamplingParams(temperature=-0.1)},
        {"sampling": SamplingParams(top_k=-1)},
        {"sampling": SamplingParams(top_p=0)},
        {"sampling": SamplingParams(min_p=2)},
        {"stop": ["a", ""]},
        {"samples": 0},
        {"seed": -1},
        {"prompt": ""},
    ],
)
def test_bad_requests_are_refused(run, options):
    with pytest.raises(UsageError):
        texts(run, **{"prompt": "a", "n_tokens": 5, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_tokens": -1}, r"tokens is -1, expected 0 or more"),
        ({"samples": 0}, r"samples is 0, expected 1 or more"),
        ({"seed": -1}, r"seed is -1, expected 0 to 2\*\*32 - 1"),
    ],
)
def test_a_refusal_names_only_the_number_that_is_out_of_range(run, options, said):
    with pytest.raises(UsageError, match=f"^{said}$"):
        texts(run, **{"prompt": "a", "n_tokens": 5, **options})


def test_without_a_prompt_it_begins_with_a_line_feed_or_the_first_character(run, tmp_path, tiny, change):
    assert texts(run, None, 5)[0].startswith("\n")
    (tmp_path / "line.txt").write_text("the cat sat on the mat " * 40)
    config = change(tiny, kind="bigram", corpus=str(tmp_path / "line.txt"), vocab_size=0, steps=5)
    chars = fit(*start(config, "chars", tmp_path / "runs", tmp_path / "data")).run
    assert texts(chars, None, 5)[0].startswith(" ")


def test_unknown_characters_of_a_prompt_are_an_error_or_skipped(run, tmp_path, tiny, change, verse):
    config = change(tiny, kind="bigram", corpus=str(verse), vocab_size=0, steps=5)
    chars = fit(*start(config, "chars", tmp_path / "runs", tmp_path / "data")).run
    with pytest.raises(UnknownCharacterError, match="'Z'"):
        texts(chars, "the Zoo", 5)
    assert texts(chars, "the Zoo", 5, unknown="skip")[0].startswith("the oo")
    with pytest.raises(UsageError, match="prompt is empty"):
        texts(chars, "ZZZ", 5, unknown="skip")


def test_bytes_of_the_command_line_that_are_not_utf8_reach_a_byte_model_as_they_are(run, monkeypatch, capsys):
    """Python hands such an argument over with surrogates: \\xff as U+DCFF."""
    asked = []
    monkeypatch.setattr("jaxgpt.sample.stream", lambda config, params, ids, *args, **how: asked.append(ids) or [])
    for prompt in (b"\xff\xfe", b"caf\xc3", "é".encode()):
        assert cli.run_command(["sample", str(run.path), "--prompt", os.fsdecode(prompt)]) == 0
        assert asked.pop().tolist() == [list(prompt)]
    assert capsys.readouterr().out == "\ufffd\ufffd\ncaf\ufffd\né\n"
    assert cli.run_command(["sample", str(run.path), "--prompt", "a", "--stop", os.fsdecode(b"\xff")]) == 2
    assert "stop is ['\\udcff'], expected UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", [CharTokenizer("a\udcff"), BPETokenizer(tuple(ByteTokenizer().token_bytes))])
def test_other_tokenizers_refuse_bytes_that_are_not_utf8(tokenizer):
    assert (
        encode_prompt(tokenizer, b"a").tolist()
        == encode_prompt(tokenizer, "a").tolist()
        == tokenizer.encode("a").tolist()
    )
    with pytest.raises(UsageError, match="byte 0xff at offset 1 of the text is not UTF-8; only a run trained with"):
        encode_prompt(tokenizer, b"a\xff")


def ended(text, stop):
    """`text` before the first stop to be complete, character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return text[: min(starts)]
    return text


AB = st.text("ab", max_size=12)


@given(AB, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.sets(st.integers(0, 12)))
def test_a_text_ends_before_a_stop_however_it_comes_in_pieces(text, stop, cuts):
    pieces = [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]
    assert "".join(until(iter(pieces), stop)) == ended(text, stop)


def test_only_what_a_stop_may_begin_with_waits():
    assert list(until(iter("one two"), ["two", "ten"])) == ["o", "n", "e", " ", "", "", ""]
    assert list(until(iter("to"), ["two"])) == ["", "to", ""]


def test_after_a_stop_nothing_is_asked_for():
    def pieces():
        yield "one two"
        raise AssertionError

    assert "".join(until(pieces(), ["two"])) == "one "


def test_writing_ends_before_a_stop_in_one_text_and_in_many(run, monkeypatch):
    prompt, n = "caf", 3 * CHUNK
    many = [text.removeprefix(prompt) for text in texts(run, prompt, n, samples=3)]
    stop = [many[0][20:22], many[1][5:8]]
    expected = [prompt + ended(text, stop) for text in many]
    assert len(expected[0]) < len(prompt + many[0])
    assert texts(run, prompt, n, samples=3, stop=stop) == expected
    assert texts(run, prompt, n, stop=stop) == expected[:1]
    assert texts(run, prompt, n, stop=stop[0]) == texts(run, prompt, n, stop=stop[:1])

    read = []

    def counted(*args, **kwargs):
        for piece in stream(*args, **kwargs):
            read.append(piece.shape[1])
            yield piece

    from jaxgpt.sample import stream

    monkeypatch.setattr("jaxgpt.sample.stream", counted)
    (text,) = texts(run, prompt, 1000, stop=stop)
    assert text == expected[0]
    assert sum(read) <= 20 + 2 + CHUNK
