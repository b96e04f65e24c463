"""The four functions at the seams of training - forward, loss, gradient, step - and what each costs: on paper, as it is
traced, and by XLA's count."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt import cost
from jaxgpt import model as nn
from jaxgpt.config import Config
from jaxgpt.data import Batch
from jaxgpt.step import DROPOUT, init_state, loss_and_grads, stream_key, train_step

Count = dict[str, float]
"""`flops`, `bytes accessed`, `transcendentals`, as XLA names them."""


@dataclass(frozen=True)
class Seam:
    """A function of arrays with given shapes, compiled when it is first asked for."""

    name: str
    jitted: Any
    shapes: tuple[Any, ...]
    paper: int
    """Operations of its products, by `cost.flops_per_token`."""

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
    def products(self) -> int:
        """Operations of the products in its jaxpr."""
        return products(self.traced.jaxpr.jaxpr)

    @property
    def moved(self) -> int:
        """Bytes of its arguments and of its results: what must be moved at least."""
        out = jax.tree.leaves(self.traced.out_info)
        return sum(x.size * x.dtype.itemsize for x in [*jax.tree.leaves(self.shapes), *out])

    @property
    def text(self) -> str:
        """Optimised HLO."""
        return self.compiled.as_text() or ""


def seams(config: Config) -> dict[str, Seam]:
    """The seams of `config`, its vocab_size known, for a batch of its size; nothing is compiled yet."""
    B, T = config.train.batch_size, config.model.block_size
    state = jax.eval_shape(init_state, config)
    idx = jax.ShapeDtypeStruct((B, T), jnp.int32)
    forward = cost.flops_per_token(config.model) * B * T

    def loss(params: nn.Params, batch: Batch) -> jax.Array:
        return nn.losses(config.model, params, batch.inputs, batch.targets).mean()

    def gradient(params: nn.Params, batch: Batch) -> Any:
        key = stream_key(config, DROPOUT) if config.model.dropout else None
        return loss_and_grads(config, params, batch, key)

    def seam(function: Callable[..., Any], paper: int, *shapes: Any, **settings: Any) -> Seam:
        return Seam(function.__name__, jax.jit(function, **settings), shapes, paper)

    batch, params = Batch(idx, idx), state.params
    found = [
        seam(_named("forward", partial(nn.forward, config.model)), forward, params, idx),
        seam(loss, forward, params, batch),
        seam(gradient, 3 * forward, params, batch),
        seam(_named("step", partial(train_step, config)), 3 * forward, state, batch, donate_argnums=0),
    ]
    return {each.name: each for each in found}


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = name
    return call


def products(jaxpr: Any) -> int:
    """Operations of every product in a jaxpr, two for each term of each sum; a scan counts each of its turns, a branch
    the larger side, a loop of unknown length one turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = eqn.outvars[0].aval.size
            for axis in contracted:
                terms *= eqn.invars[0].aval.shape[axis]
            total += 2 * terms
            continue
        inner = [products(each) for value in eqn.params.values() for each in _jaxprs(value)]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * (max(inner, default=0) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return [each for item in value for each in _jaxprs(item)] if isinstance(value, tuple | list) else []


def xla(stage: Any) -> Count:
    """XLA's count of a lowered or a compiled function; empty where the backend gives none."""
    found = stage.cost_analysis()
    found = found[0] if isinstance(found, list) and found else found
    names = ("flops", "bytes accessed", "transcendentals")
    return {name: float(found[name]) for name in names if name in found} if found else {}
