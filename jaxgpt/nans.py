"""Which operation made the first number that is none."""

from functools import partial

import jax
from jax.experimental import checkify

from jaxgpt.config import Config
from jaxgpt.data import cut, take
from jaxgpt.step import TrainState, train_step


def blame(config: Config, state: TrainState, tokens: jax.Array | None, windows: jax.Array) -> str:
    """The first of the steps on `windows`, as `train_steps` takes them, that cannot be applied, and the operation
    behind it.

    The steps are done again one by one from `state`, the one before them; the bad one is traced anew with a check
    behind every operation (`jax.experimental.checkify`).
    """
    step = jax.jit(partial(train_step, config))
    checked = jax.jit(checkify.checkify(partial(train_step, config), errors=checkify.float_checks))
    for row in windows:
        batch = cut(row) if tokens is None else take(tokens, row, config.model.block_size)
        after, metrics = step(state, batch)
        if not metrics.applied:
            error, _ = checked(state, batch)
            found = error.get() or "no operation by itself made a nan: perhaps the numbers grew beyond float32"
            return f"step {int(after.step)}: loss {metrics.loss}, gradient norm {metrics.grad_norm}: {found}"
        state = after
    return "a step came to no number in the compiled scan, and to one by itself: the numbers are at float32's edge"
