import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import cli
from jaxgpt.cli.runs import start_run
from jaxgpt.config import UsageError
from jaxgpt.sample import CHUNK, SamplingParams, until, write
from jaxgpt.start import load_model
from jaxgpt.tokenizer import UnknownCharacterError
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
    run, corpus = start_run(config, "bytes", folder / "runs", folder / "data")
    return fit(run, corpus).run


def texts(run, *args, **kwargs):
    return ["".join(pieces) for pieces in write(*load_model(run), *args, **kwargs)]


def test_text_starts_with_its_prompt_and_is_a_function_of_the_seed(run):
    (one,) = texts(run, "café", 40, seed=3)
    assert one.startswith("café")
    assert texts(run, "café", 40, seed=3) == [one]
    assert texts(run, "café", 40, seed=4) != [one]


def test_line_ends_of_prompt_and_stop_become_those_of_the_training_text(run):
    assert texts(run, "\ufeffcafé\r\ndéjà\r", 40) == texts(run, "café\ndéjà\n", 40)
    (long,) = texts(run, "café\n", 1500)
    ahead = long.removeprefix("café\n")
    assert "\n" in ahead
    assert texts(run, "café\r\n", 1500, stop=["\r\n"]) == ["café\n" + ahead.partition("\n")[0]]


def test_first_of_many_samples_equals_a_single_sample(run):
    many = texts(run, "na", 40, samples=3)
    assert len(set(many)) == 3
    assert texts(run, "na", 40) == many[:1]


def test_characters_split_between_pieces_are_decoded_whole(run):
    """An é has two bytes, which may be in different pieces."""
    from jaxgpt.sample import _texts

    ids = run.tokenizer.encode("é" * 20)
    pieces = [ids[:15], ids[15:16], ids[16:]]
    assert "".join(_texts(run.tokenizer, "", iter(pieces))) == "é" * 20
    assert "".join(_texts(run.tokenizer, "", iter([ids[:1]]))) == "�"


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
        {"seed": 2**32},
        {"prompt": ""},
    ],
)
def test_bad_requests_are_refused(run, options):
    with pytest.raises(UsageError):
        texts(run, **{"prompt": "a", "n_tokens": 5, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": -1}, r"tokens is -1, expected 0 or more"),
        ({"samples": 0}, r"samples is 0, expected 1 or more"),
        ({"seed": -1}, r"seed is -1, expected 0 to 2\*\*32 - 1"),
    ],
)
def test_error_names_only_the_number_out_of_range(run, options, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        texts(run, **{"prompt": "a", "n_tokens": 5, **options})


def test_default_prompt_is_a_line_feed_or_the_first_character(run, tmp_path, tiny, change):
    assert texts(run, None, 5)[0].startswith("\n")
    (tmp_path / "line.txt").write_text("the cat sat on the mat " * 40)
    config = change(tiny, kind="bigram", corpus=str(tmp_path / "line.txt"), vocab_size=0, steps=5)
    chars = fit(*start_run(config, "chars", tmp_path / "runs", tmp_path / "data")).run
    assert texts(chars, None, 5)[0].startswith(" ")


def test_unknown_characters_of_a_prompt_are_an_error_or_skipped(tmp_path, tiny, change, verse):
    config = change(tiny, kind="bigram", corpus=str(verse), vocab_size=0, steps=5)
    chars = fit(*start_run(config, "chars", tmp_path / "runs", tmp_path / "data")).run
    with pytest.raises(UnknownCharacterError, match="'Z'"):
        texts(chars, "the Zoo", 5)
    assert texts(chars, "the Zoo", 5, unknown="skip")[0].startswith("the oo")
    with pytest.raises(UsageError, match="prompt is empty"):
        texts(chars, "ZZZ", 5, unknown="skip")


def test_prompts_and_stops_that_are_not_utf8_are_refused(run, capsys):
    """Python decodes such an argument with surrogates: \\xff becomes U+DCFF."""
    for option, others in (("prompt", []), ("stop", ["--prompt", "a"])):
        assert cli.run_command(["sample", str(run.path), *others, f"--{option}", os.fsdecode(b"caf\xc3")]) == 2
        said = f"{option} is 'caf\\udcc3', expected UTF-8 of at least one character: --{option} TEXT"
        assert said in capsys.readouterr().err


def cut_at_stop(text, stop):
    """`text` up to the first stop that is complete, found character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return text[: min(starts)]
    return text


AB_TEXTS = st.text("ab", max_size=12)


@given(AB_TEXTS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.sets(st.integers(0, 12)))
def test_until_ends_before_a_stop_for_any_pieces(text, stop, cuts):
    pieces = [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]
    assert "".join(until(iter(pieces), stop)) == cut_at_stop(text, stop)


def test_until_holds_back_only_the_possible_beginning_of_a_stop():
    assert list(until(iter("one two"), ["two", "ten"])) == ["o", "n", "e", " ", "", "", ""]
    assert list(until(iter("to"), ["two"])) == ["", "to", ""]


def test_until_requests_no_piece_after_a_stop():
    def pieces():
        yield "one two"
        raise AssertionError

    assert "".join(until(pieces(), ["two"])) == "one "


def test_write_ends_before_a_stop(run, monkeypatch):
    prompt, n = "caf", 3 * CHUNK
    many = [text.removeprefix(prompt) for text in texts(run, prompt, n, samples=3)]
    stop = [many[0][20:22], many[1][5:8]]
    expected = [prompt + cut_at_stop(text, stop) for text in many]
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
