"""Where each part of a model stands under the roof of this machine: operations, bytes, least time and measured time.

A part that does F operations on M bytes takes at least max(F / peak, M / bandwidth) (Williams, Waterman and Patterson,
"Roofline", 2009). Above F / M = peak / bandwidth, the ridge, products bound it; below, memory does.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import model as nn
from jaxgpt.config import Config
from jaxgpt.optimizer import make_optimizer
from jaxgpt.profile.parts import Part, parts
from jaxgpt.profile.seams import products, xla
from jaxgpt.step import init_state


class Machine(NamedTuple):
    """What a device can do at most."""

    flops: float  # operations of products per second
    bandwidth: float  # bytes per second

    @property
    def ridge(self) -> float:
        """Operations per byte from which on products are the limit."""
        return self.flops / self.bandwidth

    def least(self, work: "Work") -> float:
        """Seconds that `work` takes at least."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


class Work(NamedTuple):
    """One pass of a part, forward alone or with the backward pass."""

    part: str
    training: bool
    times: int
    """How often a step of one micro-batch does it."""
    flops: float
    """By XLA's count before it optimises, products and all else, or of the products alone where that is more: XLA does
    not look into a library's kernels."""
    products: int
    """Operations of the products alone."""
    bytes: int
    """Of its arguments and results, each moved once."""
    call: Callable[[], Any]
    """Runs it on zeros, compiled; returns before the device is done."""

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


def works(config: Config) -> list[Work]:
    """What a training step of one micro-batch consists of, part by part: each forward alone, and with its backward
    pass; then the optimizer. Nothing is compiled yet."""
    B = config.train.batch_size // config.train.accumulate
    found = []
    for part in parts(config.model, B):
        found += [_forward(part), _training(part)]
    return [*found, _optimizer(config)]


def measure(found: Sequence[Work], rounds: int = 5, seconds: float = 0.02) -> list[float]:
    """Seconds of each, the median of rounds in turn; in a round each is run for `seconds`, at least once."""
    for work in found:
        jax.block_until_ready(work.call())
    times: list[list[float]] = [[] for _ in found]
    for _ in range(rounds):
        for work, each in zip(found, times, strict=True):
            n, began = 0, time.perf_counter()
            while not n or time.perf_counter() - began < seconds:
                jax.block_until_ready(work.call())
                n += 1
            each.append((time.perf_counter() - began) / n)
    return [statistics.median(each) for each in times]


def _forward(part: Part) -> Work:
    return _work(part.name, False, part.times, part.function, (part.params, *part.inputs))


def _training(part: Part) -> Work:
    """Forward and backward: the result, and the gradient of all that is no id."""
    out = jax.eval_shape(part.function, part.params, *part.inputs)

    def both(cotangent: Any, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def function(*values: Any) -> Any:
            whole = list(leaves)
            for i, value in zip(floats, values, strict=True):
                whole[i] = value
            return part.function(*jax.tree.unflatten(tree, whole))

        result, back = jax.vjp(function, *(leaves[i] for i in floats))
        return result, back(cotangent)

    return _work(part.name, True, part.times, both, (out, part.params, *part.inputs))


def _optimizer(config: Config) -> Work:
    """Clipping, the optimizer and the sum, of all parameters, once a step."""
    state = jax.eval_shape(init_state, config)

    def update(params: nn.Params, opt_state: Any, grads: nn.Params) -> Any:
        updates, opt_state = make_optimizer(config).update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates), opt_state

    return _work("optimizer", True, 1, update, (state.params, state.opt_state, state.params))


def _work(name: str, training: bool, times: int, function: Callable[..., Any], shapes: Any) -> Work:
    traced = jax.jit(function).trace(*shapes)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((shapes, traced.out_info)))
    lowered, ours = traced.lower(), products(traced.jaxpr.jaxpr)
    theirs = sum(value for key, value in xla(lowered).items() if key != "bytes accessed")
    ready: list[Any] = []

    def call() -> Any:
        if not ready:
            ready.extend([lowered.compile(), jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)])
        compiled, arrays = ready
        return compiled(*arrays)

    return Work(name, training, times, max(float(ours), theirs), ours, moved, call)
