import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgpt.profile import hlo


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def compiled(function, mesh, spec, *shapes):
    sharding = NamedSharding(mesh, spec)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*arrays).compile().as_text()


def test_a_sum_over_devices_is_one_all_reduce_of_its_bytes(mesh):
    text = compiled(lambda x: x.sum(axis=0), mesh, PartitionSpec("x"), (16, 100))
    assert hlo.collectives(text) == {("all-reduce", 8): (1, 400)}


def test_collectives_in_a_loop_count_every_iteration(mesh):
    def function(x):
        def body(total, _):
            return total + jnp.tanh(x * total.mean()).sum(axis=0), None

        return jax.lax.scan(body, jnp.ones(100), None, length=7)[0]

    assert hlo.collectives(compiled(function, mesh, PartitionSpec("x"), (16, 100))) == {("all-reduce", 8): (7, 7 * 400)}


@pytest.mark.parametrize("groups", ["[1,8]<=[8]", "{{0,1,2,3,4,5,6,7}}", "mesh['a'=4,'b'=2,'c'=3] {'a','b'}"])
def test_a_reduce_scatter_counts_the_bytes_of_its_argument(groups):
    text = f"""
ENTRY %main.1 (p: f32[64]) -> f32[8] {{
  %p = f32[64]{{0}} parameter(0)
  ROOT %rs = f32[8]{{0}} reduce-scatter(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}, to_apply=%add
}}
"""
    assert hlo.collectives(text) == {("reduce-scatter", 8): (1, 256)}


def test_program_on_one_device_has_no_collectives():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()
    assert hlo.collectives(text) == {}


def test_collectives_of_tpu_programs_are_counted():
    """A loop without a trip count, a fused reduce-scatter, an all-gather in two fusions, and groups of one device."""
    text = """
%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.7 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %slice = f32[16,8]{1,0} dynamic-slice(%all-reduce.7, %i, %i)
}

%start (p: bf16[16,8]) -> bf16[64,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%next (p: bf16[16,8]) -> bf16[64,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%body (p: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %a = bf16[64,8]{1,0} fusion(%w), kind=kCustom, calls=%start
  %b = bf16[64,8]{1,0} fusion(%w), kind=kCustom, calls=%next
  %c = f32[16,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %d = (f32[2]{0}, f32[3]{0}) all-reduce(%x, %y), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}
  %e = f32[9]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  %m = bf16[64,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%cond (p.2: (s32[], f32[64,8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(12)
  %n = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %constant.9), direction=LT
}

ENTRY %main (p: f32[64]) -> f32[8] {
  %while.1 = (s32[], f32[64,8]) while(%t), condition=%cond, body=%body
}
"""
    assert hlo.collectives(text) == {
        ("all-gather", 4): (12, 12 * 1024),
        ("all-reduce", 2): (12, 12 * 20),
        ("reduce-scatter", 4): (12, 12 * 2048),
    }
    assert [(each.shapes, each.runs) for each in hlo.matmuls(text)] == [("bf16[64,8] x bf16[64,8]", 12)]


def test_several_arrays_of_one_asynchronous_collective_all_count():
    text = """
ENTRY %main (x: f32[8,4], y: f32[16]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %r = ((f32[8,4]{1,0}, f32[16]{0}), (f32[2,4]{1,0}, f32[4]{0})) reduce-scatter-start(%x, %y), replica_groups=[1,4]<=[4]
  %g = ((f32[8,4]{1,0}, f32[16]{0}), (f32[32,4]{1,0}, f32[64]{0})) all-gather-start(%x, %y), replica_groups=[1,4]<=[4]
  %p = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  ROOT %a = f32[4]{0} reduce-scatter(%y), replica_groups=[1,4]<=[4]
}
"""
    assert hlo.collectives(text) == {
        ("all-gather", 4): (1, 4 * (128 + 64)),
        ("collective-permute", 2): (1, 4 * 16),
        ("reduce-scatter", 4): (2, 4 * (32 + 16) + 4 * 16),
    }


def test_matmuls_of_tpu_programs_are_convolutions():
    text = """
%fused (p0: bf16[8,4], p1: bf16[4,2]) -> f32[8,2] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = bf16[4,2]{1,0} parameter(1)
  %t = bf16[4,8]{1,0} transpose(%p0), dimensions={1,0}
  ROOT %c = f32[8,2]{1,0} convolution(%t, %p1), dim_labels=fb_io->bf
}

ENTRY %main (x: bf16[8,4], y: bf16[4,2]) -> f32[8,2] {
  %x = bf16[8,4]{1,0} parameter(0)
  %y = bf16[4,2]{1,0} parameter(1)
  ROOT %f = f32[8,2]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused
}
"""
    assert [(each.runs, each.flops) for each in hlo.matmuls(text)] == [(1, 2 * 8 * 4 * 2)]
    assert hlo.instructions(text)["f"].flops == 2 * 8 * 4 * 2


def test_matmuls_of_gpu_programs_are_those_of_cublas():
    dims = 'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
    text = """
ENTRY %main (x: bf16[8,8], y: f32[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %a = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%x, %x, %y), custom_call_target="__cublas$lt$matmul", DIMS
  %b = (bf16[8,8]{1,0}, u8[0]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %c = bf16[8,8]{1,0} get-tuple-element(%a), index=0
}
"""
    found = hlo.matmuls(text.replace("DIMS", dims))
    assert [(each.shapes, each.kernel) for each in found] == [("bf16[8,8] x bf16[8,8]", "cuBLAS")]


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
def test_kernels_are_recognized_by_kind_and_target(kind, target, names):
    dims = '"lhs_contracting_dimensions":["1"]' if "cublas" in target else ""
    text = HLO.replace("KIND", kind).replace("TARGET", target).replace("DIMS", dims)
    found = hlo.instructions(text)
    assert (found["y"].kernel, found["c"].kernel) == names
    assert found["l"].kernel == "XLA fusion (kLoop)"
    assert [each.op for each in found["l"].body if each.op not in hlo.FREE] == ["multiply", "add"]
    assert found["l"].origin == "jvp(GPT)/h_*/mlp/mul"
    assert found["l"].bytes == 2 * 4 * 8 * 2, "intermediate results stay in registers"
    assert found["l"].flops == 2 * 8 * 2
    assert "m" not in found, "it is inside a fusion"
    assert "s" not in found, "it is in the function of a reduction"
    assert found["t"].kernel == "XLA reduce"
    by_kernel = {matmul.kernel: matmul for matmul in hlo.matmuls(text)}
    assert by_kernel[names[0]].flops == 2 * 8 * 4 * 2
    assert by_kernel[names[0]].shapes == "bf16[8,4] x bf16[4,2]"
    counted = target in ("__cublas$gemm", "__onednn$matmul")
    assert (names[1] in by_kernel) == counted
    assert not counted or by_kernel[names[1]].flops == 2 * 8 * 4 * 2


def test_only_the_slice_of_a_sliced_array_is_memory_traffic():
    text = """
%row (p0: f32[1000,64], p1: s32[], p2: f32[1,64]) -> f32[1000,64] {
  %p0 = f32[1000,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,64]{1,0} parameter(2)
  %old = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,64}
  %new = f32[1,64]{1,0} add(%old, %p2)
  ROOT %u = f32[1000,64]{1,0} dynamic-update-slice(%p0, %new, %p1, %p1)
}

ENTRY %main (x: f32[1000,64], i: s32[], r: f32[1,64]) -> f32[1000,64] {
  %x = f32[1000,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[1,64]{1,0} parameter(2)
  %f = f32[1000,64]{1,0} fusion(%x, %i, %r), kind=kLoop, calls=%row
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%f, %i, %i), dynamic_slice_sizes={1,64}
}
"""
    found, row = hlo.instructions(text), 4 * 64
    assert found["f"].bytes == 3 * row + 4, "two rows and an index in, a row out"
    assert found["s"].bytes == 2 * row + 2 * 4
    written = "".join(line for line in text.splitlines(True) if "%old =" not in line and "%new =" not in line)
    found = hlo.instructions(written.replace("%new", "%p2"))
    assert found["f"].bytes == 2 * row + 4, "a row and an index in, a row out"


def test_matmuls_of_every_iteration_and_of_all_branches_are_counted():
    def function(x):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    text = jax.jit(function).lower(jnp.ones((4, 4))).compile().as_text()
    assert sum(matmul.flops for matmul in hlo.matmuls(text)) == (5 + 3) * 2 * 4**3
