from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import machine, matmul
from jaxgpt.step import init_state, train_steps

KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_dot_matches_numpy(shape):
    x, w = jax.random.normal(KEYS[0], shape), jax.random.normal(KEYS[1], (5, 7))
    np.testing.assert_allclose(matmul.dot(x, w), np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_matmuls_of_layers_are_two_dimensional(precision):
    """XLA for CPUs is fast at these."""
    jaxpr = jax.make_jaxpr(lambda x, w: matmul.dot(x, w, precision))(jnp.ones((2, 3, 5)), jnp.ones((5, 7)))
    shapes = [eqn.invars[0].aval.ndim for eqn in jaxpr.eqns if eqn.primitive.name in ("dot_general", "custom_vjp_call")]
    assert shapes == [2]


@pytest.mark.smoke
@pytest.mark.parametrize(("K", "N"), [(8, 12), (12, 8), (8, 65), (3, 5)])
def test_bfloat16_rounds_operands_only(K, N):
    """The matmul and both its gradients equal float32 matmuls of rounded matrices: sums are float32."""
    x, w, g = (jax.random.normal(key, s) for key, s in zip(KEYS, [(6, K), (K, N), (6, N)], strict=True))

    def rounded(x):
        return np.asarray(x.astype(jnp.bfloat16), np.float32)

    out, back = jax.vjp(lambda x, w: matmul.dot(x, w, "bfloat16"), x, w)
    dx, dw = back(g)
    assert {each.dtype for each in (out, dx, dw)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(out, rounded(x) @ rounded(w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, rounded(g) @ rounded(w).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, rounded(x).T @ rounded(g), rtol=1e-5, atol=1e-5)
    assert np.abs(out - np.asarray(x) @ np.asarray(w)).max() > 1e-4


def test_bfloat16_matmul_of_activations_sums_in_float32():
    x, y = (jax.random.normal(key, shape) for key, shape in zip(KEYS, [(2, 6, 64), (2, 64, 7)], strict=False))
    found = matmul.matmul(x, y, "bfloat16")
    assert found.dtype == jnp.float32
    expected = np.matmul(*(np.asarray(each.astype(jnp.bfloat16), np.float32) for each in (x, y)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (2, 3, 6, 12)])
def test_transposed(shape):
    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    np.testing.assert_array_equal(matmul.transposed(x), np.swapaxes(x, -1, -2))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("C", [15, 16, 18])
def test_bfloat16_gradients_of_heads_of_any_shape(C, tied):
    """XLA has failed to compile some of these shapes with a transposed embedding as the kernel."""

    @jax.jit
    def grads(x, weight):
        return jax.grad(lambda x, w: (matmul.dot(x, w.T if tied else w, "bfloat16") ** 2).sum(), (0, 1))(x, weight)

    rng = np.random.default_rng(0)
    for V in (7, 12, 15, 16, 17, 40):
        x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((32, C), (C, V)))
        dx, dw = grads(x, kernel.T if tied else kernel)
        for low, exact in ((dx, 2 * x @ kernel @ kernel.T), (dw.T if tied else dw, 2 * x.T @ (x @ kernel))):
            np.testing.assert_allclose(low, exact, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("precision", "C", "V", "bias"), [("bfloat16", 16, 16, False), ("auto", 18, 40, True), ("auto", 15, 17, False)]
)
def test_tied_head_trains_in_bfloat16(tiny, change, precision, C, V, bias):
    shape = {"n_embd": C, "vocab_size": V, "n_head": 1, "bias": bias, "tie_weights": True, "dropout": 0.0}
    config = change(tiny, **shape, scan_steps=6)
    tokens, starts = jnp.arange(200, dtype=jnp.uint16) % V, jnp.arange(24, dtype=jnp.int32).reshape(6, 4)
    low, full = (
        train_steps(change(config, precision=each), init_state(config), tokens, starts)[1].loss
        for each in (precision, "float32")
    )
    np.testing.assert_allclose(low, full, atol=5e-3)


def test_auto_resolves_to_a_precision():
    assert matmul.resolve("float32") == "float32"
    assert matmul.resolve("bfloat16") == "bfloat16"
    assert matmul.resolve("auto") in ("float32", "bfloat16")
    jitted = jax.jit(lambda x: matmul.to_compute_dtype(x, "auto"))(jnp.ones(3))
    assert jitted.dtype == jnp.dtype(matmul.resolve("auto"))


@pytest.mark.parametrize(
    ("platform", "flags", "capability", "expected"),
    [
        ("cpu", "fpu avx2 avx512f avx512_bf16", None, "bfloat16"),
        ("cpu", "fpu amx_bf16 amx_tile", None, "bfloat16"),
        ("cpu", "fpu avx2 avx512f", None, "float32"),
        ("cpu", "", None, "float32"),  # no /proc/cpuinfo
        ("gpu", "avx512_bf16", "7.5", "float32"),
        ("gpu", "", "8.0", "bfloat16"),
        ("gpu", "", "12.0", "bfloat16"),
        ("gpu", "", "gfx942", "float32"),
        ("tpu", "", None, "bfloat16"),
        ("other", "avx512_bf16", None, "float32"),
    ],
)
def test_auto_follows_platform_and_hardware(monkeypatch, platform, flags, capability, expected):
    monkeypatch.setattr(machine, "cpu_info", lambda: f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(matmul.sharding, "platform", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert matmul.resolve("auto") == expected
