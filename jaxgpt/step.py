"""One training step as a pure function, a scan of K steps, and their compilation for a mesh."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import ArrayLike

from jaxgpt import matmul, model, prng
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import Batch, inputs_and_targets, take
from jaxgpt.optimizer import Hyperparameters, hyperparameters, learning_rate, make_optimizer
from jaxgpt.sharding import in_auto_mode, platform, replicated, spec_of, state_shardings, varying_alike

# Streams of random keys, folded into the key of the seed. Batches have their own generator.
INIT, DROPOUT = range(2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: jax.Array  # () int32: optimizer steps done
    params: model.Params
    opt_state: Any  # of make_optimizer(config)


class Metrics(NamedTuple):
    """Scalars of one step, float32 except the last."""

    loss: jax.Array  # nats per token of the batch, before the update
    grad_norm: jax.Array  # global, before clipping
    learning_rate: jax.Array
    applied: jax.Array  # bool: False if the loss or a gradient was not finite


@partial(jax.jit, static_argnums=0)
@matmul.in_32_bits
def init_state(config: Config, hyper: Hyperparameters | None = None) -> TrainState:
    """The state at step 0, a pure function of its arguments; `hyper` as in `train_step`."""
    hyper = hyper or hyperparameters(config)
    params = model.init_params(config.model, stream_key(hyper.seed, INIT), hyper.init_scale)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config, hyper).init(params))


@matmul.in_32_bits
@in_auto_mode(lambda state, *_, **__: (jax.tree.map(spec_of, state), PartitionSpec()))
def train_step(
    config: Config, state: TrainState, batch: Batch, hyper: Hyperparameters | None = None
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch` ((B, T) inputs and targets), pure and traceable.

    If the loss or a gradient is not finite, the step is counted but not applied: parameters and optimizer state do not
    change. A parameter that its update would make infinite, as at a learning rate of 1e38, keeps its value. So a finite
    state stays finite.

    Args:
      hyper: traced hyperparameters, as in a sweep; None for those of the config.
    """
    hyper = hyper or hyperparameters(config)
    dropout_key = None
    if config.model.dropout:
        dropout_key = jax.random.fold_in(stream_key(hyper.seed, DROPOUT), state.step)
    loss, grads = loss_and_grads(config, state.params, batch, dropout_key, hyper.dropout)
    # A finite norm bounds each gradient by 2e19, so the moments of the optimizer stay finite too.
    grad_norm = optax.tree.norm(grads)
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = make_optimizer(config, hyper).update(grads, state.opt_state, state.params, applied=applied)
    rate = jnp.float32(learning_rate(config, hyper)(state.step))

    def updated(p: jax.Array, u: jax.Array) -> jax.Array:
        new = p - rate * u
        return jnp.where(applied & jnp.isfinite(new), new, p)

    params = jax.tree.map(updated, state.params, updates)
    return TrainState(state.step + 1, params, opt_state), Metrics(loss, grad_norm, rate, applied)


@matmul.in_32_bits
@in_auto_mode(lambda state, *_, **__: (jax.tree.map(spec_of, state), PartitionSpec()))
def train_steps(
    config: Config,
    state: TrainState,
    tokens: ArrayLike | None,
    windows: jax.Array,
    hyper: Hyperparameters | None = None,
) -> tuple[TrainState, Metrics]:
    """K steps as one scan, pure and traceable; `hyper` as in `train_step`.

    Args:
      tokens: (N,) ids: the corpus on the device. None if it is too large.
      windows: (K, B) int32 window starts; without tokens the windows themselves, (K, B, T + 1).

    Returns:
      The state after K steps, and their metrics, each (K,).
    """
    tokens = None if tokens is None else jnp.asarray(tokens)  # NumPy's cannot be indexed inside a scan

    def body(state: TrainState, windows: jax.Array) -> tuple[TrainState, Metrics]:
        batch = inputs_and_targets(windows) if tokens is None else take(tokens, windows, config.model.block_size)
        return train_step(config, state, batch, hyper)

    return jax.lax.scan(body, state, windows)


def loss_and_grads(
    config: Config, params: model.Params, batch: Batch, dropout_key: jax.Array | None, dropout: model.Rate = None
) -> tuple[jax.Array, model.Params]:
    """Mean loss over the batch and its gradient, accumulated over micro-batches. Dropout as in `model.losses`."""

    def loss(params: model.Params, batch: Batch, key: jax.Array | None) -> jax.Array:
        return model.losses(config.model, params, batch.inputs, batch.targets, key, dropout).mean()

    A = config.train.accumulate
    if A == 1:
        return jax.value_and_grad(loss)(params, batch, dropout_key)

    def add(total: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        micro_batch, i = item
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, micro_batch, key)), None

    micro_batches = jax.tree.map(lambda x: x.reshape(A, -1, *x.shape[1:]), batch)
    zero = varying_alike(jnp.zeros(()), *jax.tree.leaves((batch, params, dropout_key, dropout)))[0]
    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, (zero, zeros), (micro_batches, jnp.arange(A)))
    return jax.tree.map(lambda x: x / A, total)


def stream_key(seed: Any, stream: int) -> jax.Array:
    """The key of a stream, INIT or DROPOUT."""
    return jax.random.fold_in(prng.key(seed), stream)


def shared(config: Config) -> Config:
    """`config` without the settings that no step depends on: runs that differ in these alone share their programs."""
    optimizer = replace(config.optimizer, decay_steps=config.optimizer.decay_steps or config.train.steps)
    train = TrainConfig(seed=config.train.seed, accumulate=config.train.accumulate)
    return Config(model=config.model, optimizer=optimizer, train=train)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of a train state."""
    shapes = jax.eval_shape(init_state, shared(config))
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, state_shardings(mesh, shapes))


def _shardings(config: Config, mesh: Mesh) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))


def sharded_init(config: Config, mesh: Mesh) -> TrainState:
    """`init_state`, each shard computed on its own device."""
    return lower_init(config, mesh).compile()()


def lower_init(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The program of `sharded_init`. No other thread may lower programs meanwhile, because of `jax_settings`.

    It runs once, so on CPUs it is optimized less: it compiles in a third less time and gives the same bits. On GPUs,
    threefry is one prebuilt kernel, with the same bits: XLA took 192 s to compile the state of GPT-2 124M without it,
    4 s with it (one H200). Training steps do not use it: those with dropout were 19% slower.
    """
    out, device = _shardings(config, mesh), platform()
    options = {"xla_backend_optimization_level": 1} if device == "cpu" else None
    with jax_settings(jax_threefry_gpu_kernel_lowering=True) if device == "gpu" else nullcontext():
        return jax.jit(init_state, static_argnums=0, out_shardings=out, compiler_options=options).lower(shared(config))


def jit_train_steps(config: Config, mesh: Mesh) -> Any:
    """`train_steps` of `config`, jitted: (state, tokens, windows) -> (state, metrics).

    The state is donated and keeps its shardings. Trace and call it under `jax.set_mesh(mesh)`.
    """
    return _jit_train_steps(shared(config), mesh)


@lru_cache(maxsize=16)
def _jit_train_steps(config: Config, mesh: Mesh) -> Any:
    out = _shardings(config, mesh), replicated(mesh)
    return jax.jit(partial(train_steps, config), donate_argnums=0, out_shardings=out)


@contextmanager
def jax_settings(**values: Any) -> Iterator[None]:
    """Let `jax.config` have these values, in all threads, and then those from before."""
    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
