import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import data as batches
from jaxgpt import model, prng
from jaxgpt import step as steps
from jaxgpt.optimizer import hyperparameters, learning_rate
from jaxgpt.sharding import one_device, state_shardings
from jaxgpt.step import abstract_state, init_state, jit_train_steps, sharded_init

loss_and_grads, train_step = (jax.jit(f, static_argnums=0) for f in (steps.loss_and_grads, steps.train_step))

TOKENS = np.random.default_rng(0).integers(0, 13, 200).astype(np.uint16)


def starts(config, begin, end):
    train = config.train
    return batches.chunk_starts(train.seed, begin, end, len(TOKENS), config.model.block_size, train.batch_size)


def run(config, state, begin, end):
    windows = starts(config, begin, end).astype(np.int32)
    return jit_train_steps(config, one_device())(state, jnp.asarray(TOKENS), windows)


def fresh(config):
    """The initial state with the sharding of a state after a step, so that both use one compiled program."""
    state = init_state(config)
    return jax.device_put(state, state_shardings(one_device(), state))


@pytest.mark.smoke
def test_scan_matches_single_steps(tiny):
    scanned, metrics = run(tiny, fresh(tiny), 0, 5)
    state = init_state(tiny)
    for i, row in enumerate(starts(tiny, 0, 5)):
        state, one = train_step(tiny, state, batches.take(TOKENS, row, tiny.model.block_size))
        np.testing.assert_allclose(metrics.loss[i], one.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm[i], one.grad_norm, rtol=1e-4)
    assert int(scanned.step) == int(state.step) == 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), scanned.params, state.params)


def test_enabling_64_bits_changes_no_bit(tiny, change):
    """Even if the caller passes 64-bit arrays, and in eager mode."""
    config = change(tiny, algorithm="muon", accumulate=2, scan_steps=2)
    state, metrics = run(config, init_state(config), 0, 2)
    with jax.enable_x64(True):
        wide, wide_metrics = run(config, init_state(config), 0, 2)
        idx = jnp.asarray(TOKENS[None, :8], jnp.int64)
        logits = model.forward(config.model, jax.tree.map(lambda x: x.astype(jnp.float64), wide.params), idx)
        fresh = model.init_params(config.model, prng.key(1))
    chex.assert_trees_all_equal((state, metrics), (wide, wide_metrics))
    assert {x.dtype.name for x in jax.tree.leaves((wide, wide_metrics, logits, fresh))} <= {"float32", "int32", "bool"}
    chex.assert_trees_all_equal(logits, model.forward(config.model, state.params, TOKENS[None, :8].astype(np.int32)))
    chex.assert_trees_all_equal(fresh, model.init_params(config.model, prng.key(1)))


@pytest.mark.smoke
def test_splitting_a_scan_changes_no_bit(tiny):
    whole, _ = run(tiny, fresh(tiny), 0, 10)
    half, _ = run(tiny, fresh(tiny), 0, 5)
    halves, _ = run(tiny, half, 5, 10)
    chex.assert_trees_all_equal(whole, halves)


@pytest.mark.optimized
def test_initial_state_does_not_depend_on_the_optimization_level(tiny):
    chex.assert_trees_all_equal(sharded_init(tiny, one_device()), init_state(tiny))


def test_second_call_compiles_nothing(tiny):
    state, _ = run(tiny, sharded_init(tiny, one_device()), 0, 5)
    compiled = jit_train_steps(tiny, one_device())._cache_size()
    state, _ = run(tiny, state, 5, 10)
    run(tiny, state, 10, 15)
    assert jit_train_steps(tiny, one_device())._cache_size() == compiled


def test_runs_that_compute_the_same_step_share_a_program(tiny, change):
    tiny, mesh = change(tiny, kind="bigram"), one_device()
    other = change(tiny, corpus="b", val_fraction=0.2, steps=40, batch_size=2, sampling="random", scan_steps=10)
    other = change(other, eval_every=0, eval_start=False, eval_batches=0, keep=9, keep_every=10, max_skipped=1)
    other = change(other, on_save_error="stop")
    equal = {name for name, value in vars(tiny.train).items() if value == vars(other.train)[name]}
    assert equal == {"seed", "accumulate"}, "`other` must change every setting that no step depends on"
    assert jit_train_steps(other, mesh) is jit_train_steps(tiny, mesh)
    for name, value in dict(seed=1, accumulate=2, vocab_size=9, learning_rate=1.0, decay_steps=30).items():
        assert jit_train_steps(change(tiny, **{name: value}), mesh) is not jit_train_steps(tiny, mesh)
    for config in (other, change(other, decay_steps=0)):  # 0: the schedule ends with the run
        given = abstract_state(config, mesh), TOKENS, starts(tiny, 0, 2).astype(np.int32)
        lower = jax.jit(steps.train_steps, static_argnums=0).lower
        assert lower(steps.shared(config), *given).as_text() == lower(config, *given).as_text()


def test_state_is_donated(tiny):
    state = fresh(tiny)
    run(tiny, state, 0, 5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("A", [2, 4])
def test_accumulated_gradients_equal_the_full_batch(tiny, change, A):
    config = change(tiny, dropout=0.0)
    params = init_state(config).params
    batch = batches.take(TOKENS, starts(config, 0, 1)[0], 8)
    loss, grads = loss_and_grads(config, params, batch, None)
    loss_a, grads_a = loss_and_grads(change(config, accumulate=A), params, batch, None)
    np.testing.assert_allclose(loss, loss_a, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, grads_a)


def test_micro_batches_have_their_own_dropout_masks(tiny, change):
    """Both halves of the batch are the same sequences; with one mask for both, accumulation would change nothing."""
    config = change(tiny, dropout=0.5)
    params, key = init_state(config).params, jax.random.key(0)
    half = batches.take(TOKENS, starts(config, 0, 1)[0][:2], 8)
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), half)
    loss, _ = loss_and_grads(change(config, accumulate=2), params, twice, key)
    first, _ = loss_and_grads(config, params, half, jax.random.fold_in(key, 0))
    second, _ = loss_and_grads(config, params, half, jax.random.fold_in(key, 1))
    assert first != second
    np.testing.assert_allclose(loss, (first + second) / 2, rtol=1e-5)


def test_dropout_depends_only_on_seed_and_step(tiny, change):
    """Equal seeds and steps give the same mask; another seed or step gives another one."""

    def loss(config, step):
        state = init_state(tiny)
        state = type(state)(jnp.int32(step), state.params, state.opt_state)
        batch = batches.take(TOKENS, starts(tiny, 0, 1)[0], 8)
        return float(train_step(config, state, batch)[1].loss)

    assert loss(tiny, 0) == loss(tiny, 0)
    assert len({loss(tiny, 0), loss(tiny, 1), loss(change(tiny, seed=1), 0)}) == 3


def test_random_streams_of_existing_runs_do_not_change(tiny):
    """Step n of a seed: its initial parameters and its dropout masks come from these keys."""
    key, state = prng.key(tiny.train.seed), init_state(tiny)
    expected = model.init_params(tiny.model, jax.random.fold_in(key, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, expected)
    batch, dropout_key = batches.take(TOKENS, starts(tiny, 0, 1)[0], 8), jax.random.fold_in(key, 1)
    found = train_step(tiny, dataclasses.replace(state, step=jnp.int32(3)), batch)[1].loss
    expected = loss_and_grads(tiny, state.params, batch, jax.random.fold_in(dropout_key, 3))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_step_has_its_rate_of_the_schedule(tiny):
    _, metrics = run(tiny, fresh(tiny), 0, 5)
    np.testing.assert_allclose(metrics.learning_rate, jax.vmap(learning_rate(tiny))(jnp.arange(5)), rtol=1e-6)


def test_gradient_norm_is_measured_before_clipping(tiny, change):
    config = change(tiny, grad_clip=1e-6, dropout=0.0)
    batch = batches.take(TOKENS, starts(config, 0, 1)[0], 8)
    _, metrics = train_step(config, init_state(config), batch)
    _, grads = loss_and_grads(config, init_state(config).params, batch, None)
    squares = sum(np.square(g).sum() for g in jax.tree.leaves(jax.device_get(grads)))
    np.testing.assert_allclose(metrics.grad_norm, np.sqrt(squares), rtol=1e-5)


def test_initial_state_is_a_function_of_the_seed(tiny, change):
    chex.assert_trees_all_equal(init_state(tiny), init_state(tiny))
    other = init_state(change(tiny, seed=1))
    assert (other.params["wte"]["embedding"] != init_state(tiny).params["wte"]["embedding"]).any()
    assert int(other.step) == 0
    config = change(tiny, seed=2**32 - 1)
    chex.assert_trees_all_equal(init_state(config, hyperparameters(config)), init_state(config))


def test_train_step_supports_vmap_over_states(tiny, change):
    """A sweep is such a vmap."""
    config = change(tiny, dropout=0.0)
    seeds = [init_state(change(config, seed=seed)) for seed in range(2)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *seeds)
    batch = batches.take(TOKENS, starts(config, 0, 1)[0], 8)
    together, _ = jax.jit(jax.vmap(lambda state: steps.train_step(config, state, batch)))(stacked)
    alone, _ = train_step(config, seeds[1], batch)
    for a, b in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-5)


def test_training_can_be_differentiated_where_gradients_are_zero(tiny, change):
    """With zero_init, only kernels that write to the residual stream have non-zero gradients in the first step. Muon
    leaves embeddings to AdamW."""
    config = change(tiny, zero_init=True, tie_weights=True, bigram_embed=True, algorithm="muon", muon_steps=1)
    state, plan = init_state(config), starts(config, 0, 2).astype(np.int32)

    def after_training(rate):
        hyper = hyperparameters(config)._replace(learning_rate=rate)
        return steps.train_steps(config, state, jnp.asarray(TOKENS), plan, hyper)[1].loss[-1]

    assert jnp.isfinite(jax.jit(jax.grad(after_training))(1e-3))


def test_learns_a_repeating_text(tiny, change):
    config = change(tiny, dropout=0.0, steps=300, decay_steps=300, learning_rate=1e-2, warmup_steps=10)
    tokens = jnp.asarray(np.tile(np.arange(13, dtype=np.uint16), 20))
    plan = batches.chunk_starts(0, 0, 300, len(tokens), 8, 4).astype(np.int32)
    state, metrics = jit_train_steps(config, one_device())(init_state(config), tokens, plan)
    assert metrics.loss[0] > 2.4
    assert metrics.loss[-1] < 0.05
    logits = model.forward(config.model, state.params, jnp.arange(8)[None])
    np.testing.assert_array_equal(logits[0, 1:].argmax(-1), np.arange(2, 9))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_non_finite_step_changes_only_the_step_count(tiny, change, monkeypatch, bad, algorithm):
    config = change(tiny, dropout=0.0, warmup_steps=0, learning_rate=1e-3, algorithm=algorithm)
    batch = batches.take(TOKENS, starts(config, 0, 1)[0], 8)

    def poisoned(*args):
        loss, grads = real(*args)
        if bad == "loss":
            return loss * jnp.nan, grads
        if bad == "gradient":
            grads["wte"]["embedding"] = grads["wte"]["embedding"].at[2, 3].set(jnp.inf)
        return loss, grads

    real = steps.loss_and_grads
    before = init_state(config)
    monkeypatch.setattr(steps, "loss_and_grads", poisoned)
    after, metrics = jax.jit(lambda s, b: steps.train_step(config, s, b))(before, batch)
    assert not metrics.applied
    assert int(after.step) == 1
    chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))
    monkeypatch.undo()
    recovered, metrics = train_step(config, after, batch)
    assert metrics.applied
    assert (recovered.params["wte"]["embedding"] != before.params["wte"]["embedding"]).any()


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_parameter_whose_update_overflows_keeps_its_value(tiny, change, algorithm):
    rates = {"learning_rate": 3e38, "muon_learning_rate": 3e38, "weight_decay": 10.0}
    config = change(tiny, dropout=0.0, warmup_steps=0, algorithm=algorithm, **rates)
    after, metrics = train_step(config, init_state(config), batches.take(TOKENS, starts(config, 0, 1)[0], 8))
    assert metrics.applied
    chex.assert_tree_all_finite(after)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position": "rope", "smear": True, "bigram_embed": True},
        {"algorithm": "muon", "schedule": "linear"},
        {"accumulate": 2},
    ],
)
def test_training_and_sampling_with_strict_dtype_promotion(tiny, change, options):
    from jaxgpt.sample import generate

    config, idx = change(tiny, **options), jnp.zeros((1, 8), jnp.uint16)
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(lambda: init_state(config))
        tokens, windows = np.asarray(TOKENS), starts(config, 0, 5).astype(np.int32)
        after, _ = jax.eval_shape(lambda state: steps.train_steps(config, state, tokens, windows), state)
        jax.eval_shape(lambda params: model.losses(config.model, params, idx, idx), state.params)
        generate(config.model, model.init_params(config.model, jax.random.key(0)), idx, 3, jax.random.key(1))
    assert after == state


def test_threefry_kernel_of_gpus_is_only_for_initial_states(tiny, change, verse, tmp_path, monkeypatch):
    """Even though another thread lowers the steps while the state is computed."""
    from jaxgpt.cli.runs import start_run
    from jaxgpt.train import fit

    name, seen = "jax_threefry_gpu_kernel_lowering", {"init": [], "steps": []}
    init, one_step = steps.init_state, steps.train_step

    def recording_init(config):
        seen["init"].append(jax.config.values[name])
        return init(config)

    def recording_step(*args):
        seen["steps"].append(jax.config.values[name])
        return one_step(*args)

    monkeypatch.setattr(steps, "init_state", jax.jit(recording_init, static_argnums=0))
    monkeypatch.setattr(steps, "train_step", recording_step)
    config = change(tiny, kind="bigram", corpus=str(verse), steps=5, eval_every=0)
    fit(*start_run(config, "cpu", tmp_path / "runs", tmp_path))
    assert seen["init"] == [False], "traced once for shapes and program"
    monkeypatch.setattr(steps, "platform", lambda: "gpu")
    fit(*start_run(config, "gpu", tmp_path / "runs", tmp_path))
    assert True in seen["init"]
    assert set(seen["steps"]) == {False}
    assert not jax.config.values[name]
