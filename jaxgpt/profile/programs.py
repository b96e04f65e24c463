"""The four programs of training, forward, loss, gradient and step, and the FLOPs and bytes of each: by formula, in its
jaxpr, and by XLA's count."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.data import Batch
from jaxgpt.monitor.chips import flops_per_token
from jaxgpt.step import DROPOUT, init_state, loss_and_grads, stream_key, train_step


@dataclass(frozen=True)
class Program:
    """A jitted function of arrays with given shapes, compiled on first use."""

    jitted: Any
    shapes: tuple[Any, ...]
    formula_flops: int
    """Matmul FLOPs by `flops_per_token`."""

    @cached_property
    def traced(self) -> Any:
        return self.jitted.trace(*self.shapes)

    @cached_property
    def lowered(self) -> Any:
        return self.traced.lower()

    @cached_property
    def compiled(self) -> Any:
        return self.lowered.compile()

    @property
    def matmul_flops(self) -> int:
        return matmul_flops(self.traced.jaxpr.jaxpr)

    @property
    def bytes(self) -> int:
        """Compulsory memory traffic: arguments and results, once."""
        arrays = jax.tree.leaves((self.shapes, self.traced.out_info))
        return sum(x.size * x.dtype.itemsize for x in arrays)

    @property
    def text(self) -> str:
        """Optimised HLO."""
        return self.compiled.as_text() or ""


def programs(config: Config) -> dict[str, Program]:
    """The programs of `config`, its vocab_size known, by name; nothing is compiled yet."""
    B, T = config.train.batch_size, config.model.block_size
    state = jax.eval_shape(init_state, config)
    idx = jax.ShapeDtypeStruct((B, T), jnp.int32)
    forward = flops_per_token(config.model) * B * T

    def loss(params: model.Params, batch: Batch) -> jax.Array:
        return model.losses(config.model, params, batch.inputs, batch.targets).mean()

    def gradient(params: model.Params, batch: Batch) -> Any:
        key = stream_key(config.train.seed, DROPOUT) if config.model.dropout else None
        return loss_and_grads(config, params, batch, key)

    def program(function: Callable[..., Any], flops: int, *shapes: Any, **settings: Any) -> Program:
        return Program(jax.jit(function, **settings), shapes, flops)

    batch, params = Batch(idx, idx), state.params
    return {
        "forward": program(partial(model.forward, config.model), forward, params, idx),
        "loss": program(loss, forward, params, batch),
        "gradient": program(gradient, 3 * forward, params, batch),
        "step": program(partial(train_step, config), 3 * forward, state, batch, donate_argnums=0),
    }


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of the matmuls in a jaxpr: all iterations of a scan, the larger side of a branch, one turn of a loop.

    `jax.experimental.roofline` counts the body of a scan once.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = eqn.outvars[0].aval.size
            for axis in contracted:
                terms *= eqn.invars[0].aval.shape[axis]
            total += 2 * terms
            continue
        inner = [matmul_flops(each) for value in eqn.params.values() for each in _jaxprs(value)]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * (max(inner, default=0) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return [each for item in value for each in _jaxprs(item)] if isinstance(value, tuple | list) else []


def xla_counts(stage: Any) -> dict[str, float]:
    """The "flops", "bytes accessed" and "transcendentals" that XLA counts in a lowered or compiled function, if any."""
    found = stage.cost_analysis()
    found = found[0] if isinstance(found, list) and found else found
    names = ("flops", "bytes accessed", "transcendentals")
    return {name: float(found[name]) for name in names if name in found} if found else {}
