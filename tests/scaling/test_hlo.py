import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgpt.scaling import hlo


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def compiled(function, mesh, spec, *shapes):
    sharding = NamedSharding(mesh, spec)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*arrays).compile().as_text()


def test_a_sum_over_devices_is_one_all_reduce_of_its_bytes(mesh):
    text = compiled(lambda x: x.sum(axis=0), mesh, PartitionSpec("x"), (16, 100))
    assert hlo.collectives(text) == {"all-reduce": (1, 400)}


def test_what_a_loop_sends_counts_as_often_as_it_runs(mesh):
    def function(x):
        def body(total, _):
            return total + jnp.tanh(x * total.mean()).sum(axis=0), None

        return jax.lax.scan(body, jnp.ones(100), None, length=7)[0]

    assert hlo.collectives(compiled(function, mesh, PartitionSpec("x"), (16, 100))) == {"all-reduce": (7, 7 * 400)}


@pytest.mark.parametrize("groups", ["[1,8]<=[8]", "{{0,1,2,3,4,5,6,7}}", "mesh['a'=4,'b'=2,'c'=3] {'a','b'}"])
def test_bytes_of_what_is_scattered_count_before(groups):
    text = f"""
ENTRY %main.1 (p: f32[64]) -> f32[8] {{
  %p = f32[64]{{0}} parameter(0)
  ROOT %rs = f32[8]{{0}} reduce-scatter(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}, to_apply=%add
}}
"""
    assert hlo.collectives(text) == {"reduce-scatter": (1, 256)}


def test_a_program_on_one_device_sends_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()
    assert hlo.collectives(text) == {}
