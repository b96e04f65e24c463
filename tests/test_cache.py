"""The KV cache: reading a text in pieces gives the logits of one forward pass over the whole text."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import attention, kernels, model
from jaxgpt.attention import init_cache
from jaxgpt.config import ModelConfig

SMALL = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=16)
KEY = jax.random.key(0)
IDX = jax.random.randint(jax.random.key(1), (3, 30), 0, 11)
OPTIONS = [  # those that change the cache or how it is used
    {},
    {"position": "rope"},
    {"n_kv_head": 1},
    {"window": 3},
    {"kind": "bigram"},
]
OTHERS = {
    "smear": True,
    "bigram_embed": True,
    "norm": "rms",
    "mlp": "relu2",
    "gelu": "tanh",
    "qk_norm": True,
    "softcap": 5.0,
    "bias": True,
    "tie_weights": False,
    "dropout": 0.3,
    "remat": "blocks",
}
EVERYTHING = {name: value for option in [*OPTIONS, OTHERS] for name, value in option.items()}
EVERYTHING |= {"kind": "gpt", "n_kv_head": 2}
TOGETHER = [EVERYTHING, EVERYTHING | {"position": "learned", "window": 0, "mlp": "swiglu", "bias": False}]
SLIDING = [{}, {"n_kv_head": 2, "qk_norm": True}, {"window": 3, "smear": True, "bigram_embed": True}]
forward = jax.jit(model.forward, static_argnums=0)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def random_params(config):
    """Random parameters, none of them zero: a zero would hide what it multiplies."""
    shapes, rng = jax.eval_shape(partial(model.init_params, config), KEY), np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32), shapes)


def small_with(**options):
    return dataclasses.replace(SMALL, **options)


@partial(jax.jit, static_argnums=(0, 3, 4))
def read(config, params, idx, T, size=8):
    """The logits after every T tokens of `idx`, (B, N / T, V), read T at a time."""
    pieces = idx.reshape(len(idx), -1, T).swapaxes(0, 1)
    empty = init_cache(config, len(idx), size)._replace(read=jnp.int32(0))

    def body(state, piece):
        logits, state = model.extend(config, params, state, piece)
        return state, logits

    return jax.lax.scan(body, empty, pieces)[1].swapaxes(0, 1)


@partial(jax.jit, static_argnums=0)
def read_after_prompts(config, params, idx):
    """For each prompt length P, padded to block_size: the logits after the prompt and after each token that follows,
    (W, B, W, V). Index n - 1 has the logits after n tokens."""
    B, W = idx.shape

    def after_prompt_of(P):
        padded = jnp.where(jnp.arange(W)[None] < P, idx, 10 - idx)
        logits, state = model.extend(config, params, init_cache(config, B, W), padded, P)
        found = jnp.zeros((W, *logits.shape)).at[P - 1].set(logits)

        def body(n, carry):
            state, found = carry
            logits, state = model.extend(config, params, state, jax.lax.dynamic_slice_in_dim(idx, n, 1, axis=1))
            return state, found.at[n].set(logits)

        return jax.lax.fori_loop(P, W, body, (state, found))[1]

    return jax.lax.map(after_prompt_of, jnp.arange(1, W + 1)).swapaxes(1, 2)


@pytest.mark.parametrize(
    "options", [*OPTIONS, pytest.param(TOGETHER[0], marks=pytest.mark.smoke), TOGETHER[1]], ids=lambda o: "+".join(o)
)
def test_logits_after_a_prompt_of_any_length_equal_those_of_the_whole_text(options):
    config, idx = small_with(**options), IDX[:, :8]
    params = random_params(config)
    expected = forward(config, params, idx)
    for P, logits in enumerate(read_after_prompts(config, params, idx), 1):
        close(logits[:, P - 1 :], expected[:, P - 1 :])


@pytest.mark.parametrize("options", [{}, *TOGETHER, {"kind": "bigram"}], ids=lambda o: "+".join(o))
@pytest.mark.parametrize("T", [1, 4, 8])
def test_logits_do_not_depend_on_tokens_per_call(options, T):
    config, idx = small_with(**options), IDX[:, :8]
    params = random_params(config)
    close(read(config, params, idx, T), forward(config, params, idx)[:, T - 1 :: T])


def test_bfloat16_error_is_at_most_twice_that_without_a_cache():
    config, idx = small_with(precision="bfloat16", position="rope"), IDX[:, :8]
    params = random_params(config)
    exact, low = (forward(c, params, idx) for c in (small_with(position="rope"), config))
    assert jnp.abs(read(config, params, idx, 1) - exact).max() <= 2 * jnp.abs(low - exact).max()


def test_cache_holds_only_the_kv_heads():
    blocks = init_cache(small_with(n_kv_head=2), 3, 8).blocks
    assert {x.shape for x in jax.tree.leaves(blocks)} == {(3, 2, 8, 4)}
    assert len(jax.tree.leaves(blocks)) == 2 * 2


def sliding_window_forward(monkeypatch, config, params, idx):
    """`forward` of a text of any length: in every layer, each token attends to the last block_size (or `window`)."""
    whole = dataclasses.replace(config, block_size=idx.shape[1])

    def attend(_, q, k, v, drop):
        H, N = q.shape[1:3]
        distance = np.subtract.outer(np.arange(N), np.arange(N))
        mask = (distance >= 0) & (distance < (config.window or config.block_size))
        return attention.attention(q, kernels.repeat_kv(k, H), kernels.repeat_kv(v, H), mask[None, None])

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "causal_attention", attend)
        return jax.jit(partial(model.forward, whole))(params, idx)


@pytest.mark.parametrize("options", SLIDING, ids=lambda o: "+".join(o) or "rope")
def test_rope_cache_slides_beyond_block_size(monkeypatch, options):
    config = small_with(position="rope", **options)
    params = random_params(config)
    expected = sliding_window_forward(monkeypatch, config, params, IDX)
    close(read(config, params, IDX, 1), expected, rtol=1e-4, atol=1e-4)
    # T tokens at once need T - 1 more slots.
    close(read(config, params, IDX, 5, 12), expected[:, 4::5], rtol=1e-4, atol=1e-4)
    short = read(config, params, IDX, 5, 8)
    enough = jnp.abs(short - expected[:, 4::5]).max() < 1e-4
    assert enough == ("window" in options), "a window of 3 needs 3 + 4 slots, one of block_size 8 + 4"


@pytest.mark.parametrize("n_layer", [1, 2])
def test_sliding_equals_rereading_the_last_tokens_only_with_one_layer(n_layer):
    config = small_with(position="rope", n_layer=n_layer)
    params = random_params(config)
    sliding = read(config, params, IDX, 1)[:, 8:]
    reread = jnp.stack([forward(config, params, IDX[:, t - 7 : t + 1])[:, -1] for t in range(8, 30)], axis=1)
    assert (jnp.abs(sliding - reread).max() < 1e-4) == (n_layer == 1), "in a second layer, keys depend on older tokens"


def test_learned_positions_beyond_block_size_give_nan():
    config = small_with()
    logits = read(config, random_params(config), IDX[:, :10], 1)
    assert np.isfinite(logits[:, :8]).all()
    assert np.isnan(logits[:, 8:]).all()


def test_more_tokens_than_slots_are_refused():
    with pytest.raises(ValueError, match="5 tokens are more than the 4 slots"):
        read(small_with(), random_params(small_with()), IDX, 5, 4)


def test_a_long_text_read_at_once_into_an_empty_cache_slides(monkeypatch):
    config = small_with(position="rope")
    params = random_params(config)
    expected = sliding_window_forward(monkeypatch, config, params, IDX)[:, -1]
    logits, _ = model.extend(config, params, init_cache(config, *IDX.shape), IDX)
    close(logits, expected, rtol=1e-4, atol=1e-4)
