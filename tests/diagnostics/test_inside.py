"""Attention maps, the logit lens and the losses of tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr

from jaxgpt import attention, kernels, model
from jaxgpt.config import ModelConfig
from jaxgpt.data import Batch
from jaxgpt.diagnostics import inside
from jaxgpt.diagnostics.inside import token_scores
from jaxgpt.evaluation import evaluate
from jaxgpt.loss import token_losses
from jaxgpt.tokenizer import CharTokenizer

CONFIG = ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16)
BIGRAM = ModelConfig(kind="bigram", vocab_size=11, block_size=8)
PARAMS = jax.tree.map(lambda p: 5 * p, jax.jit(lambda key: model.init_params(CONFIG, key))(jax.random.key(0)))
forward = jax.jit(model.forward, static_argnums=0)
IDS = np.random.default_rng(0).integers(0, 11, 29)


SMALL = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=16)
MODERN = dataclasses.replace(
    SMALL, position="rope", norm="rms", mlp="relu2", qk_norm=True, n_kv_head=2, window=3, softcap=5.0,
    smear=True, tie_weights=False, dropout=0.3, remat="blocks", scan_layers=True,
)  # fmt: skip
IDX = jax.random.randint(jax.random.key(1), (3, 8), 0, 11)
maps_of = jax.jit(inside.attention_maps, static_argnums=0)


def test_the_last_depth_of_the_lens_is_the_prediction_of_the_model():
    batch = Batch(IDS[None, :8], IDS[None, 1:9])
    found = jax.jit(inside.lens, static_argnums=0)(CONFIG, PARAMS, batch)
    assert {x.shape for x in found} == {(2, 1, 8)}
    logits = forward(CONFIG, PARAMS, batch.inputs)
    np.testing.assert_allclose(found.losses[-1], token_losses(logits, batch.targets), rtol=1e-5)
    np.testing.assert_allclose(found.divergence[-1], jnp.zeros((1, 8)), atol=1e-6)
    p = jax.nn.softmax(jax.jit(inside.logit_lens, static_argnums=0)(CONFIG, PARAMS, batch.inputs))
    np.testing.assert_allclose(found.divergence[0], rel_entr(p[-1], p[0]).sum(axis=-1), rtol=1e-4)
    np.testing.assert_array_equal(found.top[-1], logits.argmax(axis=-1))
    np.testing.assert_allclose(found.probability[-1], jax.nn.softmax(logits).max(axis=-1), rtol=1e-5)


def test_the_mean_of_token_scores_is_the_loss_of_evaluate():
    found = token_scores(CONFIG, PARAMS, IDS, k=3)
    assert found.losses.shape == (28,)
    exact = evaluate(CONFIG, PARAMS, IDS, CharTokenizer("abcdefghijk"))
    np.testing.assert_allclose(found.losses.mean(), exact.loss, rtol=1e-5)


def test_each_token_is_scored_by_the_context_before_it():
    found = token_scores(CONFIG, PARAMS, IDS, k=11, stride=1)
    for t in (1, 5, 8, 9, 20, 28):  # with a growing context, then with a full one
        first = max(0, t - 8)
        window = jnp.asarray(IDS[first : first + 8])[None]
        chances = jax.nn.softmax(forward(CONFIG, PARAMS, window)[0, t - 1 - first])
        np.testing.assert_allclose(found.losses[t - 1], -np.log(chances[IDS[t]]), rtol=1e-4)
        np.testing.assert_allclose(found.probabilities[t - 1], np.sort(chances)[::-1], rtol=1e-4)
        np.testing.assert_allclose(chances[found.ids[t - 1]], found.probabilities[t - 1], rtol=1e-4)


def test_token_scores_of_a_short_text_and_bad_arguments():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(11, 11)), jnp.float32)
    params = {"token_embedding_table": {"embedding": table}}
    found = token_scores(BIGRAM, params, IDS[:3], k=1)
    np.testing.assert_allclose(found.losses, token_losses(table[IDS[:2]], jnp.asarray(IDS[1:3])), rtol=1e-5)
    for message, arguments in {
        "1 tokens have none to predict": (IDS[:1],),
        "stride is 9, expected 1 to 8": (IDS, 3, 9),
    }.items():
        with pytest.raises(ValueError, match=message):
            token_scores(BIGRAM, params, *arguments)


def noisy(config):
    """Random parameters, none of them zero."""
    shapes, rng = jax.eval_shape(partial(model.init_params, config), jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=[SMALL, MODERN], ids=["gpt2", "modern"])
def outputs(request):
    """(config, params, attention maps, lens, logits)."""
    config, params = request.param, noisy(request.param)

    @jax.jit
    def compute(params):
        return tuple(f(config, params, IDX) for f in (inside.attention_maps, inside.logit_lens, model.forward))

    return config, params, *compute(params)


def test_maps_are_causal_and_rows_sum_to_one(outputs):
    config, _, maps, _, _ = outputs
    assert maps.shape == (2, 3, 4, 8, 8)
    np.testing.assert_allclose(maps.sum(-1), np.ones((2, 3, 4, 8)), rtol=1e-5)
    np.testing.assert_array_equal(maps > 0, np.broadcast_to(attention.causal_mask(8, config.window), maps.shape))


def test_maps_are_the_weights_of_the_values_in_forward():
    """One block of GPT-2, computed by hand with the maps instead of queries and keys, equals `forward`."""
    config = dataclasses.replace(SMALL, n_layer=1)
    params = jax.tree.map(np.asarray, noisy(config))
    block, (maps,) = params["h_0"], np.asarray(maps_of(config, params, IDX))

    def norm(x, scale):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale["scale"][None, None]

    x = params["wte"]["embedding"][IDX] + params["wpe"]["embedding"][None]
    values = (norm(x, block["ln_1"]) @ block["attn"]["value"]["kernel"]).reshape(3, 8, 4, 4)
    gathered = np.einsum("bhts,bshd->bthd", maps, values).reshape(3, 8, 16)
    x = x + gathered @ block["attn"]["c_proj"]["kernel"]
    hidden = jax.nn.gelu(norm(x, block["ln_2"]) @ block["mlp"]["c_fc"]["kernel"], approximate=False)
    x = x + hidden @ block["mlp"]["c_proj"]["kernel"]
    logits = norm(x, params["ln_f"]) @ params["wte"]["embedding"].T
    np.testing.assert_allclose(logits, forward(config, params, IDX), rtol=1e-4, atol=1e-4)


def test_maps_do_not_depend_on_the_attention_kernel(monkeypatch):
    """With blocked attention, which never holds all weights, the maps are the same."""
    config = dataclasses.replace(SMALL, n_layer=1)
    expected = maps_of(config, noisy(config), IDX)
    monkeypatch.setattr(kernels, "kernel", lambda *_: "blocked")
    np.testing.assert_array_equal(
        jax.jit(lambda params: inside.attention_maps(config, params, IDX))(noisy(config)), expected
    )


def test_the_logit_lens_ends_with_the_logits_and_skips_the_blocks_above(outputs):
    config, params, _, lens, logits = outputs
    assert lens.shape == (3, 3, 8, 11)
    np.testing.assert_allclose(lens[-1], logits, rtol=1e-5, atol=1e-5)
    first = {name: value for name, value in model.unstacked(params).items() if name != "h_1"}
    shallow = dataclasses.replace(config, n_layer=1, scan_layers=False)
    np.testing.assert_allclose(lens[1], forward(shallow, first, IDX), rtol=1e-5, atol=1e-5)


def test_a_bigram_has_one_depth_and_no_attention():
    config = ModelConfig(kind="bigram", vocab_size=11, block_size=8)
    params = model.init_params(config, jax.random.key(0))
    np.testing.assert_array_equal(inside.logit_lens(config, params, IDX), model.forward(config, params, IDX)[None])
    with pytest.raises(ValueError, match="a bigram has no attention"):
        inside.attention_maps(config, params, IDX)


def test_more_tokens_than_block_size_are_refused():
    params = jax.eval_shape(partial(model.init_params, SMALL), jax.random.key(0))
    for look in (inside.attention_maps, inside.logit_lens):
        with pytest.raises(ValueError, match="9 tokens are longer than block_size, 8"):
            look(SMALL, params, jnp.zeros((1, 9), jnp.int32))
