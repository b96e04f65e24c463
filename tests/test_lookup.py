"""Code for GPUs, run on the CPU: deterministic gradients of embeddings, the choice of an attention kernel, the dtype of
the residual stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels, model, sharding
from jaxgpt.config import ModelConfig
from jaxgpt.monitor import cost

V, C = 13, 5
TABLE = jax.random.normal(jax.random.key(0), (V, C))
IDS = jax.random.randint(jax.random.key(1), (4, 7), 0, V)
WEIGHTS = jax.random.normal(jax.random.key(2), (4, 7, C))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")


def weighted_sum(table):
    return (jnp.tanh(sharding.rows(table, IDS)) * WEIGHTS).sum()


@pytest.mark.parametrize("ids", [IDS, jnp.full((3,), 2), jnp.zeros((1, 1), int), jnp.arange(V)[::-1]])
def test_rows_equal_indexing(gpu, ids):
    found = jax.jit(sharding.rows)(TABLE, ids)
    np.testing.assert_array_equal(found, TABLE[ids])


@pytest.mark.parametrize(("dtype", "n_rows"), [(jnp.uint8, 256), (jnp.uint8, 300), (jnp.uint16, 2**16)])
def test_gradient_of_narrow_ids_equals_that_of_int32(gpu, dtype, n_rows):
    """The number of rows does not fit into the dtype of the ids."""
    table, ids = jnp.ones((n_rows, 1)), jnp.array([0, 3, 255, 3])

    def gradient(ids):
        return jax.grad(lambda table: (sharding.rows(table, ids) * jnp.arange(1.0, 5)[:, None]).sum())(table)

    expected = np.zeros((n_rows, 1))
    expected[[0, 3, 255], 0] = 1, 2 + 4, 3
    np.testing.assert_array_equal(gradient(ids.astype(dtype)), expected)


def test_ids_beyond_the_table_give_the_fill_value(gpu):
    ids = jnp.array([V, 1, V, V + 3])
    assert np.isnan(sharding.rows(TABLE, ids)).all(axis=1).tolist() == [True, False, True, True]
    np.testing.assert_array_equal(sharding.rows(TABLE, ids, beyond=0), TABLE[jnp.array([1])] * (ids == 1)[:, None])


def test_derivatives_match_plain_gather(monkeypatch):
    def derivatives():
        grad = jax.grad(weighted_sum)
        return {
            "gradient": grad(TABLE),
            "jvp of the gradient": jax.jvp(grad, (TABLE,), (TABLE + 1,))[1],
            "vmap": jax.vmap(lambda ids: sharding.rows(TABLE, ids))(IDS),
        }

    plain = jax.jit(lambda: derivatives())()  # not jit(derivatives), whose trace would be reused
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, jax.jit(derivatives)())


def scatter_adds(jaxpr):
    """Yield (shape of the operand, unique_indices) of each scatter-add, also of inner jaxprs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scatter-add":
            yield eqn.invars[0].aval.shape, eqn.params["unique_indices"]
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from scatter_adds(inner)


@pytest.mark.parametrize(
    ("config", "not_unique"),
    [
        # wpe is not marked, but looks up each position once.
        (ModelConfig(vocab_size=V, block_size=8, n_layer=2, n_head=2, n_embd=16), {(8, 16)}),
        (
            ModelConfig(vocab_size=V, block_size=8, n_head=2, n_embd=16, bigram_embed=True),
            {(8, 16)},
        ),
        (ModelConfig(kind="bigram", vocab_size=V, block_size=8), set()),
    ],
)
def test_scatter_adds_have_unique_indices(gpu, config, not_unique):
    params = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    grad = jax.grad(lambda params, idx: model.losses(config, params, idx[:, :-1], idx[:, 1:]).mean())
    found = list(scatter_adds(jax.make_jaxpr(grad)(params, jax.ShapeDtypeStruct((4, 9), jnp.int32)).jaxpr))
    assert {shape for shape, unique in found if not unique} == not_unique


def test_cudnn_needs_an_even_context(gpu):
    config = ModelConfig(block_size=64, n_head=2, n_embd=32, precision="bfloat16")
    assert [kernels.kernel(config, T, dropped=False) for T in (64, 17, 257)] == ["cudnn", "reference", "blocked"]


def test_startup_line_names_a_nondeterministic_kernel(gpu):
    config = ModelConfig(vocab_size=V, block_size=1024, n_head=2, n_embd=128, precision="bfloat16")
    assert "attention: cudnn; its gradients are not repeatable" in cost.describe(config)
    for other in (dict(block_size=256), dict(precision="float32"), dict(dropout=0.1), dict(block_size=1023)):
        assert "repeatable" not in cost.describe(dataclasses.replace(config, **other))
    deterministic = dataclasses.replace(config, deterministic=True)
    assert "attention: flash" in cost.describe(deterministic)
    assert "repeatable" not in cost.describe(deterministic)
    assert kernels.kernel(deterministic, 256, dropped=False) == "cudnn"
    assert "repeatable" not in cost.describe(ModelConfig(kind="bigram", vocab_size=V, precision="bfloat16"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_residual_stream_has_the_compute_dtype(gpu, precision):
    config = ModelConfig(vocab_size=V, block_size=17, n_head=2, n_embd=16, precision=precision, bias=True)

    def block_outputs(idx):
        params = model.init_params(config, jax.random.key(0))
        capture = dict(capture_intermediates=lambda module, _: isinstance(module, model.Block))
        return model.module(config).apply({"params": params}, idx, mutable=["intermediates"], **capture)[1]

    found = jax.tree.leaves(jax.eval_shape(block_outputs, jax.ShapeDtypeStruct((2, 17), jnp.int32)))
    assert [x.dtype.name for x in found] == [precision] * config.n_layer


@pytest.mark.parametrize("mesh", ["fsdp=2", "fsdp=2,tensor=2"])
def test_ids_beyond_a_sharded_table_give_nan(mesh):
    idx = jnp.array([[0, 8], [7, 9]], jnp.uint8)
    with jax.set_mesh(sharding.make_mesh(sharding.Sizes.parse(mesh))):
        found = jax.jit(sharding.lookup)(jnp.ones((8, 4)), idx)
        grad = jax.jit(jax.grad(lambda table: sharding.lookup(table, idx)[:, 0].sum()))(jnp.ones((8, 4)))
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to((idx > 7)[..., None], (2, 2, 4)))
    np.testing.assert_array_equal(grad, np.isin(np.arange(8), [0, 7])[:, None] * np.ones((8, 4)))
