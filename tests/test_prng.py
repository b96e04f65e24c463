import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import prng

SEEDS = [0, 1337, 2**31, 2**32 - 1]


def drawn(key):
    one, many = jax.random.fold_in(key, 3), jax.random.split(key, 3)
    return (
        jax.random.bits(one, (5,), jnp.uint32),
        jax.vmap(lambda key: jax.random.uniform(key, (3,), jnp.float32))(many),
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def expected():
    return {seed: drawn(jax.random.key(seed)) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_by_default_a_key_is_jaxs_own(expected, seed):
    assert_equal(drawn(prng.key(seed)), expected[seed])
    assert_equal(jax.jit(lambda seed: drawn(prng.key(seed)))(np.uint32(seed)), expected[seed])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_prng_impl", "unsafe_rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 7),
        ("jax_enable_x64", True),
    ],
)
def test_no_flag_of_jax_changes_the_stream(expected, set_flags, flag, value):
    set_flags(**{flag: value})
    assert_equal(drawn(prng.key(1337)), expected[1337])
    assert_equal(jax.jit(lambda: drawn(prng.key(1337)))(), expected[1337])
