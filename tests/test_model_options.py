"""Options of a block: each is causal, is the same with every attention kernel, and does what its paper says."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import attention, kernels, loss, model, prng, sharding
from jaxgpt.config import Config, ConfigError, ModelConfig, check
from jaxgpt.loss import token_losses

SMALL = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=16)
KEY = jax.random.key(0)
IDX = jax.random.randint(jax.random.key(1), (3, 8), 0, 11)
OPTIONS = [
    {"position": "rope"},
    {"norm": "rms"},
    {"mlp": "relu2"},
    {"mlp": "swiglu"},
    {"qk_norm": True},
    {"n_kv_head": 2},
    {"window": 3},
    {"softcap": 5.0},
    {"smear": True},
    {"bigram_embed": True},
    {"precision": "bfloat16"},
    {"zero_init": True, "tie_weights": False},
]
EVERYTHING = {name: value for option in OPTIONS for name, value in option.items()} | {"mlp": "relu2"}
OTHERS = {"mlp": "swiglu", "bias": True, "smear": True, "bigram_embed": True}


def random_params(config):
    """Non-zero parameters. Those with the same path and shape are equal, whatever the config."""

    def random(path, x):
        rng = np.random.default_rng(list(jax.tree_util.keystr(path).encode()))
        return (0.3 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, jax.eval_shape(partial(model.init_params, config), KEY))


forward = jax.jit(model.forward, static_argnums=0)


def changed(**options):
    return dataclasses.replace(SMALL, **options)


@pytest.mark.parametrize("options", [*OPTIONS, EVERYTHING], ids=lambda o: "+".join(o))
def test_logits_depend_on_all_visible_past_tokens_and_no_others(options):
    config = changed(**options)
    params = random_params(config)
    logits = np.asarray(forward(config, params, IDX))
    assert logits.dtype == np.float32
    for t in range(8):
        idx = np.array(IDX)
        idx[:, t] = (idx[:, t] + 1) % 11
        other = np.asarray(forward(config, params, idx))
        np.testing.assert_array_equal(logits[:, :t], other[:, :t])
        assert (logits[:, t] != other[:, t]).any()
        # Two blocks with windows of 3 look back 4 tokens, and smear and bigram_embed one more.
        reach = 8 if "window" not in options else t + 5 + ("smear" in options)
        assert (logits[:, t:reach] != other[:, t:reach]).any(axis=(0, 2)).all()
        np.testing.assert_array_equal(logits[:, reach:], other[:, reach:])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
def test_every_option_changes_the_logits(options):
    config = changed(**options)
    plain = changed(tie_weights=config.tie_weights)
    logits, others = (forward(each, random_params(each), IDX) for each in (config, plain))
    assert (np.asarray(logits) != others).any() == ("zero_init" not in options), "zero_init changes no other parameters"


@pytest.mark.parametrize("options", [{"tie_weights": False}, OTHERS, EVERYTHING], ids=lambda o: "+".join(o))
def test_every_parameter_has_a_gradient(options):
    config = changed(**options)

    def mean_loss(params):
        return model.losses(config, params, IDX, jnp.roll(IDX, -1, axis=1)).mean()

    value, grads = jax.jit(jax.value_and_grad(mean_loss))(random_params(config))
    assert np.isfinite(value)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_zero_init_starts_with_uniform_logits():
    config = changed(zero_init=True, tie_weights=False)
    np.testing.assert_array_equal(forward(config, model.init_params(config, KEY), IDX), 0)


@pytest.mark.parametrize("option", ["smear", "bigram_embed"])
def test_smear_and_bigram_embed_start_without_effect(option):
    config = changed(**{option: True})
    params = model.init_params(config, KEY)
    plain = {name: value for name, value in params.items() if name not in ("smear", "bigram")}
    np.testing.assert_array_equal(forward(config, params, IDX), forward(SMALL, plain, IDX))


def test_rope_keeps_norms_and_depends_on_distance():
    q, k = jax.random.normal(KEY, (2, 1, 1, 1, 8))

    @jax.jit
    def at(x, position):
        return attention.rotate(x, position)[0, 0, 0]

    np.testing.assert_allclose(jnp.linalg.norm(at(q, 5)), jnp.linalg.norm(q), rtol=1e-5)
    np.testing.assert_array_equal(at(q, 0), q[0, 0, 0])
    for position in (1, 7, 40):
        np.testing.assert_allclose(at(q, 9 + position) @ at(k, 4 + position), at(q, 9) @ at(k, 4), rtol=1e-3, atol=1e-4)
    assert abs(at(q, 9) @ at(k, 4) - at(q, 9) @ at(k, 5)) > 1e-3
    rotated = attention.rotate(jnp.tile(q, (1, 1, 3, 1)), 2)[0, 0]
    np.testing.assert_allclose(rotated, jnp.stack([at(q, i) for i in (2, 3, 4)]), rtol=1e-6)


def test_kv_heads_are_repeated():
    config = changed(n_kv_head=2)
    params = random_params(config)
    for block in ("h_0", "h_1"):
        for name in ("key", "value"):
            kernel = params[block]["attn"][name]["kernel"].reshape(16, 2, 4)
            params[block]["attn"][name] = {"kernel": jnp.repeat(kernel, 2, axis=1).reshape(16, 16)}
    np.testing.assert_allclose(
        forward(SMALL, params, IDX), forward(config, random_params(config), IDX), rtol=1e-5, atol=1e-5
    )


def with_gradients(function, q, k, v, g):
    out, back = jax.vjp(function, q, k, v)
    return out, *back(g)


@jax.jit
def reference(mask, *inputs):
    return with_gradients(lambda q, k, v: attention.attention(q, k, v, mask), *inputs)


@partial(jax.jit, static_argnums=0)
def blocked(config, *inputs):
    return with_gradients(partial(kernels.causal_attention, config), *inputs)


@pytest.mark.smoke
@pytest.mark.parametrize(("T", "window"), [(256, 0), (256, 140), (300, 0), (300, 1), (300, 50), (300, 140), (300, 300)])
def test_blocked_attention_matches_reference(T, window):
    config = changed(n_embd=32, block_size=T, window=window)
    inputs = jax.random.normal(KEY, (4, 2, 4, T, 8))
    assert kernels.kernel(config, T, dropped=False) == "blocked"
    found, expected = blocked(config, *inputs), reference(attention.causal_mask(T, window)[None, None], *inputs)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 140])
def test_blocked_attention_drops_the_same_weights_as_reference(window):
    T = 300
    config = changed(n_embd=32, block_size=T, window=window, dropout=0.3)
    inputs = jax.random.normal(KEY, (4, 2, 4, T, 8))
    assert kernels.kernel(config, T, dropped=True) == "blocked"

    drop = prng.Drop(KEY, 0.7)

    def dense(q, k, v):
        weights = attention.attention_weights(q, k, attention.causal_mask(T, window)[None, None])
        return drop(weights, jnp.arange(T), jnp.arange(T)) @ v

    found = jax.jit(partial(with_gradients, partial(kernels.causal_attention, config, drop=drop)))(*inputs)
    expected = jax.jit(partial(with_gradients, dense))(*inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def largest_array(jaxpr):
    """The size of the largest array in a jaxpr."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes, default=0)


def test_long_contexts_never_store_all_scores():
    T = 4096
    config = changed(n_head=1, n_embd=8, block_size=T)
    shapes = [jax.ShapeDtypeStruct((1, 1, T, 8), "float32")] * 3

    def drop(x, rows, columns):
        return x * prng.keep_mask(KEY, 0.7, x.shape[:-2], rows, columns)

    for drop_weights in (None, drop):

        def total(q, k, v, drop_weights=drop_weights):
            return kernels.causal_attention(config, q, k, v, drop_weights).sum()

        jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*shapes).jaxpr
        assert largest_array(jaxpr) < T * T // 8


@pytest.mark.parametrize("shards", [1, 2])
def test_backward_pass_of_long_contexts_recomputes_the_scores(shards):
    """What it saves grows with T, not with T * T."""
    T, config = 1024, changed(n_head=1, n_embd=8, block_size=1024)

    def saved(*inputs):
        return jax.vjp(partial(kernels.causal_attention, config), *inputs)[1]

    with jax.set_mesh(sharding.make_mesh(sharding.Sizes(context=shards))):
        sizes = [x.size for x in jax.tree.leaves(jax.eval_shape(saved, *[jnp.zeros((1, 1, T, 8))] * 3))]
    assert 3 * 8 * T <= sum(sizes) < T * T / 4


@pytest.mark.parametrize(("T", "shards"), [(4, 1), (256, 1), (256, 2)])
def test_attention_multiplies_in_the_precision_of_the_config(T, shards):
    """In one go, in blocks, and over a sharded context."""
    q, k, v = jax.random.normal(KEY, (3, 1, 4, T, 8))
    with jax.set_mesh(sharding.make_mesh(sharding.Sizes(context=shards))):
        exact, low = (
            jax.jit(partial(kernels.causal_attention, changed(n_embd=32, precision=precision)))(q, k, v)
            for precision in ("float32", "bfloat16")
        )
    np.testing.assert_allclose(low, exact, atol=0.03)
    assert (low != exact).mean() > 0.5


def test_chunked_loss_never_stores_all_logits():
    x, kernel = jax.random.normal(KEY, (2, 12, 4)), jax.random.normal(KEY, (4, 50))
    targets = jax.random.randint(KEY, (2, 12), 0, 50)

    def plain(x, kernel):
        return token_losses(x @ kernel, targets).sum()

    def chunked(x, kernel):
        return loss.losses_of(jnp.matmul, x, kernel, targets, chunk=400).sum()

    expected, found = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, kernel) for f in (plain, chunked))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert largest_array(jax.make_jaxpr(jax.grad(chunked, (0, 1)))(x, kernel).jaxpr) <= 400
    assert largest_array(jax.make_jaxpr(plain)(x, kernel).jaxpr) == 24 * 50


@cache
def grads(config):
    return jax.jit(jax.grad(mean_loss_of(config)))(random_params(SMALL))


@pytest.mark.parametrize("remat", ["matmuls", "blocks"])
def test_remat_keeps_gradients_and_saves_memory(remat):
    params = random_params(SMALL)
    for a, b in zip(jax.tree.leaves(grads(changed(remat=remat))), jax.tree.leaves(grads(SMALL)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    saved = [
        sum(
            leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p, c=c: jax.vjp(mean_loss_of(c), p)[1], params))
        )
        for c in (SMALL, changed(remat=remat))
    ]
    assert saved[1] < saved[0]


def mean_loss_of(config):
    return lambda params: model.losses(config, params, IDX, IDX).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head is 3, expected a divisor of n_head"),
        ({"position": "rope", "n_embd": 12}, "position rope needs an even head size"),
        ({"bigram_embed": True, "vocab_size": 50257}, "at most 4096, or --no-bigram-embed"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        check(Config(model=changed(**options)))


def test_rms_norm_and_softcap():
    x = 20 * jax.random.normal(KEY, (3, 16))
    np.testing.assert_allclose(np.mean(np.square(model.rms_norm(x)), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.rms_norm(x), model.rms_norm(7 * x), rtol=1e-5)
    capped, kernel = changed(softcap=15.0), jnp.eye(16)
    assert np.abs(model.head(capped, x, kernel)).max() < 15
    np.testing.assert_allclose(model.head(capped, x / 1e3, kernel), x / 1e3, rtol=1e-4)


@pytest.mark.parametrize("option", ["smear", "bigram_embed"])
def test_smear_and_bigram_embed_add_to_the_token_embedding(option):
    """With zero_init, new blocks add nothing, so the features are the norm of the embeddings."""
    config = ModelConfig(
        vocab_size=20,
        block_size=4,
        n_layer=1,
        n_head=1,
        n_embd=8,
        norm="rms",
        position="rope",
        zero_init=True,
        **{option: True},
    )
    params = model.init_params(config, jax.random.key(0))
    name = "smear" if option == "smear" else "bigram"
    fresh = jax.tree.map(lambda x: np.random.default_rng(1).standard_normal(x.shape, np.float32), params[name])
    idx = np.array([[3, 17, 14, 0]])  # the index of a pair exceeds uint8
    found = jax.jit(model.features, static_argnums=0)(config, params | {name: fresh}, idx.astype(np.uint8))
    token = np.asarray(params["wte"]["embedding"])[idx]
    added = fresh * token[:, :-1] if option == "smear" else fresh["embedding"][idx[:, :-1] * 20 + idx[:, 1:]]
    added = np.pad(added, [(0, 0), (1, 0), (0, 0)])  # no token precedes the first one
    np.testing.assert_allclose(found, model.rms_norm(token + added), rtol=1e-5, atol=1e-6)
