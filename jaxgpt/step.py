"""Loss to weights: one step as a pure function, and K of them as one compiled program."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt import matmul as numerics
from jaxgpt import model as nn
from jaxgpt import prng
from jaxgpt.config import Config, off
from jaxgpt.data import Batch, cut, take
from jaxgpt.optimizer import learning_rate, make_optimizer

# Streams of random keys, folded into the key of the seed. Batches have a generator of their own.
INIT, DROPOUT = range(2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training."""

    step: jax.Array  # () int32, the optimizer steps done
    params: nn.Params
    opt_state: Any  # of make_optimizer(config)


class Metrics(NamedTuple):
    """What a step reports: scalars, float32 but for the last."""

    loss: jax.Array  # nats per token, of the batch before the update
    grad_norm: jax.Array  # global, before clipping
    learning_rate: jax.Array
    applied: jax.Array  # bool: False where the loss, a gradient or an update was no finite number


@partial(jax.jit, static_argnums=0)
@numerics.in_32_bits
def init_state(config: Config) -> TrainState:
    """The state at step 0, a pure function of the config."""
    params = nn.init_params(config.model, stream_key(config, INIT))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params))


@numerics.in_32_bits
def train_step(config: Config, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch` ((B, T) inputs and targets), pure and traceable.

    Where the loss, a gradient or an update is not finite, the step is counted but not applied: parameters and
    optimizer state stay as they are, bit for bit. So a finite state is followed by finite states only.
    """
    dropout_key = None
    if not off(config.model.dropout):
        dropout_key = jax.random.fold_in(stream_key(config, DROPOUT), state.step)
    loss, grads = loss_and_grads(config, state.params, batch, dropout_key)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    rate = jnp.float32(learning_rate(config)(state.step))
    updates = jax.tree.map(lambda u: -rate * u, updates)
    # A finite global norm bounds each entry by 2e19, so neither Adam's squares nor the sums below can overflow.
    grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    params, opt_state = jax.tree.map(
        partial(jnp.where, applied),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    return TrainState(state.step + 1, params, opt_state), Metrics(loss, grad_norm, rate, applied)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
@numerics.in_32_bits
def train_steps(
    config: Config, state: TrainState, tokens: jax.Array | None, windows: jax.Array
) -> tuple[TrainState, Metrics]:
    """K steps as one program; the windows are taken from the tokens on the device. `state` is donated.

    Args:
      tokens: (N,) ids on the device: the corpus. None where that is too large.
      windows: (K, B) int32 window starts, from `batches.chunk_starts`; without tokens the windows themselves,
        (K, B, T + 1), from `batches.gather`.

    Returns:
      The state K steps later and the K steps' metrics, each (K,).
    """

    def body(state: TrainState, windows: jax.Array) -> tuple[TrainState, Metrics]:
        batch = cut(windows) if tokens is None else take(tokens, windows, config.model.block_size)
        return train_step(config, state, batch)

    return jax.lax.scan(body, state, windows)


def loss_and_grads(
    config: Config, params: nn.Params, batch: Batch, dropout_key: jax.Array | None
) -> tuple[jax.Array, nn.Params]:
    """Mean loss over the batch and its gradient, in `accumulate` micro-batches one after another."""

    def loss(params: nn.Params, batch: Batch, key: jax.Array | None) -> jax.Array:
        return nn.losses(config.model, params, batch.inputs, batch.targets, key).mean()

    A = config.train.accumulate
    if A == 1:
        return jax.value_and_grad(loss)(params, batch, dropout_key)

    def add(total: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        micro_batch, i = item
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, micro_batch, key)), None

    micro_batches = jax.tree.map(lambda x: x.reshape(A, -1, *x.shape[1:]), batch)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (micro_batches, jnp.arange(A)))
    return jax.tree.map(lambda x: x / A, total)


def stream_key(config: Config, stream: int) -> jax.Array:
    """The key of one purpose (INIT, DROPOUT) for this config's seed."""
    return jax.random.fold_in(prng.key(config.train.seed), stream)
