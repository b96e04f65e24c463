"""The training step compiled for devices that are not attached, and meshes ranked by estimate."""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgpt.cli.memory import compiled_bytes
from jaxgpt.cli.mesh import check, choose, divisors, problems
from jaxgpt.config import Config, replaced
from jaxgpt.config import problems as config_problems
from jaxgpt.data import DEVICE_TOKENS
from jaxgpt.loss import ABSENT_MEMORY
from jaxgpt.matmul import Precision
from jaxgpt.monitor.chips import Chip
from jaxgpt.plan.estimate import Step, estimate
from jaxgpt.plan.topology import PlanError
from jaxgpt.profile import hlo
from jaxgpt.sharding import Sizes, make_mesh, replicated
from jaxgpt.step import abstract_state, jax_settings, jit_train_steps

FOR_GPUS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Compiler options: no GPU times kernels, and matmuls are cuBLAS's, which XLA mostly finds to be the fastest."""


class TooLargeError(PlanError):
    """The compiler reports that a step does not fit in memory."""


class Plan(NamedTuple):
    """A step compiled for the chips of a topology."""

    step: Step
    compiled: Any
    kernels: set[str]  # names of the custom kernels in the program
    matmuls: list[str]  # input types, those of most FLOPs first, as in "bf16 x bf16"
    seconds_to_compile: float


def resolved(config: Config, precision: Precision = "bfloat16") -> Config:
    """`config` with the compute dtype that "auto" means on the chips."""
    return replaced(config, precision=precision) if config.model.precision == "auto" else config


def mesh(config: Config, chip: Chip | None, devices: list[Any], sizes: Sizes | None = None) -> Sizes:
    """`sizes`, checked; None for the mesh of "auto". Raises MeshError if an axis does not divide its dimension of the
    config, and PlanError if there are too few devices, or "auto" cannot use them all."""
    if sizes is None:
        sizes, why = choose(config, len(devices), int(chip.memory) if chip else None)
        if sizes.devices < len(devices):
            rank = ", or rank all meshes by --sweep" if chip else ""
            raise PlanError(f"{why}; or give another --batch-size or a --mesh{rank}")
    if sizes.devices > len(devices):
        raise PlanError(f"the mesh {sizes} needs {sizes.devices} devices, the topology has {len(devices)}")
    check(config, sizes)
    return sizes


def plan(config: Config, chip: Chip | None, devices: list[Any], sizes: Sizes) -> Plan:
    """Compile one step of a `resolved` config for `devices`, on a mesh that `mesh` has checked.

    Raises TooLargeError, with the compiler's message, if the step does not fit, and PlanError if the compiler fails for
    another reason, or reports no memory.
    """
    began = time.perf_counter()
    ABSENT_MEMORY.set(chip.allocated if chip else 0)
    compiled = compile_step(config, make_mesh(sizes, devices[: sizes.devices]))
    seconds = time.perf_counter() - began
    figures, text = compiled_bytes(compiled), compiled.as_text() or ""
    if figures is None:
        raise PlanError("the compiler reports no memory")
    network = estimate(config, chip, sizes).network if chip else 0.0
    step = Step(config, sizes, chip, *figures, hlo.collectives(text), network)
    types = dict.fromkeys(re.sub(r"\[[\d,]*\]", "", each.shapes) for each in hlo.matmuls(text))
    return Plan(step, compiled, hlo.custom_calls(text), list(types), seconds)


def compile_step(config: Config, mesh: Mesh) -> Any:
    """The training step compiled for the devices of a mesh, for CPUs and TPUs with the compiler's least effort: it
    takes a fifth of the time of training's effort, and hardly changes memory and communication. Raises as `plan`."""
    dtype = jnp.uint16 if config.model.vocab_size <= 2**16 else jnp.uint32
    tokens = jax.ShapeDtypeStruct((DEVICE_TOKENS,), dtype, sharding=replicated(mesh))
    starts = jax.ShapeDtypeStruct((1, config.train.batch_size), jnp.int32, sharding=replicated(mesh))
    # Programs for absent chips cannot be read back from the compile cache.
    with jax.set_mesh(mesh), jax_settings(jax_persistent_cache_min_compile_time_secs=math.inf):
        # The name of the option changed with jax 0.11.
        old = "jax_exec_time_optimization_effort" in jax.config.values
        options: dict[str, Any] = {"exec_time_optimization_effort": -1.0} if old else {"optimization_level": "O0"}
        if mesh.devices.flat[0].platform == "gpu":
            options = FOR_GPUS
        try:
            lowered = jit_train_steps(config, mesh).lower(abstract_state(config, mesh), tokens, starts)
            return lowered.compile(options)
        except Exception as error:
            why = str(error).splitlines()[0]
            if "RESOURCE_EXHAUSTED" in why:
                raise TooLargeError(why) from error
            raise PlanError(f"the compiler failed: {why}") from error


def ranked(config: Config, chip: Chip, n: int, sweep: bool = False) -> list[Step]:
    """The step on n chips with each mesh that divides it and each batch size, most tokens per second first, if
    communication is not overlapped; steps that do not fit come last.

    The batch size is the config's own or, in a `sweep`, a quarter to four times that; one that n does not divide is
    tried as it is and rounded up. Micro-batches are as few as fit. Raises PlanError as `require_pods`, or if no mesh is
    possible.
    """
    require_pods(chip, Sizes(data=n))
    B, found = config.train.batch_size, list[Step]()
    batches = [B * k // 4 for k in (1, 2, 4, 8, 16) if B * k % 4 == 0] if sweep else [B]
    meshes = [
        Sizes(n // context // tensor // fsdp, fsdp, tensor, context)
        for context in divisors(n)
        for tensor in divisors(n // context)
        for fsdp in divisors(n // context // tensor)
    ]
    for batch in sorted({size for one in batches for size in (one, math.ceil(one / n) * n)}):
        for sizes in meshes:
            step = None
            for accumulate in divisors(batch):
                changed = replaced(config, batch_size=batch, accumulate=accumulate)
                if sizes.data % chip.slices(n) or problems(changed, sizes) or config_problems(changed):
                    continue  # it cannot run
                step = estimate(changed, chip, sizes)
                if step.fits:
                    break
            found += [step] if step else []
    if not found:
        raise PlanError(f"no mesh of {n} chips divides this model, batch and context")
    return sorted(found, key=lambda step: (not step.fits, step.bounds[1] / step.config.train.batch_size))


def require_pods(chip: Chip, sizes: Sizes) -> None:
    """Raise a PlanError if a mesh cannot span as many pods of a chip as it needs."""
    n, pods = sizes.devices, chip.slices(sizes.devices)
    if pods > 1 and not chip.network_rate:
        raise PlanError(f"{n} chips exceed a pod of {chip.pod}, and the rate between pods of this chip is unknown")
    if sizes.data % pods:
        raise PlanError(
            f"{n} chips span {pods} pods of {chip.pod}: their number, and data, must be multiples of {pods}"
        )
