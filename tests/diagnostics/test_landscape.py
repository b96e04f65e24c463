import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.diagnostics import derivatives

A = jnp.array([[3.0, 1.0], [1.0, 2.0]])


def quadratic(params, batch):
    return 0.5 * params["x"] @ A @ params["x"] + batch


def test_plane_has_the_loss_at_each_point():
    params, right, up = ({"x": jnp.array(x)} for x in ([1.0, -1.0], [0.5, 0.0], [0.0, 2.0]))
    xs, ys = jnp.array([-1.0, 0.0, 2.0]), jnp.array([0.0, 1.0])
    found = jax.jit(derivatives.plane, static_argnums=0)(quadratic, params, 10.0, right, up, xs, ys)
    assert found.shape == (2, 3)
    for (j, i), value in np.ndenumerate(found):
        point = np.array([1 + 0.5 * xs[i], -1 + 2 * ys[j]])
        np.testing.assert_allclose(value, 10 + 0.5 * point @ np.asarray(A) @ point, rtol=1e-6)


def test_along_interpolates_between_two_sets_of_parameters():
    one, other = ({"x": jnp.array(x)} for x in ([1.0, -1.0], [4.0, 2.0]))
    direction = jax.tree.map(jnp.subtract, other, one)
    found = jax.jit(derivatives.along, static_argnums=0)(quadratic, one, 0.0, direction, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(found, [quadratic(one, 0.0), quadratic(other, 0.0)], rtol=1e-6)


@pytest.mark.parametrize("L", [(), (3,)], ids=["blocks", "stacked"])
def test_filter_normalized_directions_keep_filter_norms_and_biases(L):
    shapes = {"kernel": (4, 6), "bias": (6,), "embedding": (5, 4), "scale": (4,)}
    params = {"h": {name: np.random.default_rng(1).normal(size=(*L, *shape)) for name, shape in shapes.items()}}
    directions = jax.jit(derivatives.filter_normalized)(params, jax.random.key(1))["h"]
    assert {name: d.shape for name, d in directions.items()} == {name: (*L, *shape) for name, shape in shapes.items()}
    for name, axis in (("kernel", -2), ("embedding", -1)):  # filters: the columns of a kernel, the rows of an embedding
        d, p = directions[name], params["h"][name]
        np.testing.assert_allclose(np.linalg.norm(d, axis=axis), np.linalg.norm(p, axis=axis), rtol=1e-5)
        assert len(np.unique(d)) == d.size
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(directions[name], np.zeros_like(directions[name]))
