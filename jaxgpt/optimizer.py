"""The optimizer: learning-rate schedule, clipping, and AdamW or Muon with decoupled weight decay."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt.config import Config
from jaxgpt.matmul import Precision, matmul, transposed
from jaxgpt.model import Params
from jaxgpt.sharding import platform

DECAYED = ("kernel", "embedding")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that moves singular values from (0, 1] to about 1 (Jordan et al. 2024)."""


class Hyperparameters(NamedTuple):
    """The settings of a training step that may be traced: numbers in a run, arrays of shape () in a sweep.

    The config is static. It decides what a value of 0 turns off (learning_rate, warmup_steps, grad_clip, dropout), so a
    traced value must be 0 exactly if the config's is.
    """

    learning_rate: Any
    min_learning_rate: Any  # at the end of the schedule
    warmup_steps: Any
    decay_steps: Any  # the step at which the schedule ends
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    grad_clip: Any
    muon_learning_rate: Any
    muon_momentum: Any
    dropout: Any
    init_scale: Any
    seed: Any


def hyperparameters(config: Config) -> Hyperparameters:
    """The hyperparameters of a config: Python numbers, and the seed as uint32."""
    values = vars(config.optimizer) | vars(config.model) | vars(config.train)
    values["min_learning_rate"] = config.optimizer.final_learning_rate
    values["decay_steps"] = config.optimizer.decay_steps or config.train.steps
    values["seed"] = np.uint32(config.train.seed)  # an int of 2**31 or more could not be traced
    return Hyperparameters(**{name: values[name] for name in Hyperparameters._fields})


def learning_rate(config: Config, hyper: Hyperparameters | None = None) -> optax.Schedule:
    """Step (0-based) -> learning rate: linear warm-up to the peak, then the decay schedule; constant after its end.

    The warm-up starts at learning_rate / (warmup_steps + 1), as in nanoGPT.
    """
    hyper = hyper or hyperparameters(config)
    peak, low, warmup = hyper.learning_rate, hyper.min_learning_rate, hyper.warmup_steps
    length = hyper.decay_steps - warmup

    def decayed(n: Any) -> Any:
        """The learning rate `n` steps after the warm-up."""
        match config.optimizer.schedule:
            case "cosine":
                alpha = low / peak if config.optimizer.learning_rate else 0.0
                cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(n, length).astype(jnp.float32) / length))
                return peak * ((1 - alpha) * cosine + alpha)
            case "linear":
                return jnp.where(n < length, (peak - low) * (1 - jnp.clip(n, 0, length) / length) + low, low)
            case "constant":
                return peak

    def rate(step: Any) -> Any:
        if not config.optimizer.warmup_steps:
            return decayed(step)
        first = peak / (warmup + 1)
        rising = (first - peak) * (1 - jnp.clip(step, 0, warmup) / warmup) + peak
        return jnp.where(step < warmup, rising, decayed(step - warmup))

    return rate


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: kernels and embeddings, not biases and norm scales.

    By name, not by `ndim` as in nanoGPT, so that stacked layers decay like separate ones.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_optimizer(config: Config, hyper: Hyperparameters | None = None) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW, or Muon for the kernels inside blocks and AdamW for the rest.

    `update(grads, state, params, applied=...)`: if `applied` (() bool) is False, the state is returned unchanged and
    the updates are meaningless. Updates are not yet scaled: the caller multiplies them by
    -`learning_rate(config)(step)`, so that the schedule also advances in steps that are not applied. Muon's are scaled
    by muon_learning_rate / learning_rate.
    """
    opt, hyper = config.optimizer, hyper or hyperparameters(config)
    decay = optax.add_decayed_weights(hyper.weight_decay, decay_mask)
    optimizer = optax.chain(scale_by_adam(hyper.beta1, hyper.beta2, hyper.eps), decay)
    if opt.algorithm == "muon":
        muon = optax.chain(
            scale_by_muon(hyper.muon_momentum, opt.muon_steps, config.model.precision),
            decay,
            optax.scale(hyper.muon_learning_rate / hyper.learning_rate),
        )
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, optimizer_labels)
    if opt.grad_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(hyper.grad_clip), optimizer)
    return optimizer


def scale_by_adam(beta1: Any, beta2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` gated by `applied`, in one pass over gradients and moments: without the barrier, XLA would
    compute the moments twice, for the state and for the update."""

    def update(grads: optax.Updates, state: Any, params: Any = None, *, applied: Any = True, **_: Any) -> Any:
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: jnp.where(applied, beta1 * m + (1 - beta1) * g, m), state.mu, grads)
        nu = jax.tree.map(lambda v, g: jnp.where(applied, beta2 * v + (1 - beta2) * (g * g), v), state.nu, grads)
        if platform() == "cpu":
            mu, nu = jax.lax.optimization_barrier((mu, nu))
        scale_mu, scale_nu = 1 / (1 - beta1**t), 1 / (1 - beta2**t)
        updates = jax.tree.map(lambda m, v: m * scale_mu / (root(v * scale_nu) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(jnp.where(applied, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def root(x: jax.Array) -> jax.Array:
    """The square root, 1e-18 at 0, where its derivative must be finite to differentiate through training."""
    return jnp.sqrt(jnp.maximum(x, 1e-36))


def optimizer_labels(params: Params) -> Params:
    """ "muon" for kernels inside blocks, "adamw" for embeddings, the head, biases and norm scales."""

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        in_block = path[0].key.split("_")[0] == "h"  # h_0, h_1, ..., or h if they are stacked
        return "muon" if in_block and path[-1].key == "kernel" else "adamw"

    return jax.tree.map_with_path(label, params)


class MuonState(NamedTuple):
    momentum: optax.Updates  # as the parameters


def scale_by_muon(momentum: Any, n_steps: int, precision: Precision) -> optax.GradientTransformationExtraArgs:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), gated by `applied`: Nesterov momentum,
    orthogonalized.

    Updates (..., K, N) have orthonormal rows or columns, up to the error of `n_steps` Newton-Schulz iterations, times
    sqrt(max(1, N / K)). Kernels are (in, out) here, but (out, in) on that page.

    Matmuls are in the compute dtype and equal shapes are batched: on 2 CPU cores, a step of a one-layer GPT takes 16.6
    ms, 22.5 with `optax.contrib.scale_by_muon`, in bfloat16; 25.0 and 27.9 in float32 (minimum of 12 rounds).
    """

    def update(updates: optax.Updates, state: Any, params: Any = None, *, applied: Any = True, **_: Any) -> Any:
        def average(mean: optax.Updates) -> optax.Updates:
            return jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mean, updates)

        mean = average(state.momentum)
        leaves, tree = jax.tree.flatten(average(mean))
        directions = orthogonal_by_shape(leaves, n_steps, precision)
        scaled = [x * max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5 for x in directions]
        kept = jax.tree.map(partial(jnp.where, applied), mean, state.momentum)
        return jax.tree.unflatten(tree, scaled), MuonState(kept)

    return optax.GradientTransformationExtraArgs(lambda params: MuonState(optax.tree.zeros_like(params)), update)


def orthogonal_by_shape(matrices: list[jax.Array], n_steps: int, precision: Precision) -> list[jax.Array]:
    """`orthogonal` of matrices (K, N) or stacks (n, K, N). Equal shapes, up to transposition, form one batch."""
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in matrices]
    for shape in dict.fromkeys(x.shape[-2:] for x in wide):
        members = [i for i, x in enumerate(wide) if x.shape[-2:] == shape]
        stacks = [wide[i].reshape(-1, *shape) for i in members]
        batch = orthogonal(jnp.concatenate(stacks), n_steps, precision)
        pieces = jnp.split(batch, np.cumsum([len(x) for x in stacks])[:-1])
        for i, piece in zip(members, pieces, strict=True):
            wide[i] = piece.reshape(wide[i].shape)
    return [y if y.shape == x.shape else y.mT for x, y in zip(matrices, wide, strict=True)]


def orthogonal(x: jax.Array, n_steps: int, precision: Precision) -> jax.Array:
    """Roughly the nearest matrices with orthonormal rows to (n, rows, columns), rows <= columns: singular values end
    between about 0.7 and 1.2. Newton-Schulz: X <- a X + (b A + c A²) X with A = X Xᵀ, from X of Frobenius norm 1."""
    a, b, c = NEWTON_SCHULZ
    x = x / (root(jnp.sum(x * x, axis=(1, 2), keepdims=True)) + 1e-7)
    for _ in range(n_steps):
        A = matmul(x, transposed(x), precision=precision)
        x = a * x + matmul(b * A + c * matmul(A, A, precision=precision), x, precision=precision)
    return x
