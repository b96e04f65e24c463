"""The loss of a whole split: every prediction once, whatever the batches; bits, standard error, estimates."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import evaluation, model
from jaxgpt.config import ModelConfig
from jaxgpt.evaluation import estimate, evaluate, text_size, windows_per_batch
from jaxgpt.loss import token_losses
from jaxgpt.step import init_state
from jaxgpt.tokenizer import ByteTokenizer, CharTokenizer

BIGRAM = ModelConfig(kind="bigram", vocab_size=5, block_size=8)
PARAMS = model.init_params(BIGRAM, jax.random.key(0))
TOKENIZER = CharTokenizer("abcdé")
forward = jax.jit(model.forward, static_argnums=0)


def tokens(n):
    return np.random.default_rng(n).integers(0, 5, n).astype(np.uint16)


def bigram_losses(ids):
    """The bigram's loss of each prediction, one pair at a time."""
    table = np.asarray(PARAMS["token_embedding_table"]["embedding"], np.float64)
    return np.array([np.log(np.exp(table[a]).sum()) - table[a, b] for a, b in itertools.pairwise(ids)])


@pytest.mark.smoke
@settings(max_examples=25)
@given(st.integers(9, 60), st.integers(1, 9))
def test_every_predicted_token_counts_once(n, batch_size):
    result = evaluate(BIGRAM, PARAMS, tokens(n), TOKENIZER, batch_size)
    assert result.n_tokens == n - 1
    np.testing.assert_allclose(result.loss, bigram_losses(tokens(n)).mean(), rtol=1e-5)


def test_only_the_last_window_overlaps(tiny, change):
    """Against a loop over the windows [0, 8), [8, 16) and one that ends at the last token, for the rest."""
    config = change(tiny, dropout=0.5).model
    params = init_state(tiny).params
    ids = np.random.default_rng(1).integers(0, 13, 22).astype(np.uint16)  # 21 predictions: 8 + 8 + 5
    total = 0.0
    for start, first in ((0, 0), (8, 0), (13, 3)):
        window = ids[start : start + 9].astype(np.int32)
        losses = token_losses(forward(config, params, window[None, :-1]), window[None, 1:])
        total += float(losses[0, first:].sum())
    result = evaluate(config, params, ids, CharTokenizer("abcdefghijklm"))
    np.testing.assert_allclose(result.loss, total / 21, rtol=1e-5)


@pytest.mark.parametrize("batches", [1, 3])
def test_result_does_not_depend_on_the_batch_size(tiny, monkeypatch, batches):
    """Nor on the number of batches in a call, which is larger on accelerators."""
    if batches > 1:
        monkeypatch.setattr(evaluation, "BATCHES", batches)
        monkeypatch.setattr(evaluation.sharding, "platform", lambda: "tpu")
    params = init_state(tiny).params
    ids = np.random.default_rng(1).integers(0, 13, 300).astype(np.uint16)
    results = [evaluate(tiny.model, params, ids, CharTokenizer("abcdefghijklm"), size) for size in (None, 1, 7, 64)]
    for result in results[1:]:
        np.testing.assert_allclose(dataclasses.astuple(result), dataclasses.astuple(results[0]), rtol=1e-6)
    assert results[0] == evaluate(tiny.model, params, ids, CharTokenizer("abcdefghijklm")), "not deterministic"
    program = evaluation.compiled(tiny.model, jax.eval_shape(lambda: params), len(ids))
    assert results[0] == evaluate(tiny.model, params, ids, CharTokenizer("abcdefghijklm"), program=program)


@given(st.integers(1, 100_000), st.integers(1, 512), st.integers(2, 60_000), st.integers(1, 9))
def test_batches_have_little_padding(n, T, V, models):
    """For few windows, a batch has at most 32 or less than twice as many; for many, what a device allows."""
    config = ModelConfig(vocab_size=V, block_size=T)
    batch, most = windows_per_batch(config, n, models), windows_per_batch(config, 10**9, models)
    assert batch <= max(2 * n - 1, 32)
    assert batch == most if n >= most else batch >= n
    assert most == 1 or models * most * T <= 2048
    assert most == 1 or models * most * T * V <= 2**26


def test_batch_is_limited_by_logits_or_by_tokens(monkeypatch):
    gpt2 = ModelConfig(vocab_size=50304, block_size=1024)
    assert windows_per_batch(gpt2, 10**6) == 1
    monkeypatch.setattr(evaluation, "logits_at_once", lambda: 10**9)
    assert windows_per_batch(gpt2, 10**6) == 2
    monkeypatch.setattr(evaluation.sharding, "platform", lambda: "gpu")
    assert windows_per_batch(gpt2, 10**6) == 8


def test_bits_are_per_character_and_byte_of_the_predicted_text():
    ids = TOKENIZER.encode("aéé" * 10).astype(np.uint16)
    result = evaluate(BIGRAM, PARAMS, ids, TOKENIZER)
    bits = bigram_losses(ids).sum() / math.log(2)
    np.testing.assert_allclose(result.bits_per_char, bits / 29, rtol=1e-5)
    np.testing.assert_allclose(result.bits_per_byte, bits / 49, rtol=1e-5)  # é has two bytes


def test_rest_of_a_character_counts_as_one_character():
    result = evaluation.evaluation(np.array([math.log(2)]), 1, np.frombuffer("é".encode(), np.uint8), ByteTokenizer())
    assert (result.bits_per_char, result.bits_per_byte) == (1, 1)


@given(st.text(min_size=1))
def test_text_size_counts_characters_and_bytes_for_any_tokenizer(text):
    for tok in (CharTokenizer.train(text), ByteTokenizer()):
        assert text_size(tok, tok.encode(text)) == (len(text), len(text.encode()))


def test_the_standard_error_is_that_of_the_window_means():
    """With windows of equal length, it is the textbook's standard error of their means."""
    ids = tokens(8 * 12 + 1)
    means = bigram_losses(ids).reshape(12, 8).mean(axis=1)
    result = evaluate(BIGRAM, PARAMS, ids, TOKENIZER)
    np.testing.assert_allclose(result.standard_error, means.std(ddof=1) / math.sqrt(12), rtol=1e-4)


def test_one_window_has_no_standard_error_and_fewer_tokens_are_refused():
    assert math.isnan(evaluate(BIGRAM, PARAMS, tokens(9), TOKENIZER).standard_error)
    with pytest.raises(ValueError, match="8 tokens hold no window"):
        evaluate(BIGRAM, PARAMS, tokens(8), TOKENIZER)


def test_the_estimate_is_a_noisy_mean_and_a_function_of_the_step(tiny, change):
    config = change(tiny, kind="bigram", vocab_size=5, eval_batches=200)
    ids = tokens(1000)
    one = estimate(config, PARAMS, ids, 3)
    assert one == estimate(config, PARAMS, ids, 3)
    assert one != estimate(config, PARAMS, ids, 4)
    assert abs(one - bigram_losses(ids).mean()) < 0.05


def test_a_tokenizer_with_too_few_tokens_is_refused():
    with pytest.raises(ValueError, match="id 5 is outside the vocabulary, expected 0 to 2"):
        text_size(CharTokenizer("abc"), np.array([1, 5]))


def test_size_of_a_text_of_more_than_one_block():
    n = 2**24 + 5
    assert text_size(ByteTokenizer(), np.full(n, 97, np.uint8)) == (n, n)
