"""Laws of the lens, of attention's statistics and of token scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model as nn
from jaxgpt.config import ModelConfig
from jaxgpt.data import Batch
from jaxgpt.diagnostics import inside
from jaxgpt.diagnostics.tokens import token_scores
from jaxgpt.evaluation import evaluate
from jaxgpt.tokenizer import CharTokenizer

CONFIG = ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16)
BIGRAM = ModelConfig(kind="bigram", vocab_size=11, block_size=8)
PARAMS = jax.tree.map(lambda p: 5 * p, jax.jit(lambda key: nn.init_params(CONFIG, key))(jax.random.key(0)))
forward = jax.jit(nn.forward, static_argnums=0)
IDS = np.random.default_rng(0).integers(0, 11, 29)


def test_the_lens_ends_with_the_loss_of_the_model_and_nothing_left_to_change():
    batch = Batch(IDS[None, :8], IDS[None, 1:9])
    found = jax.jit(inside.lens, static_argnums=0)(CONFIG, PARAMS, batch)
    assert {x.shape for x in found} == {(2, 1, 8)}
    logits = forward(CONFIG, PARAMS, batch.inputs)
    np.testing.assert_allclose(found.losses[-1], nn.token_losses(logits, batch.targets), rtol=1e-5)
    np.testing.assert_allclose(found.divergence[-1], jnp.zeros((1, 8)), atol=1e-6)
    assert (found.divergence[0] > 0).all()
    np.testing.assert_array_equal(found.top[-1], logits.argmax(axis=-1))
    np.testing.assert_allclose(found.probability[-1], jax.nn.softmax(logits).max(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_heads_that_prefer_nothing_are_as_uncertain_as_can_be(window):
    """With queries of zero each token sees its past evenly: entropy log n, and (n - 1) / 2 tokens back."""
    config = dataclasses.replace(CONFIG, window=window, precision="bfloat16")
    params = jax.tree_util.tree_map_with_path(lambda path, p: 0 * p if "query" in str(path) else p, PARAMS)
    seen = np.minimum(np.arange(8) + 1, window or 8)
    found = jax.jit(inside.attention, static_argnums=0)(config, params, IDS[:16].reshape(2, 8))
    np.testing.assert_allclose(found.uniform, np.log(seen).mean(), rtol=1e-6)
    np.testing.assert_allclose(found.entropy, np.full((1, 2), np.log(seen).mean()), rtol=1e-5)
    np.testing.assert_allclose(found.distance, np.full((1, 2), (seen - 1).mean() / 2), rtol=1e-5)


def test_entropy_of_certainty_is_zero_and_has_no_nan():
    np.testing.assert_allclose(inside.entropy(jnp.array([[1.0, 0, 0], [0.5, 0.5, 0]])), [0, np.log(2)], atol=1e-6)


def test_scores_of_a_text_have_the_mean_that_evaluation_gives():
    found = token_scores(CONFIG, PARAMS, IDS, k=3, batch_size=2)
    assert found.losses.shape == (28,)
    exact = evaluate(CONFIG, PARAMS, IDS, CharTokenizer("abcdefghijk"))
    np.testing.assert_allclose(found.losses.mean(), exact.loss, rtol=1e-5)


def test_each_token_is_scored_by_the_context_before_it():
    found = token_scores(CONFIG, PARAMS, IDS, k=11, stride=1)
    for t in (1, 5, 8, 9, 20, 28):  # from the start on, then with a full context
        first = max(0, t - 8)
        window = jnp.asarray(IDS[first : first + 8])[None]
        chances = jax.nn.softmax(forward(CONFIG, PARAMS, window)[0, t - 1 - first])
        np.testing.assert_allclose(found.losses[t - 1], -np.log(chances[IDS[t]]), rtol=1e-4)
        np.testing.assert_allclose(found.probabilities[t - 1], np.sort(chances)[::-1], rtol=1e-4)
        np.testing.assert_allclose(chances[found.ids[t - 1]], found.probabilities[t - 1], rtol=1e-4)


def test_a_text_shorter_than_a_window_and_what_cannot_be_scored():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(11, 11)), jnp.float32)
    params = {"token_embedding_table": {"embedding": table}}
    found = token_scores(BIGRAM, params, IDS[:3], k=1)
    np.testing.assert_allclose(found.losses, nn.token_losses(table[IDS[:2]], jnp.asarray(IDS[1:3])), rtol=1e-5)
    for message, arguments in {
        "1 tokens have none to predict": (IDS[:1],),
        "k is 12, expected 1 to 11": (IDS, 12),
        "stride is 9, expected 1 to 8": (IDS, 3, 9),
    }.items():
        with pytest.raises(ValueError, match=message):
            token_scores(BIGRAM, params, *arguments)
    with pytest.raises(ValueError, match="a bigram has no attention"):
        inside.attention(BIGRAM, params, IDS[None, :8])
