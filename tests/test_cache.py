"""Laws of the cache: with it, each token has the logits that the whole text gives."""

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
OPTIONS = [  # what a cache has to do with
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
RING = [{}, {"n_kv_head": 2, "qk_norm": True}, {"window": 3, "smear": True, "bigram_embed": True}]
forward = jax.jit(model.forward, static_argnums=0)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def noisy(config):
    """Parameters none of which is zero."""
    shapes, rng = jax.eval_shape(partial(model.init_params, config), KEY), np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32), shapes)


def changed(**options):
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
def after_a_prompt(config, params, idx):
    """For each length P of a prompt, which is padded to block_size: the logits after it and after each token that
    follows, (W, B, W, V). Those of n tokens stand at n - 1."""
    B, W = idx.shape

    def of_prompt(P):
        noise = jnp.where(jnp.arange(W)[None] < P, idx, 10 - idx)
        logits, state = model.extend(config, params, init_cache(config, B, W), noise, P)
        done = jnp.zeros((W, *logits.shape)).at[P - 1].set(logits)

        def body(n, carry):
            state, done = carry
            logits, state = model.extend(config, params, state, jax.lax.dynamic_slice_in_dim(idx, n, 1, axis=1))
            return state, done.at[n].set(logits)

        return jax.lax.fori_loop(P, W, body, (state, done))[1]

    return jax.lax.map(of_prompt, jnp.arange(1, W + 1)).swapaxes(1, 2)


@pytest.mark.parametrize(
    "options", [*OPTIONS, pytest.param(TOGETHER[0], marks=pytest.mark.smoke), TOGETHER[1]], ids=lambda o: "+".join(o)
)
def test_after_a_prompt_of_any_length_the_logits_are_those_of_the_whole_text(options):
    config, idx = changed(**options), IDX[:, :8]
    params = noisy(config)
    expected = forward(config, params, idx)
    for P, logits in enumerate(after_a_prompt(config, params, idx), 1):
        close(logits[:, P - 1 :], expected[:, P - 1 :])


@pytest.mark.parametrize("options", [{}, *TOGETHER, {"kind": "bigram"}], ids=lambda o: "+".join(o))
@pytest.mark.parametrize("T", [1, 4, 8])
def test_however_many_tokens_are_read_at_once(options, T):
    config, idx = changed(**options), IDX[:, :8]
    params = noisy(config)
    close(read(config, params, idx, T), forward(config, params, idx)[:, T - 1 :: T])


def test_bfloat16_matmuls_are_no_further_from_exact_ones():
    config, idx = changed(precision="bfloat16", position="rope"), IDX[:, :8]
    params = noisy(config)
    exact, low = (forward(c, params, idx) for c in (changed(position="rope"), config))
    assert jnp.abs(read(config, params, idx, 1) - exact).max() <= 2 * jnp.abs(low - exact).max()


def test_the_cache_has_the_heads_of_keys_and_values_alone():
    blocks = init_cache(changed(n_kv_head=2), 3, 8).blocks
    assert {x.shape for x in jax.tree.leaves(blocks)} == {(3, 2, 8, 4)}
    assert len(jax.tree.leaves(blocks)) == 2 * 2


def windowed(monkeypatch, config, params, idx):
    """`forward` of a text of any length in which each token attends to the last block_size in every block."""
    whole = dataclasses.replace(config, block_size=idx.shape[1])

    def attend(_, q, k, v, drop):
        H, N = q.shape[1:3]
        distance = np.subtract.outer(np.arange(N), np.arange(N))
        mask = (distance >= 0) & (distance < (config.window or config.block_size))
        return attention.attention(q, kernels.repeat_kv(k, H), kernels.repeat_kv(v, H), mask[None, None])

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "causal_attention", attend)
        return jax.jit(partial(model.forward, whole))(params, idx)


@pytest.mark.parametrize("options", RING, ids=lambda o: "+".join(o) or "rope")
def test_beyond_block_size_rotated_positions_slide(monkeypatch, options):
    config = changed(position="rope", **options)
    params = noisy(config)
    expected = windowed(monkeypatch, config, params, IDX)
    close(read(config, params, IDX, 1), expected, rtol=1e-4, atol=1e-4)
    # T more tokens at once need T - 1 more slots.
    close(read(config, params, IDX, 5, 12), expected[:, 4::5], rtol=1e-4, atol=1e-4)
    short = read(config, params, IDX, 5, 8)
    assert (jnp.abs(short - expected[:, 4::5]).max() < 1e-4) == ("window" in options), "3 of 8 - 5 slots are enough"


@pytest.mark.parametrize("n_layer", [1, 2])
def test_with_one_block_sliding_is_reading_the_last_tokens_again(n_layer):
    config = changed(position="rope", n_layer=n_layer)
    params = noisy(config)
    slid = read(config, params, IDX, 1)[:, 8:]
    again = jnp.stack([forward(config, params, IDX[:, t - 7 : t + 1])[:, -1] for t in range(8, 30)], axis=1)
    assert (jnp.abs(slid - again).max() < 1e-4) == (n_layer == 1), "a second block saw further"


def test_learned_positions_end_loudly():
    config = changed()
    logits = read(config, noisy(config), IDX[:, :10], 1)
    assert np.isfinite(logits[:, :8]).all()
    assert np.isnan(logits[:, 8:]).all()


def test_more_tokens_than_slots_are_refused():
    with pytest.raises(ValueError, match="5 tokens are more than the 4 slots"):
        read(changed(), noisy(changed()), IDX, 5, 4)
