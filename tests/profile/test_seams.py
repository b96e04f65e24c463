import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxgpt import cost
from jaxgpt import model as nn
from jaxgpt.config import Config, ModelConfig, TrainConfig
from jaxgpt.profile import parameters, programs, tables
from jaxgpt.profile.seams import products, seams, xla

PLAIN = Config(
    model=ModelConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=128),
    train=TrainConfig(steps=200, batch_size=8),
)
"""Wide for its context, so that products are most of its work."""


def of(**model):
    return dataclasses.replace(PLAIN, model=dataclasses.replace(PLAIN.model, **model))


@pytest.fixture(scope="module")
def at():
    jax.config.update("jax_disable_most_optimizations", True)
    return seams(PLAIN)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_table_of_parameters_is_the_tree(stacked):
    config = of(n_layer=3, bias=True, tie_weights=False, scan_layers=stacked)
    rows = parameters.rows(config.model)
    params = jax.eval_shape(lambda key: nn.init_params(config.model, key), jax.random.key(0))
    assert sum(row.size for row in rows) == cost.n_params(config.model) == sum(x.size for x in jax.tree.leaves(params))
    names = {row.module: row for row in rows}
    assert names["h_*/mlp/c_fc/kernel"][1:] == ((128, 512), 3, 3 * 128 * 512)
    assert names["lm_head/kernel"].times == 1
    *shares, whole = tables.parameter_rows(config)
    assert sum(row["count"] for row in shares) == whole["count"]
    assert sum(row["share, %"] for row in shares) == pytest.approx(100)


def test_what_is_traced_is_what_is_on_paper(at):
    for name, seam in at.items():
        assert seam.products == seam.paper == (3 if name in ("gradient", "step") else 1) * at["forward"].paper


def test_the_optimised_program_has_the_same_products(at):
    """Whatever computes them: none is lost, none is done twice."""
    found = programs.products(at["step"].text)
    assert sum(product.flops for product in found) == at["step"].paper
    assert all(product.kernel != "?" for product in found)
    rows = tables.product_rows(at["step"])
    whole = [row for row in rows if row["operands"] == "in all"]
    assert sum(row["share, %"] for row in whole) == pytest.approx(100)


def test_xla_counts_the_products_and_some_percent_more(at):
    """Where products dominate: within a tenth, and never fewer."""
    for name in ("forward", "gradient", "step"):
        found = xla(at[name].lowered)
        assert 1 < found["flops"] / at[name].paper < 1.1, name
    assert 1 < xla(at["step"].compiled)["flops"] / at["step"].paper < 1.1


def test_bytes_are_those_of_the_arrays(at):
    B, T, V, n = 8, 16, 64, cost.n_params(PLAIN.model)
    assert at["forward"].moved == 4 * (n + B * T + B * T * V)
    assert at["loss"].moved == 4 * (n + 2 * B * T + 1)
    assert at["gradient"].moved == 4 * (n + 2 * B * T + 1 + n)
    rows = {row["program"]: row for row in tables.byte_rows(at)}
    assert rows["forward"]["moved at least"] == at["forward"].moved / 1e6
    assert rows["step"]["XLA, nothing fused"] > rows["step"]["XLA, optimised"] > rows["step"]["moved at least"]
    rows = {row["program"]: row for row in tables.operation_rows(at)}
    backward = rows["backward (gradient - loss)"]
    assert backward["products on paper"] == pytest.approx(2 * at["forward"].paper / 1e6)
    memory = {row["program"]: row for row in tables.program_rows(at)}
    state = 4 * 3 * n
    assert memory["step"]["arguments, MB"] == pytest.approx((state + 4 * 2 * B * T) / 1e6, rel=1e-3)
    assert memory["step"]["overwritten, MB"] == pytest.approx(-state / 1e6, rel=1e-3), "the state is donated"


@pytest.mark.optimized
def test_what_differs_is_explained(change):
    """Each sentence stands where it holds, and only there."""

    def said(config):
        at = {name: seam for name, seam in seams(config).items()}
        return " ".join(tables.differences(config, at)), at

    plain, _ = said(PLAIN)
    assert "to the last operation" in plain
    assert "remat" not in plain
    assert "loop" not in plain
    config = change(of(remat="blocks", n_layer=2, scan_layers=True, n_embd=16), algorithm="muon")
    text, at = said(config)
    assert at["gradient"].products > at["gradient"].paper
    assert "remat blocks computes forward products again" in text
    assert "XLA counts the body of a loop" in text
    assert "Muon" in text
    assert at["step"].products > at["gradient"].products


def test_products_of_loops_and_branches():
    x = jnp.ones((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert products(jax.make_jaxpr(scanned)(x).jaxpr) == 5 * 2 * 4**3
    assert products(jax.make_jaxpr(either)(x).jaxpr) == 2 * 2 * 4**3
    text = jax.jit(scanned).lower(x).compile().as_text()
    assert sum(product.flops for product in programs.products(text)) == 5 * 2 * 4**3


HLO = """
%fused (p0: bf16[8,4], p1: bf16[4,2]) -> f32[8,2] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = bf16[4,2]{1,0} parameter(1)
  ROOT %d = f32[8,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%sum (p3: f32[], p4: f32[]) -> f32[] {
  %p3 = f32[] parameter(0)
  %p4 = f32[] parameter(1)
  ROOT %s = f32[] add(%p3, %p4)
}

%loop (p2: f32[8,2]) -> f32[8,2] {
  %p2 = f32[8,2]{1,0} parameter(0)
  %m = f32[8,2]{1,0} multiply(%p2, %p2)
  ROOT %a = f32[8,2]{1,0} add(%m, %p2)
}

ENTRY %main (a: bf16[8,4], b: bf16[4,2]) -> f32[8,2] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,2]{1,0} parameter(1)
  %y = f32[8,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused, backend_config={"fusion_config":{"kind":"KIND"}}
  %c = (f32[8,2]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="TARGET", backend_config={DIMS}
  %l = f32[8,2]{1,0} fusion(%y), kind=kLoop, calls=%loop, metadata={op_name="jit(step)/jvp(GPT)/h_1/mlp/mul"}
  %z = f32[] constant(0)
  %t = f32[8]{0} reduce(%l, %z), dimensions={1}, to_apply=%sum
  ROOT %r = f32[8,2]{1,0} add(%l, %y)
}
"""


@pytest.mark.parametrize(
    ("kind", "target", "names"),
    [
        ("__ynn_fusion", "__onednn$matmul", ("YNNPACK", "oneDNN")),
        ("__triton_gemm", "__cublas$gemm", ("Triton", "cuBLAS")),
        ("__xnn_fusion", "__cudnn$fmhaSoftmax", ("XNNPACK", "cuDNN")),
        ("__other", "mine", ("__other", "mine")),
    ],
)
def test_kernels_are_known_by_their_marks(kind, target, names):
    dims = '"lhs_contracting_dimensions":["1"]' if "cublas" in target else ""
    text = HLO.replace("KIND", kind).replace("TARGET", target).replace("DIMS", dims)
    found = programs.instructions(text)
    assert (found["y"].kernel, found["c"].kernel) == names
    assert found["l"].kernel == "XLA fusion (kLoop)"
    assert found["l"].inside == ("multiply", "add")
    assert found["l"].origin == "jvp(GPT)/h_*/mlp/mul"
    assert found["l"].bytes == 4 * 8 * 2
    assert "m" not in found, "it is inside a fusion"
    assert "s" not in found, "it is what a reduction does to each pair"
    assert found["t"].kernel == "XLA reduce"
    assert [each.name for each in programs.fusions(found)] == ["l", "y"]
    done = {product.kernel: product for product in programs.products(text)}
    assert done[names[0]].flops == 2 * 8 * 4 * 2
    assert done[names[0]].shapes == "bf16[8,4] x bf16[4,2]"
    counted = target in ("__cublas$gemm", "__onednn$matmul")
    assert (names[1] in done) == counted
    assert not counted or done[names[1]].flops == 2 * 8 * 4 * 2
