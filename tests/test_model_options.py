"""Laws of the options of a block: causal, the same by every kernel, and each what its paper says."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import attention, kernels, loss, model, prng
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


def noisy(config):
    """Parameters none of which is zero."""
    shapes, rng = jax.eval_shape(partial(model.init_params, config), KEY), np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32), shapes)


forward = jax.jit(model.forward, static_argnums=0)


def changed(**options):
    return dataclasses.replace(SMALL, **options)


@pytest.mark.parametrize("options", [*OPTIONS, EVERYTHING], ids=lambda o: "+".join(o))
def test_the_past_alone_matters_and_all_of_it_that_is_in_sight(options):
    config = changed(**options)
    params = noisy(config)
    logits = np.asarray(forward(config, params, IDX))
    assert logits.dtype == np.float32
    for t in range(8):
        idx = np.array(IDX)
        idx[:, t] = (idx[:, t] + 1) % 11
        other = np.asarray(forward(config, params, idx))
        np.testing.assert_array_equal(logits[:, :t], other[:, :t])
        assert (logits[:, t] != other[:, t]).any()
        # Two blocks with windows of 3 look back 4 tokens; smear, pairs one more.
        reach = 8 if "window" not in options else t + 5 + ("smear" in options)
        assert (logits[:, t:reach] != other[:, t:reach]).any(axis=(0, 2)).all()
        np.testing.assert_array_equal(logits[:, reach:], other[:, reach:])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
def test_every_option_changes_something(options):
    config = changed(**options)
    params, plain = noisy(config), changed(tie_weights=config.tie_weights)
    if "zero_init" not in options and shapes(params) == shapes(noisy(plain)):
        assert (np.asarray(forward(plain, params, IDX)) != forward(config, params, IDX)).any()


def shapes(params):
    return jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("options", [{"tie_weights": False}, OTHERS, EVERYTHING], ids=lambda o: "+".join(o))
def test_every_parameter_learns(options):
    config = changed(**options)

    def mean_loss(params):
        return model.losses(config, params, IDX, jnp.roll(IDX, -1, axis=1)).mean()

    value, grads = jax.jit(jax.value_and_grad(mean_loss))(noisy(config))
    assert np.isfinite(value)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_zero_init_starts_as_the_uniform_guess():
    config = changed(zero_init=True, tie_weights=False)
    np.testing.assert_array_equal(forward(config, model.init_params(config, KEY), IDX), 0)


@pytest.mark.parametrize("option", ["smear", "bigram_embed"])
def test_what_starts_from_none_changes_nothing_at_the_start(option):
    config = changed(**{option: True})
    params = model.init_params(config, KEY)
    plain = {name: value for name, value in params.items() if name not in ("smear", "bigram")}
    np.testing.assert_array_equal(forward(config, params, IDX), forward(SMALL, plain, IDX))


def test_rotation_keeps_lengths_and_makes_dot_products_depend_on_distances():
    q, k = jax.random.normal(KEY, (2, 1, 1, 1, 8))

    @jax.jit
    def at(x, place):
        return attention.rotate(x, place)[0, 0, 0]

    np.testing.assert_allclose(jnp.linalg.norm(at(q, 5)), jnp.linalg.norm(q), rtol=1e-5)
    np.testing.assert_array_equal(at(q, 0), q[0, 0, 0])
    for place in (1, 7, 40):
        np.testing.assert_allclose(at(q, 9 + place) @ at(k, 4 + place), at(q, 9) @ at(k, 4), rtol=1e-3, atol=1e-4)
    assert abs(at(q, 9) @ at(k, 4) - at(q, 9) @ at(k, 5)) > 1e-3
    together = attention.rotate(jnp.tile(q, (1, 1, 3, 1)), 2)[0, 0]
    np.testing.assert_allclose(together, jnp.stack([at(q, i) for i in (2, 3, 4)]), rtol=1e-6)


def test_shared_heads_are_repeated_heads():
    config = changed(n_kv_head=2)
    params = noisy(config)
    for block in ("h_0", "h_1"):
        for name in ("key", "value"):
            kernel = params[block]["attn"][name]["kernel"].reshape(16, 2, 4)
            params[block]["attn"][name] = {"kernel": jnp.repeat(kernel, 2, axis=1).reshape(16, 16)}
    np.testing.assert_allclose(forward(SMALL, params, IDX), forward(config, noisy(config), IDX), rtol=1e-5, atol=1e-5)


def with_gradients(function, q, k, v, g):
    out, back = jax.vjp(function, q, k, v)
    return out, *back(g)


@jax.jit
def reference(mask, *given):
    return with_gradients(lambda q, k, v: attention.attention(q, k, v, mask), *given)


@partial(jax.jit, static_argnums=0)
def blocked(config, *given):
    return with_gradients(partial(kernels.causal_attention, config), *given)


@pytest.mark.smoke
@pytest.mark.parametrize(("T", "window"), [(256, 0), (256, 140), (300, 0), (300, 1), (300, 50), (300, 140), (300, 300)])
def test_blocked_attention_is_the_reference(T, window):
    config = changed(n_embd=32, block_size=T, window=window)
    given = jax.random.normal(KEY, (4, 2, 4, T, 8))
    assert kernels.kernel(config, T, dropped=False) == "blocked"
    found, expected = blocked(config, *given), reference(attention.causal_mask(T, window)[None, None], *given)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 140])
def test_blocked_attention_drops_the_weights_that_the_reference_drops(window):
    T = 300
    config = changed(n_embd=32, block_size=T, window=window, dropout=0.3)
    given = jax.random.normal(KEY, (4, 2, 4, T, 8))
    assert kernels.kernel(config, T, dropped=True) == "blocked"

    drop = prng.Drop(KEY, 0.7)

    def whole(q, k, v):
        weights = attention.attention_weights(q, k, attention.causal_mask(T, window)[None, None])
        return drop(weights, jnp.arange(T), jnp.arange(T)) @ v

    found = jax.jit(partial(with_gradients, partial(kernels.causal_attention, config, drop=drop)))(*given)
    expected = jax.jit(partial(with_gradients, whole))(*given)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def largest(jaxpr):
    """The size of the largest array in a jaxpr."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                sizes.append(largest(inner))
    return max(sizes, default=0)


def test_a_long_context_never_has_all_pairs_at_once():
    T = 4096
    config = changed(n_head=1, n_embd=8, block_size=T)
    shapes = [jax.ShapeDtypeStruct((1, 1, T, 8), "float32")] * 3

    def drop(x, rows, columns):
        return x * prng.keep_mask(KEY, 0.7, x.shape[:-2], rows, columns)

    for given in (None, drop):

        def total(q, k, v, given=given):
            return kernels.causal_attention(config, q, k, v, given).sum()

        jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*shapes).jaxpr
        assert largest(jaxpr) < T * T // 8


def test_all_logits_never_exist_at_once_where_they_are_many():
    x, kernel = jax.random.normal(KEY, (2, 12, 4)), jax.random.normal(KEY, (4, 50))
    targets = jax.random.randint(KEY, (2, 12), 0, 50)

    def whole(x, kernel):
        return token_losses(x @ kernel, targets).sum()

    def chunked(x, kernel):
        return loss.losses_of(jnp.matmul, x, kernel, targets, chunk=400).sum()

    expected, found = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, kernel) for f in (whole, chunked))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert largest(jax.make_jaxpr(jax.grad(chunked, (0, 1)))(x, kernel).jaxpr) <= 400
    assert largest(jax.make_jaxpr(whole)(x, kernel).jaxpr) == 24 * 50


@cache
def grads(config):
    return jax.jit(jax.grad(partial_loss(config)))(noisy(SMALL))


@pytest.mark.parametrize("remat", ["matmuls", "blocks"])
def test_what_is_computed_again_is_the_same(remat):
    params = noisy(SMALL)
    for a, b in zip(jax.tree.leaves(grads(changed(remat=remat))), jax.tree.leaves(grads(SMALL)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    saved = [
        sum(
            leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p, c=c: jax.vjp(partial_loss(c), p)[1], params))
        )
        for c in (SMALL, changed(remat=remat))
    ]
    assert saved[1] < saved[0]


def partial_loss(config):
    return lambda params: model.losses(config, params, IDX, IDX).mean()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_kv_head": 3}, "n_kv_head is 3, expected a divisor of n_head"),
        ({"position": "rope", "n_embd": 12}, "position rope needs an even head size"),
        ({"bigram_embed": True, "vocab_size": 50257}, "at most 4096, or --no-bigram-embed"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ConfigError, match=said):
        check(Config(model=changed(**options)))


def test_rms_norm_and_softcap():
    x = 20 * jax.random.normal(KEY, (3, 16))
    np.testing.assert_allclose(np.mean(np.square(model.rms_norm(x)), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.rms_norm(x), model.rms_norm(7 * x), rtol=1e-5)
    capped, kernel = changed(softcap=15.0), jnp.eye(16)
    assert np.abs(model.head(capped, x, kernel)).max() < 15
    np.testing.assert_allclose(model.head(capped, x / 1e3, kernel), x / 1e3, rtol=1e-4)


@pytest.mark.parametrize("option", ["smear", "bigram_embed"])
def test_what_is_added_to_the_token_embedding(option):
    """Blocks of zero_init add nothing at first: features are the norm of the embeddings."""
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
    idx = np.array([[3, 17, 14, 0]])  # a pair exceeds 255
    found = jax.jit(model.features, static_argnums=0)(config, params | {name: fresh}, idx.astype(np.uint8))
    token = np.asarray(params["wte"]["embedding"])[idx]
    added = fresh * token[:, :-1] if option == "smear" else fresh["embedding"][idx[:, :-1] * 20 + idx[:, 1:]]
    added = np.pad(added, [(0, 0), (1, 0), (0, 0)])  # the first token has none before it
    np.testing.assert_allclose(found, model.rms_norm(token + added), rtol=1e-5, atol=1e-6)
