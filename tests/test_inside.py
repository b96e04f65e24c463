"""Laws of what a forward pass shows of itself: attention maps and the logit lens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import attention, kernels
from jaxgpt import model as nn
from jaxgpt.config import ModelConfig

SMALL = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=16)
MODERN = dataclasses.replace(
    SMALL, position="rope", norm="rms", mlp="relu2", qk_norm=True, n_kv_head=2, window=3, softcap=5.0,
    value_embed=True, smear=True, tie_weights=False, dropout=0.3, remat="blocks", scan_layers=True,
)  # fmt: skip
IDX = jax.random.randint(jax.random.key(1), (3, 8), 0, 11)
forward = jax.jit(nn.forward, static_argnums=0)
maps_of = jax.jit(nn.attention_maps, static_argnums=0)


def noisy(config):
    """Parameters none of which is zero."""
    shapes, rng = jax.eval_shape(partial(nn.init_params, config), jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=[SMALL, MODERN], ids=["gpt2", "modern"])
def seen(request):
    """(config, params, attention maps, lens, logits)."""
    config, params = request.param, noisy(request.param)

    @jax.jit
    def look(params):
        return tuple(look(config, params, IDX) for look in (nn.attention_maps, nn.logit_lens, nn.forward))

    return config, params, *look(params)


def test_maps_are_causal_and_rows_sum_to_one(seen):
    config, _, maps, _, _ = seen
    assert maps.shape == (2, 3, 4, 8, 8)
    np.testing.assert_allclose(maps.sum(-1), np.ones((2, 3, 4, 8)), rtol=1e-5)
    np.testing.assert_array_equal(maps > 0, np.broadcast_to(attention.causal_mask(8, config.window), maps.shape))


def test_maps_are_the_weights_that_the_values_are_gathered_by():
    """One block of GPT-2 by hand, with the maps in the place of queries and keys, is `forward`."""
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


def test_maps_are_there_whatever_kernel_computes_the_logits(monkeypatch):
    """Also where attention goes by blocks, which never hold all weights."""
    config = dataclasses.replace(SMALL, n_layer=1)
    expected = maps_of(config, noisy(config), IDX)
    monkeypatch.setattr(kernels, "kernel", lambda *_: "blocked")
    np.testing.assert_array_equal(
        jax.jit(lambda params: nn.attention_maps(config, params, IDX))(noisy(config)), expected
    )


def test_the_lens_ends_with_the_logits_and_skips_the_blocks_above(seen):
    config, params, _, lens, logits = seen
    assert lens.shape == (3, 3, 8, 11)
    np.testing.assert_allclose(lens[-1], logits, rtol=1e-5, atol=1e-5)
    first = {name: value for name, value in nn.unstacked(params).items() if name != "h_1"}
    shallow = dataclasses.replace(config, n_layer=1, scan_layers=False)
    np.testing.assert_allclose(lens[1], forward(shallow, first, IDX), rtol=1e-5, atol=1e-5)


def test_a_bigram_has_one_depth_and_no_attention():
    config = ModelConfig(kind="bigram", vocab_size=11, block_size=8)
    params = nn.init_params(config, jax.random.key(0))
    np.testing.assert_array_equal(nn.logit_lens(config, params, IDX), nn.forward(config, params, IDX)[None])
    with pytest.raises(ValueError, match="a bigram has no attention"):
        nn.attention_maps(config, params, IDX)


def test_no_more_than_block_size():
    params = jax.eval_shape(partial(nn.init_params, SMALL), jax.random.key(0))
    for look in (nn.attention_maps, nn.logit_lens):
        with pytest.raises(ValueError, match="9 tokens are longer than block_size, 8"):
            look(SMALL, params, jnp.zeros((1, 9), jnp.int32))
