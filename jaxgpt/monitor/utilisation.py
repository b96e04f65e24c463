"""The share of what devices can do at most that training comes to, where their makers say what that is."""

from collections.abc import Callable

import jax

from jaxgpt import cost
from jaxgpt.config import Config
from jaxgpt.monitor import chips


def peak(device_kind: str, n_devices: int) -> float | None:
    """Published bfloat16 products per second of so many devices, None where they are not known."""
    chip = chips.of_kind(device_kind)
    return chip.flops * n_devices if chip else None


def utilisation(config: Config, tokens_per_second: float, peak: float) -> float:
    """Share of `peak` that training needs at that speed: three times `cost.flops_per_token` a token."""
    return 3 * cost.flops_per_token(config.model) * tokens_per_second / peak


def rate(config: Config) -> Callable[[float], float] | None:
    """Tokens per second to `utilisation` of the devices here, None where their peak is not known."""
    most = peak(jax.devices()[0].device_kind, jax.device_count())
    return (lambda speed: utilisation(config, speed, most)) if most else None
