import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxgpt import cost, model
from jaxgpt.config import Config, ModelConfig, TrainConfig
from jaxgpt.profile import hlo, inspection
from jaxgpt.profile.programs import matmul_flops, programs, xla_counts

PLAIN = Config(
    model=ModelConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=128),
    train=TrainConfig(steps=200, batch_size=8),
)
"""Wide for its context, so that matmuls are most of its work."""


def of(**model):
    return dataclasses.replace(PLAIN, model=dataclasses.replace(PLAIN.model, **model))


@pytest.fixture(scope="module")
def found():
    jax.config.update("jax_disable_most_optimizations", True)
    return programs(PLAIN)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_table_of_parameters_is_the_tree(stacked):
    config = of(n_layer=3, bias=True, tie_weights=False, scan_layers=stacked).model
    *rows, whole = inspection.parameter_rows(config)
    params = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    assert whole["count"] == cost.n_params(config) == sum(x.size for x in jax.tree.leaves(params))
    assert sum(row["count"] for row in rows) == whole["count"]
    assert sum(row["share, %"] for row in rows) == pytest.approx(100)
    names = {row["module"]: row for row in rows}
    up = names["h_*/mlp/c_fc/kernel"]
    assert (up["shape"], up["blocks"], up["count"]) == ("128 x 512", 3, 3 * 128 * 512)
    assert names["lm_head/kernel"]["blocks"] is None


def test_the_jaxpr_has_the_matmuls_of_the_formula(found):
    for name, program in found.items():
        passes = 3 if name in ("gradient", "step") else 1
        assert program.matmul_flops == program.formula_flops == passes * found["forward"].formula_flops


def test_the_optimised_program_has_the_same_matmuls(found):
    """Whatever computes them: none is lost, none is done twice."""
    matmuls = hlo.matmuls(found["step"].text)
    assert sum(each.flops for each in matmuls) == found["step"].formula_flops
    assert all(each.kernel != "?" for each in matmuls)
    whole = [row for row in inspection.matmul_rows(found["step"].text) if row["operands"] == "in all"]
    assert sum(row["share, %"] for row in whole) == pytest.approx(100)


def test_xla_counts_the_matmuls_and_some_percent_more(found):
    for name in ("forward", "gradient", "step"):
        assert 1 < xla_counts(found[name].lowered)["flops"] / found[name].formula_flops < 1.1, name
    assert 1 < xla_counts(found["step"].compiled)["flops"] / found["step"].formula_flops < 1.1


def test_bytes_are_those_of_the_arrays(found):
    B, T, V, n = 8, 16, 64, cost.n_params(PLAIN.model)
    assert found["forward"].bytes == 4 * (n + B * T + B * T * V)
    assert found["loss"].bytes == 4 * (n + 2 * B * T + 1)
    assert found["gradient"].bytes == 4 * (n + 2 * B * T + 1 + n)
    counts = inspection.byte_counts(found["step"])
    assert counts["XLA"] > counts["XLA, optimised"] > counts["compulsory"]
    memory = {row["program"]: row for row in inspection.memory_rows(found)}
    state = 4 * 3 * n
    assert memory["step"]["arguments, MB"] == pytest.approx((state + 4 * 2 * B * T) / 1e6, rel=1e-3)
    assert memory["step"]["donated, MB"] == pytest.approx(-state / 1e6, rel=1e-3), "the state is donated"


def test_matmuls_that_are_computed_again_are_traced(change):
    config = change(of(remat="blocks", n_layer=2, scan_layers=True, n_embd=16), algorithm="muon")
    found = programs(config)
    assert found["gradient"].matmul_flops > found["gradient"].formula_flops, "remat"
    assert found["step"].matmul_flops > found["gradient"].matmul_flops, "Muon"


def test_matmuls_of_loops_and_branches():
    x = jnp.ones((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert matmul_flops(jax.make_jaxpr(scanned)(x).jaxpr) == 5 * 2 * 4**3
    assert matmul_flops(jax.make_jaxpr(either)(x).jaxpr) == 2 * 2 * 4**3
    text = jax.jit(scanned).lower(x).compile().as_text()
    assert sum(matmul.flops for matmul in hlo.matmuls(text)) == 5 * 2 * 4**3
