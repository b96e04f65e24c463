"""What a training step would need on devices that are not attached: the real step, compiled for them here."""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt.config import Config, UsageError
from jaxgpt.matmul import Precision
from jaxgpt.memory import compiled_bytes
from jaxgpt.mesh import Placement, Sizes, check, choose
from jaxgpt.monitor.chips import CHIPS, Chip
from jaxgpt.placement import like
from jaxgpt.plan import estimate
from jaxgpt.plan.estimate import Step
from jaxgpt.profile import hlo

Effort = Literal["least", "full"]


class PlanError(UsageError):
    """A plan cannot be made."""


class TooLargeError(PlanError):
    """The compiler finds that a step does not fit."""


@dataclass(frozen=True)
class Plan:
    """A step as it was compiled for the chips of a topology."""

    step: Step
    kernels: list[str]
    """Custom kernels in the program."""
    products: Counter[str]
    """Types of the operands of its products, outside of these kernels."""
    seconds_to_compile: float


def chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
      PlanError: there is none.
    """
    if name not in CHIPS:
        raise PlanError(f"no chip {name!r}: expected one of {', '.join(CHIPS)}")
    return CHIPS[name]


def topology(name: str) -> tuple[Chip | None, list[Any]]:
    """The chip and the devices of "v5e:16x16", which need not be attached, or of "cpu:8", virtual ones of this machine
    (as many as the first use of JAX in this process made).

    Raises:
      PlanError: it is no known chip, nothing here compiles for it, or its chips are two devices each.
    """
    kind, _, arrangement = name.partition(":")
    if kind == "cpu" and arrangement.isdecimal() and int(arrangement):
        return None, _virtual(int(arrangement))
    if kind not in CHIPS or not CHIPS[kind].torus:
        tpus = ", ".join(name for name, chip in CHIPS.items() if chip.torus and name != "v4")  # see below
        raise PlanError(
            f"--topology {name}: expected a TPU and its arrangement, as in v5e:16x16, of {tpus}, or cpu:8; GPUs are "
            "planned on paper only, --chips 8 --chip h100"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this is no machine of Google's
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used that another process could want
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **_host(arrangement))
    except Exception as error:
        hint = f"expected an arrangement as in {kind}:{'x'.join('4' * CHIPS[kind].torus)}"
        if importlib.util.find_spec("libtpu") is None:
            hint = "pip install 'jaxgpt[tpu-plan]' brings the compiler"
        raise PlanError(f"--topology {name}: {error}; {hint}") from error
    devices: list[Any] = list(found.devices)
    chips = len({tuple(device.coords) for device in devices})
    if chips < len(devices):
        raise PlanError(
            f"--topology {name}: expected one device a chip, found {len(devices)} of {chips} chips, of which JAX makes "
            f"no mesh; {kind} is planned on paper only, --chips {chips} --chip {kind}"
        )
    return CHIPS[kind], devices


def _host(arrangement: str) -> dict[str, Any]:
    """What the compiler has to know of the chips of a host: they are 2 x 2, or fewer where there are no more."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", arrangement):
        return {}
    x, y, *_ = map(int, arrangement.split("x"))
    return {"chips_per_host_bounds": (min(2, x), min(2, y), 1)}


def _virtual(n: int) -> list[Any]:
    with suppress(RuntimeError):  # JAX has begun
        jax.config.update("jax_num_cpu_devices", n)
    if len(jax.devices("cpu")) < n:
        raise PlanError(f"--topology cpu:{n}: there are {len(jax.devices('cpu'))} devices, JAX_NUM_CPU_DEVICES={n}")
    return jax.devices("cpu")[:n]


def resolved(config: Config, precision: Precision = "bfloat16") -> Config:
    """`config` with what "auto" means on the chips."""
    if config.model.precision != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))


def mesh(config: Config, chip: Chip | None, devices: list[Any], sizes: Sizes | None = None) -> Sizes:
    """`sizes`, or those that "auto" is, for a config whose vocabulary is known.

    Raises:
      MeshError: the mesh does not divide what it splits.
      PlanError: it wants more devices than there are, or "auto" cannot use them all.
    """
    if sizes is None:
        sizes, why = choose(config, len(devices), int(chip.memory) if chip else None)
        if sizes.devices < len(devices):
            raise PlanError(f"{why}: say another --batch-size or a --mesh, or let --sweep rank them all")
    check(config, sizes)
    if sizes.devices > len(devices):
        raise PlanError(f"the mesh {sizes} wants {sizes.devices} devices, the topology has {len(devices)}")
    return sizes


def plan(config: Config, chip: Chip | None, devices: list[Any], sizes: Sizes, effort: Effort = "least") -> Plan:
    """Compile one step of `config`, its vocabulary known, for `devices` and a mesh that `mesh` has checked.

    Raises:
      TooLargeError, PlanError: the compiler refuses.
    """
    config = resolved(config, "bfloat16" if chip else "float32")
    began = time.perf_counter()
    compiled = compile_step(config, Placement(sizes, tuple(devices[: sizes.devices])), effort)
    return read(compiled, config, chip, sizes, time.perf_counter() - began)


def compile_step(config: Config, placement: Placement, effort: Effort = "least") -> Any:
    """The training step, one at a time, compiled for the devices of a placement.

    Args:
      effort: of the compiler to make it fast, "full" as in training. By "least" it takes a fifth of the time; what the
        program holds and sends hardly changes.

    Raises:
      TooLargeError: it does not fit, in the compiler's words.
      PlanError: the compiler refuses for another reason.
    """
    dtype = jnp.uint16 if config.model.vocab_size <= 2**16 else jnp.uint32
    tokens = jax.ShapeDtypeStruct((estimate.TOKENS,), dtype, sharding=placement.everywhere)
    starts = jax.ShapeDtypeStruct((1, config.train.batch_size), jnp.int32, sharding=placement.everywhere)
    with placement.scope():
        lowered = placement.steps(config).lower(config, like(config, placement), tokens, starts)
        try:
            with _not_kept():
                return lowered.compile({"exec_time_optimization_effort": -1.0} if effort == "least" else None)
        except Exception as error:
            why = str(error).splitlines()[0]
            if "RESOURCE_EXHAUSTED" in why:
                raise TooLargeError(why) from error
            raise PlanError(f"the compiler refuses: {why}") from error


@contextmanager
def _not_kept() -> Iterator[None]:
    """What is compiled in the block goes to no cache: a program for chips that are not here cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def read(compiled: Any, config: Config, chip: Chip | None, sizes: Sizes, seconds: float) -> Plan:
    """What a compiled step says of itself.

    Raises:
      PlanError: its compiler gives no figures.
    """
    figures = compiled_bytes(compiled)
    if figures is None:
        raise PlanError("the compiler gives no figures of memory")
    text = compiled.as_text() or ""
    flops, computed = estimate.operations(config, sizes)
    step = Step(
        sizes,
        chip,
        *figures,
        flops=flops,
        computed=computed,
        updated=estimate.updated(config, sizes),
        collectives=hlo.collectives(text),
        precision=config.model.precision,
    )
    return Plan(step, sorted(hlo.custom_calls(text)), hlo.matmul_dtypes(text), seconds)
