"""What a training step would need on devices that are not attached: the real step, compiled for them here."""

import dataclasses
import os
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import Config, UsageError
from jaxgpt.nn import cost
from jaxgpt.scaling import hlo
from jaxgpt.scaling.chips import CHIPS, Chip
from jaxgpt.scaling.mesh import Placement, Sizes, check, choose
from jaxgpt.training.memory import compiled_bytes
from jaxgpt.training.placement import like

TOKENS = 2**28
"""Of the corpus on each device, as in training (`loop.DEVICE_TOKENS`)."""


class PlanError(UsageError):
    """A plan cannot be made."""


@dataclass(frozen=True)
class Plan:
    """A step on one of the chips of a topology, as it was compiled; bytes, and seconds by published rates."""

    sizes: Sizes
    chip: Chip
    arguments: int
    """Parameters, moments, tokens."""
    temporaries: int
    flops: float
    """Of the products of a step, forward and backward, on paper (`cost.flops_per_token`), a chip's share."""
    collectives: dict[str, tuple[int, int]]
    """Kind to how many and the bytes of their results, a step."""
    kernels: list[str]
    """Custom kernels in the program."""
    seconds_to_compile: float

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return self.memory <= self.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """What takes how long at the published rate: products; sending between chips."""
        twice = {"all-reduce": 2}
        sent = sum(twice.get(kind, 1) * size for kind, (_, size) in self.collectives.items())
        return {"products": self.flops / self.chip.flops, "sending": sent / self.chip.link_rate}

    @property
    def utilisation(self) -> tuple[float, float]:
        """Of the chip's products: where nothing that is sent hides behind products, and where all does."""
        products, sending = self.seconds["products"], self.seconds["sending"]
        return products / (products + sending), products / max(products, sending)


def topology(name: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of "v5e:16x16", which need not be attached.

    Raises:
      PlanError: it is no known chip, or nothing here compiles for it.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise PlanError(
            f"--topology {name}: expected a chip and its arrangement, as in v5e:16x16, of {', '.join(CHIPS)}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this is no machine of Google's
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise PlanError(f"--topology {name}: {error}; pip install 'jaxgpt[tpu-plan]' brings the compiler") from error
    return CHIPS[kind], list(found.devices)


def plan(config: Config, chip: Chip, devices: list[Any], sizes: Sizes | None = None) -> Plan:
    """Compile one step of `config`, its vocabulary known, for `devices`.

    Raises:
      MeshError: the mesh does not divide what it splits.
      PlanError: the compiler refuses.
    """
    if config.model.precision == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision="bfloat16"))
    if sizes is None:
        sizes, _ = choose(config, len(devices), int(chip.memory))
    check(config, sizes)
    if sizes.devices > len(devices):
        raise PlanError(f"the mesh {sizes} wants {sizes.devices} devices, the topology has {len(devices)}")
    placement = Placement(sizes, tuple(devices[: sizes.devices]))
    dtype = jnp.uint16 if config.model.vocab_size <= 2**16 else jnp.uint32
    tokens = jax.ShapeDtypeStruct((TOKENS,), dtype, sharding=placement.everywhere)
    starts = jax.ShapeDtypeStruct((1, config.train.batch_size), jnp.int32, sharding=placement.everywhere)
    began = time.perf_counter()
    with placement.scope():
        lowered = placement.steps(config).lower(config, like(config, placement), tokens, starts)
        try:
            compiled = lowered.compile()
        except Exception as error:
            raise PlanError(f"the compiler refuses: {str(error).splitlines()[0]}") from error
    seconds = time.perf_counter() - began
    figures = compiled_bytes(compiled)
    if figures is None:
        raise PlanError("the compiler gives no figures of memory")
    text = compiled.as_text() or ""
    n_tokens = config.train.batch_size * config.model.block_size
    return Plan(
        sizes,
        chip,
        *figures,
        flops=3 * cost.flops_per_token(config.model) * n_tokens / sizes.devices,
        collectives=hlo.collectives(text),
        kernels=sorted(hlo.custom_calls(text)),
        seconds_to_compile=seconds,
    )
