"""The optimizer of a config: schedule, clipping, and AdamW or Muon, which decay by parameter path."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Config, off
from jaxgpt.model import Params
from jaxgpt.muon import scale_by_muon

DECAYED = ("kernel", "embedding")


def learning_rate(config: Config) -> optax.Schedule:
    """Step (0-based) to learning rate: linear warm-up to the peak, then the way down; constant after its end.

    The warm-up's first step is at learning_rate / (warmup_steps + 1), as in nanoGPT.
    """
    opt = config.optimizer
    peak, low, warmup = opt.learning_rate, opt.final_learning_rate, opt.warmup_steps
    length = (config.train.steps if off(opt.decay_steps) else opt.decay_steps) - warmup

    def after(n: Any) -> Any:
        """The rate `n` steps after the warm-up."""
        match opt.schedule:
            case "cosine":
                alpha = 0.0 if off(peak) else low / peak
                fallen = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(n, length).astype(jnp.float32) / length))
                return peak * ((1 - alpha) * fallen + alpha)
            case "linear":
                return (peak - low) * (1 - jnp.clip(n, 0, length) / length) + low
            case "constant":
                return peak

    def rate(step: Any) -> Any:
        if off(warmup):
            return after(step)
        first = peak / (warmup + 1)
        before = (first - peak) * (1 - jnp.clip(step, 0, warmup) / warmup) + peak
        return jnp.where(step < warmup, before, after(step - warmup))

    return rate


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: every leaf named kernel or embedding, no bias and no norm's scale.

    By name and not by `ndim`, so that stacked layers decay as separate ones do. For nanoGPT's model this is the same
    choice as its "two or more dimensions".
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW for a learning rate of 1: its updates are still to be scaled by
    -`learning_rate(config)` of the step, so that a step which is left out does not hold the schedule back.

    With "muon", the kernels inside blocks get Muon's updates instead, in proportion to `muon_learning_rate`.
    """
    opt = config.optimizer
    decay = optax.add_decayed_weights(opt.weight_decay, decay_mask)
    adamw = optax.chain(optax.scale_by_adam(opt.beta1, opt.beta2, opt.eps), decay)
    if opt.algorithm == "muon":
        muon = optax.chain(
            scale_by_muon(opt.muon_momentum, opt.muon_steps, config.model.precision),
            decay,
            optax.scale(opt.muon_learning_rate / opt.learning_rate),
        )
        adamw = optax.partition({"muon": muon, "adamw": adamw}, kinds)
    inner = adamw if off(opt.grad_clip) else optax.chain(optax.clip_by_global_norm(opt.grad_clip), adamw)

    def update(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its int32 count
            return inner.update(*args)

    return optax.GradientTransformation(inner.init, update)


def kinds(params: Params) -> Params:
    """ "muon" for the kernels inside blocks, "adamw" for all else: embeddings, the head, biases, scales."""

    def kind(path: tuple[Any, ...], leaf: jax.Array) -> str:
        block = path[0].key == "h" or path[0].key.startswith("h_")
        return "muon" if block and path[-1].key == "kernel" else "adamw"

    return jax.tree_util.tree_map_with_path(kind, params)
