from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.cli.runs import corpus_of
from jaxgpt.config import DataConfig
from jaxgpt.display.text import token_texts
from jaxgpt.report import looks
from jaxgpt.start import load_checkpoint
from jaxgpt.tokenizer import ByteTokenizer


def test_all_sections_are_available(trained, trained_looks):
    run, data_dir = trained
    assert trained_looks.missing == {}
    assert [sample.step for sample in trained_looks.samples] == looks.steps(run) == [0, 10, 20]
    assert len({sample.prompt for sample in trained_looks.samples}) == 1
    assert len({sample.text for sample in trained_looks.samples}) == 3, "the text of each checkpoint is another"
    uniform, unigram, bigram = trained_looks.ngrams.values()
    assert bigram < unigram < uniform
    _, val = corpus_of(run, data_dir).split(DataConfig())
    text = run.tokenizer.decode(val)
    assert "".join(trained_looks.passage["tokens"]) in text
    assert "".join(trained_looks.attention["tokens"]) in text
    assert [trained_looks.attention[name] for name in ("layers", "heads", "size")] == [1, 2, 8]


def test_step_0_of_an_imported_run_is_only_shown_if_it_was_kept(trained, monkeypatch):
    run = trained[0]
    monkeypatch.setattr(type(run), "events", lambda self: [{"event": "import", "step": 0}])
    assert looks.steps(run) == [10, 20]


def test_each_token_of_the_passage_has_at_least_half_a_window_of_context(trained, monkeypatch):
    """Each loss is that of a window with at least 4 of 8 tokens before its token."""
    monkeypatch.setattr(looks, "READ", 40)
    run, data_dir = trained
    config, (_, params) = run.config.model, load_checkpoint(run)
    _, val = corpus_of(run, data_dir).split(DataConfig())
    found = looks.read(config, params, val, run.tokenizer)
    first, texts = 4, token_texts(run.tokenizer)
    ids = val[first : first + 40]
    assert found["tokens"] == [texts[i] for i in ids]
    windows = np.stack([val[i : i + 9] for i in range(40)]).astype(np.int32)
    alone = jax.jit(model.losses, static_argnums=0)(config, params, windows[:, :-1], windows[:, 1:])
    for i, loss in enumerate(found["losses"], first):
        assert min(abs(loss - alone[i - 1 - t, t]) for t in range(3, 8) if i > t) < 1e-4
    for token, loss, likely in zip(*found.values(), strict=True):
        chances = [p for _, p in likely]
        assert chances == sorted(chances, reverse=True)
        if token == likely[0][0]:
            assert np.exp(-loss) == pytest.approx(chances[0], rel=1e-4)


def test_attention_is_not_shown_beyond_the_context(trained, monkeypatch):
    monkeypatch.setattr(looks, "attention_maps", lambda model, params, idx: np.ones((1, 1, 2, *idx.shape[1:] * 2)))
    run, model = trained[0], trained[0].config.model
    for block_size in (1, 2, 8):
        found = looks.attend(replace(model, block_size=block_size), {}, np.zeros(9, int), run.tokenizer)
        assert len(found["tokens"]) == block_size


def test_prompt_has_whole_characters(trained, monkeypatch):
    """With a byte tokenizer, the split and its first 16 tokens may begin or end within a character."""
    run, prompts = trained[0], []
    monkeypatch.setattr(looks, "write", lambda *args, **more: prompts.append(args[3]) or [iter(["", ""])])
    monkeypatch.setitem(vars(run), "tokenizer", ByteTokenizer())
    text = "\U0001f642 größe naïve".encode()
    for ids in (text[1:], text[:16], b"\x99\x82" * 20):
        looks.samples(run, np.frombuffer(ids, np.uint8))
    assert dict.fromkeys(prompts) == dict.fromkeys([" größe naï", "\U0001f642 größe na", None])


@pytest.mark.parametrize("broken", ["read", "attend"])
@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_section_that_fails_leaves_the_others(trained, monkeypatch, broken, error):
    def fail(*args):
        raise error("no room")

    names = {"read": "passage", "attend": "attention"}
    for name in names:
        monkeypatch.setattr(looks, name, lambda *args: "seen")
    monkeypatch.setattr(looks, "samples", lambda *args: [])
    monkeypatch.setattr(looks, broken, fail)
    found = looks.look(*trained)
    assert found.missing == {names[broken]: "no room"}
    assert [name for name in names.values() if getattr(found, name) != "seen"] == [names[broken]]


def test_missing_weights_are_reported(trained, tmp_path, monkeypatch):
    run, data_dir = trained
    monkeypatch.setattr(looks, "samples", lambda *args: [])

    def damaged(*args):
        raise looks.CheckpointError("it is damaged")

    monkeypatch.setattr(looks, "load_checkpoint", damaged)
    found = looks.look(run, data_dir)
    assert found.missing == {"weights": "it is damaged"}
    assert found.ngrams
    assert found.passage is None
