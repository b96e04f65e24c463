"""The models: shapes, causality, initialization, dropout."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from jaxgpt import model
from jaxgpt.config import ModelConfig, UsageError

GPT = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16)
BIGRAM = ModelConfig(kind="bigram", vocab_size=11, block_size=8)
KEY = jax.random.key(0)
IDX = jax.random.randint(jax.random.key(1), (3, 8), 0, 11)
init_params, forward, logits_and_loss = (
    jax.jit(function, static_argnums=0) for function in (model.init_params, model.forward, model.logits_and_loss)
)


@pytest.mark.smoke
@pytest.mark.parametrize("config", [GPT, BIGRAM])
def test_logits_have_shape_B_T_V(config):
    params = init_params(config, KEY)
    chex.assert_shape(forward(config, params, IDX), (3, 8, 11))
    for T in (1, 5):
        chex.assert_shape(jax.eval_shape(partial(model.forward, config), params, IDX[:, :T]), (3, T, 11))
    with pytest.raises(ValueError, match="9 tokens are longer than block_size, 8"):
        forward(config, params, jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"shape \(8,\) and dtype int32, expected \(B, T\) integers"):
        forward(config, params, IDX[0])
    with pytest.raises(ValueError, match=r"shape \(3, 8\) and dtype float32, expected \(B, T\) integers"):
        forward(config, params, IDX + 0.5)


@pytest.mark.parametrize("config", [GPT, BIGRAM])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_an_empty_batch_has_empty_logits_and_losses(config, shape):
    params, idx = init_params(config, KEY), jnp.zeros(shape, jnp.int32)
    chex.assert_shape(forward(config, params, idx), (*shape, 11))
    chex.assert_shape(model.losses(config, params, idx, idx), shape)


@pytest.mark.parametrize("config", [GPT, BIGRAM])
@pytest.mark.parametrize("shape", [(3, 1), (1, 8), (8,), (3, 4)])
def test_targets_of_another_shape_are_refused(config, shape):
    """Those that broadcast, too."""
    params = jax.eval_shape(partial(model.init_params, config), KEY)
    with pytest.raises(ValueError, match=rf"targets have shape {re.escape(str(shape))}, expected \(3, 8\)"):
        jax.eval_shape(partial(model.losses, config), params, IDX, jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("config", [GPT, BIGRAM])
def test_interface_of_the_lecture_notes(config):
    """Without targets, the loss is None; with targets, logits are (B*T, C) and targets (B*T,)."""
    params = init_params(config, KEY)
    logits, loss = logits_and_loss(config, params, IDX)
    assert loss is None
    chex.assert_shape(logits, (3, 8, 11))
    targets = jnp.roll(IDX, -1, axis=1)
    flat, loss = logits_and_loss(config, params, IDX, targets)
    chex.assert_shape(flat, (24, 11))
    chex.assert_shape(loss, ())
    np.testing.assert_array_equal(flat.reshape(3, 8, 11), logits)
    by_hand = [-jax.nn.log_softmax(flat[i])[targets.reshape(-1)[i]] for i in range(24)]
    np.testing.assert_allclose(loss, np.mean(by_hand), rtol=1e-6)


def test_bigram_logits_are_rows_of_its_table():
    params = init_params(BIGRAM, KEY)
    (table,) = jax.tree.leaves(params)
    chex.assert_shape(table, (11, 11))
    np.testing.assert_array_equal(forward(BIGRAM, params, IDX), table[IDX])


def test_forward_pass_checks_shapes_without_tracing_initializers(monkeypatch):
    params = init_params(ModelConfig(**{**vars(GPT), "bias": True}), KEY)
    wrong = params | {"ln_f": {"scale": jnp.ones(1), "bias": jnp.zeros(16)}}
    features = partial(model.features, ModelConfig(**{**vars(GPT), "bias": True}))
    with pytest.raises(ScopeParamShapeError, match="scale"):
        jax.eval_shape(features, wrong, IDX)
    for layer in (model.Linear, model.LayerNorm):
        monkeypatch.setattr(layer, "param", lambda *_: pytest.fail("Flax traces the initializer"))
    jax.eval_shape(features, params, IDX)


def test_biases_do_not_change_initial_kernels():
    plain, with_biases = (
        dict(jax.tree_util.tree_leaves_with_path(init_params(ModelConfig(**{**vars(GPT), "bias": bias}), KEY)))
        for bias in (False, True)
    )
    for path, kernel in plain.items():
        np.testing.assert_array_equal(kernel, with_biases[path])


@pytest.mark.smoke
def test_causality_by_gradients():
    """The logits at t have zero gradient with respect to the embeddings after t, and non-zero up to it."""
    params = init_params(GPT, KEY)
    idx = jnp.arange(8)[None]  # each token once, so that row i of wte is the input at position i only

    def logits_at(wte, t):
        untied = {**params, "wte": {"embedding": wte}, "lm_head": {"kernel": params["wte"]["embedding"].T}}
        config = ModelConfig(**{**vars(GPT), "tie_weights": False})
        return forward(config, untied, idx)[0, t].sum()

    wte, gradient = params["wte"]["embedding"], jax.jit(jax.grad(logits_at))
    for t in range(8):
        sizes = np.abs(gradient(wte * 50, t)).sum(axis=1)[:8]
        assert (sizes[: t + 1] > 0).all()
        np.testing.assert_array_equal(sizes[t + 1 :], np.zeros(7 - t))


@pytest.mark.parametrize("kind", ["gpt", "bigram"])
def test_vocab_size_of_zero_is_refused(kind):
    with pytest.raises(UsageError, match="vocab_size is 0, expected at least 1"):
        model.init_params(ModelConfig(kind), jax.random.key(0))


def test_parameters_of_a_model_that_cannot_run_are_refused():
    with pytest.raises(UsageError, match=r"n_embd is 16, expected a multiple of n_head \(3\)"):
        model.init_params(ModelConfig(vocab_size=13, n_head=3, n_embd=16), jax.random.key(0))


def test_initialization_matches_nanogpt():
    config = ModelConfig(vocab_size=500, block_size=64, n_layer=2, n_head=4, n_embd=256, bias=True, tie_weights=False)
    params = init_params(config, KEY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        elif name.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        else:
            expected = 0.02 / np.sqrt(4) if "c_proj" in name else 0.02
            assert abs(np.std(leaf) / expected - 1) < 0.05, name
            assert abs(np.mean(leaf)) < expected / 50, name
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_initial_loss_is_near_uniform():
    _, loss = logits_and_loss(GPT, init_params(GPT, KEY), IDX, jnp.roll(IDX, -1, axis=1))
    assert abs(float(loss) - np.log(11)) < 0.1


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # wte 11*16, wpe 8*16, two blocks of (4 attention + 8 MLP) * 16*16 and two norms, a last norm
        ({}, 11 * 16 + 8 * 16 + 2 * (12 * 256 + 32) + 16),
        ({"tie_weights": False}, 2 * 11 * 16 + 8 * 16 + 2 * (12 * 256 + 32) + 16),
        ({"bias": True}, 11 * 16 + 8 * 16 + 2 * (12 * 256 + 64 + 4 * 16 + 5 * 16) + 32),
    ],
)
def test_parameter_counts(options, count):
    shapes = jax.eval_shape(partial(model.init_params, ModelConfig(**{**vars(GPT), **options})), KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_gpt2_has_124_million_parameters():
    """GPT-2's smallest model as published has 124,439,808 with biases. Only shapes are computed."""
    config = ModelConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)
    shapes = jax.eval_shape(lambda: init_params(config, KEY))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808


def test_dropout_is_a_function_of_its_key():
    config, params = ModelConfig(**{**vars(GPT), "dropout": 0.5}), init_params(GPT, KEY)
    without_dropout = forward(config, params, IDX)
    np.testing.assert_array_equal(without_dropout, forward(GPT, params, IDX))
    one, two, other = (forward(config, params, IDX, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    assert (one != without_dropout).any()


def test_dropout_keeps_the_mean():
    """Kept activations are scaled up, so that the expected output is the input."""
    x = jnp.ones((1, 10_000))
    dropped = model.Dropout(0.2).apply({}, x, rngs={"dropout": KEY})
    assert abs(float(dropped.mean()) - 1) < 0.02
    assert abs(float((dropped == 0).mean()) - 0.2) < 0.02


@pytest.mark.parametrize("part", [model.MultiHeadAttention, model.MLP])
def test_outputs_of_attention_and_of_the_mlp_are_dropped(part):
    x = jax.random.normal(KEY, (3, 8, 16))
    variables = part(GPT).init(KEY, x)
    dropped = part(GPT, 0.5).apply(variables, x, rngs={"dropout": KEY})
    kept = np.asarray(dropped) != 0
    assert 0.3 < kept.mean() < 0.7
    unchanged = np.allclose(dropped[kept], 2 * part(GPT).apply(variables, x)[kept], rtol=1e-3, atol=1e-6)
    assert unchanged == (part is model.MLP), "attention drops weights, too"


def test_embeddings_are_dropped():
    """With zero_init, blocks add nothing to them at first."""
    config = ModelConfig(**{**vars(GPT), "dropout": 0.5, "zero_init": True, "norm": "rms"})
    x = model.features(config, init_params(config, KEY), IDX, KEY)
    assert 0.3 < float((x == 0).mean()) < 0.7


def test_scanned_blocks_drop_different_values():
    """Each of two blocks adds the same to the channels that it keeps: a channel is kept by none, by one or by both."""
    config = ModelConfig(**{**vars(GPT), "dropout": 0.5, "bias": True, "norm": "rms", "scan_layers": True})

    def constant(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full_like(x, name.endswith(("mlp/c_fc/bias", "mlp/c_proj/kernel")))

    params = jax.tree_util.tree_map_with_path(constant, init_params(config, KEY))
    tokens = np.asarray(model.features(config, params, IDX, KEY)).reshape(-1, 16)
    assert max(len(np.unique(channels)) for channels in tokens) == 3


def test_bigram_starts_from_a_standard_normal_table():
    table = init_params(ModelConfig("bigram", vocab_size=300), KEY)["token_embedding_table"]["embedding"]
    assert abs(float(jnp.std(table)) - 1) < 0.02


def test_init_scale_multiplies_kernels_and_embeddings():
    config = ModelConfig(**{**vars(GPT), "bias": True})
    twice = init_params(ModelConfig(**{**vars(config), "init_scale": 2.0}), KEY)

    def double(path, x):
        return 2 * x if path[-1].key in ("kernel", "embedding") else x

    chex.assert_trees_all_equal(twice, jax.tree_util.tree_map_with_path(double, init_params(config, KEY)))


def test_layer_norm_matches_pytorch():
    """(x - mean) / sqrt(var + 1e-5), the variance without Bessel's correction. Flax's default epsilon is 1e-6."""
    x = jnp.array([[1e-3, -1e-3, 3e-3, 5e-3]])
    norm = model.norm(GPT, "ln")
    got = norm.apply(norm.init(KEY, x), x)
    np.testing.assert_allclose(got, (x - x.mean()) / np.sqrt(x.var() + 1e-5), rtol=1e-5)


def test_gelu_variants_differ_slightly():
    params = init_params(GPT, KEY)
    params = jax.tree.map(lambda x: 30 * x, params)
    exact = forward(GPT, params, IDX)
    tanh = forward(ModelConfig(**{**vars(GPT), "gelu": "tanh"}), params, IDX)
    assert 0 < float(jnp.abs(exact - tanh).max()) < 0.1


def test_model_supports_vmap_over_parameters():
    keys = jax.random.split(KEY, 4)
    many = jax.vmap(lambda key: init_params(GPT, key))(keys)
    logits = jax.vmap(lambda params: forward(GPT, params, IDX))(many)
    chex.assert_shape(logits, (4, 3, 8, 11))
    one = jax.tree.map(lambda x: x[2], many)
    np.testing.assert_allclose(logits[2], forward(GPT, one, IDX), rtol=2e-5, atol=2e-6)
