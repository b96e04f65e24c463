import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import prng
from jaxgpt.step import jax_settings

SEEDS = [0, 1337, 2**31, 2**32 - 1]


def draw(key):
    one, many = jax.random.fold_in(key, 3), jax.random.split(key, 3)
    return (
        jax.random.bits(one, (5,), jnp.uint32),
        jax.vmap(lambda key: jax.random.uniform(key, (3,), jnp.float32))(many),
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def expected():
    return {seed: draw(jax.random.key(seed)) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_key_matches_jax_by_default(expected, seed):
    assert_equal(draw(prng.key(seed)), expected[seed])
    assert_equal(jax.jit(lambda seed: draw(prng.key(seed)))(np.uint32(seed)), expected[seed])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_prng_impl", "unsafe_rbg"),
        ("jax_random_seed_offset", 7),
        ("jax_enable_x64", True),
    ],
)
def test_flags_of_jax_do_not_change_the_stream(expected, set_flags, flag, value):
    set_flags(**{flag: value})
    assert_equal(draw(prng.key(1337)), expected[1337])
    assert_equal(jax.jit(lambda: draw(prng.key(1337)))(), expected[1337])


def mask(key, keep, *shape):
    return jax.jit(lambda key, keep: prng.keep_mask(key, keep, shape[:-2], *map(jnp.arange, shape[-2:])))(key, keep)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_mask_accepts_keys_of_other_generators(kind):
    keys = jax.random.split(jax.random.key(0, impl=kind), 2)
    one, other = mask(keys[0], 0.5, 16, 16), mask(keys[1], 0.5, 16, 16)
    assert (one != other).any()
    assert (one != mask(jax.random.fold_in(keys[0], 1), 0.5, 16, 16)).any()


def test_mask_keeps_the_given_share_and_looks_independent():
    """The share, the correlations of rows, columns and keys, and the spectrum are those of independent bits."""
    for keep in (0.5, 0.8, 0.999):
        share = mask(prng.key(1), keep, 10, 100, 1000).mean()
        assert abs(share - keep) < 5 * (keep * (1 - keep)) ** 0.5 / 1000
    bits = np.asarray(mask(prng.key(2), 0.5, 2, 8, 16, 256)).reshape(256, 256) - 0.5
    keys = jax.random.split(prng.key(3), 256)
    of_keys = np.asarray(jax.vmap(lambda key: mask(key, 0.5, 16, 16))(keys)).reshape(256, 256) - 0.5
    for one in (bits, bits.T, of_keys, of_keys.T):
        correlations = one @ one.T / 64
        assert np.abs(correlations - np.eye(256)).max() < 6 / 256**0.5
    spectrum = np.abs(np.fft.rfft(bits.ravel())) ** 2 / bits.size * 4
    assert spectrum.max() < 10 + np.log(spectrum.size)


def test_mask_entries_depend_only_on_their_indices():
    whole = mask(prng.key(1), 0.7, 4, 6, 8)
    assert_equal(mask(prng.key(1), 0.7, 2, 6, 8), whole[:2])
    block = prng.keep_mask(prng.key(1), 0.7, (4,), jnp.arange(2, 5), jnp.arange(3, 8))
    assert_equal(block, whole[:, 2:5, 3:8])
    assert_equal(jax.jit(lambda keep: mask(prng.key(1), keep, 4, 6, 8))(0.7), whole)


def test_dropout_masks_of_existing_runs_do_not_change():
    mask = prng.keep_mask(jax.random.fold_in(prng.key(7), 1), 0.5, (2,), jnp.arange(2), jnp.arange(8))
    assert np.packbits(np.asarray(mask)).tolist() == [119, 187, 215, 14]


def test_prebuilt_kernel_is_used_only_inside_its_block():
    before = jax.config.values["jax_threefry_gpu_kernel_lowering"]
    with jax_settings(jax_threefry_gpu_kernel_lowering=True):
        assert jax.config.values["jax_threefry_gpu_kernel_lowering"]
    assert jax.config.values["jax_threefry_gpu_kernel_lowering"] == before
