"""The parts are the model: together they have its parameters, its products, and its numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import cost
from jaxgpt import model as nn
from jaxgpt.config import ModelConfig
from jaxgpt.profile.parts import parts
from jaxgpt.profile.seams import products

SMALL = ModelConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16)
B = 3
OPTIONS = [
    {},
    {"bias": True, "tie_weights": False},
    {"norm": "rms", "mlp": "swiglu", "bias": True},
    {"mlp": "relu2", "n_kv_head": 2, "n_head": 4, "value_embed": True},
    {"position": "rope", "qk_norm": True, "smear": True, "bigram_embed": True},
    {"softcap": 15.0, "window": 3, "precision": "bfloat16"},
    {"kind": "bigram"},
]


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_they_have_all_parameters_and_all_products(change):
    config = dataclasses.replace(SMALL, **change)
    found = parts(config, B)
    size = sum(part.times * math.prod(leaf.shape) for part in found for leaf in jax.tree.leaves(part.params))
    # Tables stand once, whatever their part does.
    assert size == cost.n_params(config)
    traced = [jax.make_jaxpr(part.function)(part.params, *part.inputs) for part in found]
    assert sum(part.times * products(each.jaxpr) for part, each in zip(found, traced, strict=True)) == (
        cost.flops_per_token(config) * B * config.block_size
    )


@pytest.mark.parametrize(
    "change",
    [
        {"bias": True},
        {"position": "rope", "norm": "rms", "mlp": "swiglu", "qk_norm": True, "smear": True, "bigram_embed": True},
    ],
    ids=["gpt2", "modern"],
)
def test_one_after_the_other_they_are_the_loss(change):
    """By hand, what each part does in turn is what the model does."""
    config = dataclasses.replace(SMALL, **change)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: nn.init_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: random.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    idx, targets = random.integers(13, size=(2, B, 8))
    do = {part.name: part.function for part in parts(config, B)}

    def heads(x):
        return x.reshape(B, 8, 2, 8).swapaxes(1, 2)

    def beside(layers):
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *layers)

    @jax.jit
    def by_parts(params):
        tables = {name: params[name] for name in ("wte", "wpe", "bigram", "smear") if name in params}
        tables = {name: table.get("embedding") if isinstance(table, dict) else table for name, table in tables.items()}
        x = do["embeddings"](tables, idx)
        for block in (params["h_0"], params["h_1"]):
            attn, mlp = block["attn"], block["mlp"]
            joined = beside([attn[name] for name in ("query", "key", "value")])
            three = do["queries, keys, values"](joined, do["norms"](block.get("ln_1"), x))
            q, k, v = map(heads, jnp.split(three, 3, axis=-1))
            if config.qk_norm:
                q, k = do["norm, rotation of queries, keys"]({}, q, k)
            out = do["attention"]({}, q, k, v).swapaxes(1, 2).reshape(B, 8, 16)
            x = do["residual sums"]({}, x, do["attention's projection"](attn["c_proj"], out))
            up = beside([mlp[name] for name in ("c_fc", "c_gate") if name in mlp])
            wide = do["MLP up"](up, do["norms"](block.get("ln_2"), x))
            halves = jnp.split(wide, 2, axis=-1) if "c_gate" in mlp else [wide]
            x = do["residual sums"]({}, x, do["MLP down"](mlp["c_proj"], do["MLP's non-linearity"]({}, *halves)))
        logits = do["head"]({}, do["norms"](params.get("ln_f"), x), params["wte"]["embedding"])
        return do["loss"]({}, logits, targets), nn.losses(config, params, idx, targets).mean()

    np.testing.assert_allclose(*by_parts(params), rtol=1e-5)
