"""Where the arrays of a run lie. The loop is the same for one device and for a mesh of them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from jaxgpt.config import Config
from jaxgpt.memory import WHOLE, Parts
from jaxgpt.step import TrainState, init_state, train_steps


class Placement(Protocol):
    """Devices, and what of a run lies on which of them."""

    @property
    def parts(self) -> Parts:
        """Into how many parts they split it."""

    @property
    def everywhere(self) -> Sharding:
        """Of what every device has whole."""

    @property
    def windows(self) -> Sharding:
        """Of the windows of some steps, (K, B, T + 1): a device has those of its part of the batch."""

    def shardings(self, state: Any) -> Any:
        """The sharding of each leaf of a train state, or of parameters."""

    def steps(self, config: Config) -> Any:
        """`train_steps`, jitted so that the state comes out where it went in."""

    def scope(self) -> AbstractContextManager[None]:
        """In the block, on its thread, functions are traced and called for these devices."""


class OneDevice:
    """The first device of this process."""

    parts = WHOLE

    @property
    def everywhere(self) -> Sharding:
        return SingleDeviceSharding(jax.local_devices()[0])

    @property
    def windows(self) -> Sharding:
        return self.everywhere

    def shardings(self, state: Any) -> Any:
        return jax.tree.map(lambda _: self.everywhere, state)

    def steps(self, config: Config) -> Any:
        return train_steps

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()


ONE_DEVICE = OneDevice()


def like(config: Config, placement: Placement) -> TrainState:
    """The shapes, dtypes and shardings of a state of `config`."""
    shapes = jax.eval_shape(init_state, config)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        placement.shardings(shapes),
    )


def fresh(config: Config, placement: Placement) -> TrainState:
    """The state at step 0, each part of it made where it lies."""
    shardings = placement.shardings(jax.eval_shape(init_state, config))
    return jax.jit(init_state, static_argnums=0, out_shardings=shardings)(config)
