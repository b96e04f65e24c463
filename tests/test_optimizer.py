from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.optimizer import decay_mask, learning_rate, make_optimizer
from jaxgpt.recipes import FINETUNE, RECIPES
from jaxgpt.step import init_state


def nanogpt_rate(step, peak=1e-3, low=1e-4, warmup=100, end=2000):
    """nanoGPT's `get_lr`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / (end - warmup))
    return low + (peak - low) * (1 + np.cos(np.pi * progress)) / 2


def test_cosine_schedule_matches_nanogpt(change):
    config = change(Config(), steps=2000)
    rates = jax.vmap(learning_rate(config))(jnp.arange(2500))
    np.testing.assert_allclose(rates, [nanogpt_rate(step) for step in range(2500)], rtol=1e-4)


def test_linear_and_constant_schedules(change):
    linear = learning_rate(change(Config(), schedule="linear", warmup_steps=0, steps=100, min_learning_rate=0.0))
    np.testing.assert_allclose([linear(0), linear(50), linear(100), linear(200)], [1e-3, 5e-4, 0, 0], atol=1e-9)
    assert jax.jit(linear)(300) == 0, "not slightly below zero"
    constant = learning_rate(change(Config(), schedule="constant", warmup_steps=1))
    np.testing.assert_allclose([constant(0), constant(1), constant(10**6)], [5e-4, 1e-3, 1e-3], rtol=1e-5)


def test_decay_steps_end_the_schedule_early(change):
    rate = learning_rate(change(Config(), decay_steps=200, steps=1000))
    np.testing.assert_allclose([rate(200), rate(999)], [1e-4, 1e-4], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("base", [FINETUNE, *(each.config for each in RECIPES.values())])
def test_rate_of_every_recipe_decays_from_any_peak(base, change, schedule):
    config = change(base, learning_rate=1e-5, schedule=schedule, warmup_steps=5, decay_steps=40)
    rates = np.asarray(jax.vmap(learning_rate(config))(jnp.arange(5, 50)))
    assert (np.diff(rates) <= 0).all()
    assert rates[-1] < rates[0] == pytest.approx(1e-5)


def test_schedule_ends_at_a_ratio_of_the_peak_or_at_an_explicit_minimum(change):
    low = change(Config(), learning_rate=3e-5)
    assert float(learning_rate(low)(10**4)) == pytest.approx(3e-6)
    assert float(learning_rate(change(low, min_lr_ratio=0.5))(10**4)) == pytest.approx(1.5e-5)
    assert float(learning_rate(change(low, min_lr_ratio=0.5, min_learning_rate=0.0))(10**4)) == pytest.approx(0.0)


def test_weight_decay_mask_matches_nanogpt_and_ignores_stacking(tiny):
    params = jax.eval_shape(partial(model.init_params, tiny.model), jax.random.key(0))
    mask = decay_mask(params)
    by_ndim = jax.tree.map(lambda x: x.ndim >= 2, params)
    assert mask == by_ndim
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
    assert decay_mask(stacked) == mask, "stacked layers decay the same parameters"


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_first_step_matches_adamw_by_hand(tiny, change, clip):
    """The first AdamW step: clipped g, bias-corrected moments g and g^2, so -lr * (g / (|g| + eps) + wd * p)."""
    config = change(tiny, schedule="constant", warmup_steps=0, grad_clip=clip)
    params = jax.device_get(init_state(tiny).params)
    grads = jax.tree.map(np.cos, params)
    tx = make_optimizer(config)
    updates, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params))()
    updates = jax.tree.map(lambda u: np.float32(-1e-3) * u, jax.device_get(updates))
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    scale = min(1.0, clip / norm) if clip else 1.0

    def by_hand(p, g, decayed):
        g = g * scale
        return -1e-3 * (g / (np.abs(g) + 1e-8) + 0.1 * decayed * p)

    expected = jax.tree.map(by_hand, params, grads, decay_mask(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), updates, expected)
    assert all(u.any() for u in jax.tree.leaves(updates))


def test_a_peak_of_zero_stays_zero(change):
    assert float(learning_rate(change(Config(), learning_rate=0.0))(500)) == 0.0
