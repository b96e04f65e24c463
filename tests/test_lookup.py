"""Rows of tables: as on a GPU, where equal ids add up their gradients in one order, so that runs repeat to the bit."""

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


def weighed(table):
    return (jnp.tanh(sharding.rows(table, IDS)) * WEIGHTS).sum()


@pytest.mark.parametrize("ids", [IDS, jnp.full((3,), 2), jnp.zeros((1, 1), int), jnp.arange(V)[::-1]])
def test_the_rows_are_those_of_the_table(gpu, ids):
    found = jax.jit(sharding.rows)(TABLE, ids)
    np.testing.assert_array_equal(found, TABLE[ids])


def test_ids_beyond_the_table_are_filled(gpu):
    ids = jnp.array([V, 1, V, V + 3])
    assert np.isnan(sharding.rows(TABLE, ids)).all(axis=1).tolist() == [True, False, True, True]
    np.testing.assert_array_equal(sharding.rows(TABLE, ids, beyond=0), TABLE[jnp.array([1])] * (ids == 1)[:, None])


def test_all_derivatives_are_those_of_a_plain_gather(monkeypatch):
    def found():
        grad = jax.grad(weighed)
        return {
            "backwards": grad(TABLE),
            "forwards of backwards": jax.jvp(grad, (TABLE,), (TABLE + 1,))[1],
            "for each row": jax.vmap(lambda ids: sharding.rows(TABLE, ids))(IDS),
        }

    plain = jax.jit(lambda: found())()
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, jax.jit(found)())


def added_up(jaxpr):
    """(the shape written to, whether each place is written to once) of each scatter-add, also of inner functions."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scatter-add":
            yield eqn.invars[0].aval.shape, eqn.params["unique_indices"]
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from added_up(inner)


@pytest.mark.parametrize(
    ("config", "once"),
    [
        # Each position is looked up once.
        (ModelConfig(vocab_size=V, block_size=8, n_layer=2, n_head=2, n_embd=16), {(8, 16)}),
        (
            ModelConfig(vocab_size=V, block_size=8, n_head=2, n_embd=16, bigram_embed=True),
            {(8, 16)},
        ),
        (ModelConfig(kind="bigram", vocab_size=V, block_size=8), set()),
    ],
)
def test_no_two_rows_are_added_to_one_place_at_a_time(gpu, config, once):
    params = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    grad = jax.grad(lambda params, idx: model.losses(config, params, idx[:, :-1], idx[:, 1:]).mean())
    found = list(added_up(jax.make_jaxpr(grad)(params, jax.ShapeDtypeStruct((4, 9), jnp.int32)).jaxpr))
    assert {shape for shape, unique in found if not unique} == once


def test_cudnn_attends_to_even_contexts_alone(gpu):
    config = ModelConfig(block_size=64, n_head=2, n_embd=32, precision="bfloat16")
    assert [kernels.kernel(config, T, dropped=False) for T in (64, 17, 257)] == ["cudnn", "reference", "blocked"]


def test_a_kernel_that_is_not_repeatable_is_named_at_the_start(gpu):
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
def test_the_residual_stream_is_as_wide_as_matmuls(gpu, precision):
    config = ModelConfig(vocab_size=V, block_size=17, n_head=2, n_embd=16, precision=precision, bias=True)

    def streams(idx):
        params = model.init_params(config, jax.random.key(0))
        of_blocks = dict(capture_intermediates=lambda module, _: isinstance(module, model.Block))
        return model.module(config).apply({"params": params}, idx, mutable=["intermediates"], **of_blocks)[1]

    found = jax.tree.leaves(jax.eval_shape(streams, jax.ShapeDtypeStruct((2, 17), jnp.int32)))
    assert [x.dtype.name for x in found] == [precision] * config.n_layer
