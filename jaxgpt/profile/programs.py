"""The four programs of training: forward, loss, gradient and step."""

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
    formula_flops: int  # of matmuls, by `chips.flops_per_token`

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
    def bytes(self) -> int:
        """Compulsory memory traffic: arguments and results, once."""
        arrays = jax.tree.leaves((self.shapes, self.traced.out_info))
        return sum(x.size * x.dtype.itemsize for x in arrays)

    @cached_property
    def text(self) -> str:
        """Optimised HLO."""
        return self.compiled.as_text() or ""


def programs(config: Config) -> dict[str, Program]:
    """The programs of `config`, its vocab_size known, by name; nothing is compiled yet."""
    B, T = config.train.batch_size, config.model.block_size
    state, idx = jax.eval_shape(init_state, config), jax.ShapeDtypeStruct((B, T), jnp.int32)
    forward = flops_per_token(config.model) * B * T

    def loss(params: model.Params, batch: Batch) -> jax.Array:
        return model.losses(config.model, params, batch.inputs, batch.targets).mean()

    def gradient(params: model.Params, batch: Batch) -> Any:
        key = stream_key(config.train.seed, DROPOUT) if config.model.dropout else None
        return loss_and_grads(config, params, batch, key)

    batch = Batch(idx, idx)
    return {
        "forward": Program(jax.jit(partial(model.forward, config.model)), (state.params, idx), forward),
        "loss": Program(jax.jit(loss), (state.params, batch), forward),
        "gradient": Program(jax.jit(gradient), (state.params, batch), 3 * forward),
        "step": Program(jax.jit(partial(train_step, config), donate_argnums=0), (state, batch), 3 * forward),
    }


def xla_counts(stage: Any) -> dict[str, float]:
    """Millions of "flops", "bytes accessed" and "transcendentals", as far as XLA counts them, of a lowered or compiled
    function."""
    found = stage.cost_analysis() or {}
    return {name: found[name] / 1e6 for name in ("flops", "bytes accessed", "transcendentals") if name in found}
