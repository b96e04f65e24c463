import dataclasses
import itertools

import jax
import pytest

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.monitor import cost
from jaxgpt.monitor.chips import CHIPS, flops_per_token

SMALL = ModelConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize("kind", ["gpt", "bigram"])
def test_n_params_counts_the_parameters_of_init_params(kind):
    shapes = (1, 8, 1, 5), (2, 8, 17, 301), (1, 48, 17, 5), (3, 48, 1, 301)
    for (L, C, T, V), bias, tie in itertools.product(shapes, (False, True), (False, True)):
        config = ModelConfig(
            kind=kind, n_layer=L, n_head=2, n_embd=C, block_size=T, vocab_size=V, bias=bias, tie_weights=tie
        )
        params = jax.eval_shape(lambda key, config=config: model.init_params(config, key), jax.random.key(0))
        assert cost.n_params(config) == sum(leaf.size for leaf in jax.tree.leaves(params)), config


OPTIONS = [
    {"norm": "rms"},
    {"norm": "rms", "bias": True},
    {"mlp": "swiglu", "bias": True},
    {"mlp": "relu2", "n_kv_head": 1, "bias": True},
    {"n_kv_head": 2, "n_head": 4},
    {"position": "rope", "qk_norm": True, "smear": True, "bigram_embed": True},
    {"zero_init": True, "softcap": 15.0, "window": 3, "tie_weights": False},
]


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_n_params_counts_every_option(change):
    config = dataclasses.replace(SMALL, **change)
    params = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    assert cost.n_params(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


def matmul_flops(jaxpr):
    """FLOPs of all dot_generals of a jaxpr: two for each term of each sum."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = eqn.outvars[0].aval.size
            for axis in contracted:
                terms *= eqn.invars[0].aval.shape[axis]
            total += 2 * terms
        inner = (getattr(value, "jaxpr", value) for value in eqn.params.values())  # a ClosedJaxpr, or remat's Jaxpr
        total += sum(matmul_flops(each) for each in inner if hasattr(each, "eqns"))
    return total


@pytest.mark.parametrize(
    "change", [{}, {"n_layer": 3, "bias": True}, {"tie_weights": False}, {"kind": "bigram"}, *OPTIONS]
)
def test_flops_equal_those_of_the_matmuls_in_the_traced_forward_pass(change):
    config, B = dataclasses.replace(SMALL, **change), 3
    params = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    idx = jax.ShapeDtypeStruct((B, config.block_size), "int32")
    traced = jax.make_jaxpr(lambda params, idx: model.forward(config, params, idx))(params, idx)
    assert flops_per_token(config) * B * config.block_size == matmul_flops(traced.jaxpr)


@pytest.mark.parametrize("T", [256, 512, 4096])
def test_flops_with_a_window_are_those_of_blocked_attention(T):
    """Each block of 128 queries, or of a sixteenth of the context, attends to its keys and to the window before it."""
    config = dataclasses.replace(SMALL, block_size=T, window=48)
    params = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    traced = jax.make_jaxpr(lambda params, idx: model.forward(config, params, idx))(
        params, jax.ShapeDtypeStruct((1, T), "int32")
    )
    assert flops_per_token(config) * T == pytest.approx(matmul_flops(traced.jaxpr), rel=0.1)


def test_training_takes_three_times_the_matmuls_of_the_forward_pass():
    params = jax.eval_shape(lambda key: model.init_params(SMALL, key), jax.random.key(0))
    idx = jax.ShapeDtypeStruct((3, SMALL.block_size), "int32")
    backward = jax.make_jaxpr(jax.grad(lambda params, idx: model.forward(SMALL, params, idx).sum()))(params, idx)
    assert 3 * flops_per_token(SMALL) * 3 * SMALL.block_size == matmul_flops(backward.jaxpr)


def test_a_collective_among_few_chips_uses_the_links_of_few_dimensions():
    """256 chips are a square with sides of 16, 64 chips a cube with sides of 4; a switch connects all GPUs."""
    expected = {("v5e", 256): {1: 1, 16: 1 / 2, 32: 1, 256: 1}, ("v5p", 64): {4: 1 / 3, 16: 2 / 3, 64: 1}}
    for (name, chips), shares in (expected | {("h100", 8): {2: 1, 8: 1}}).items():
        chip = CHIPS[name]
        assert {n: chip.sending_rate(n, chips) / chip.link_rate for n in shares} == pytest.approx(shares)
