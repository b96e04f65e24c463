"""The training step compiled for devices that are not attached, and meshes ranked by estimate."""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgpt.cli.memory import compiled_bytes
from jaxgpt.cli.mesh import check, choose, divisors, problems
from jaxgpt.config import Config, UsageError, replaced
from jaxgpt.config import problems as config_problems
from jaxgpt.matmul import Precision
from jaxgpt.monitor.chips import CHIPS, Chip
from jaxgpt.plan.estimate import TOKENS, Step, estimate, flops, updated
from jaxgpt.profile import hlo
from jaxgpt.sharding import Sizes, make_mesh, replicated
from jaxgpt.step import abstract_state, jit_train_steps


class PlanError(UsageError):
    """A step cannot be planned."""


class TooLargeError(PlanError):
    """The compiler reports that a step does not fit in memory."""


class Plan(NamedTuple):
    """A step compiled for the chips of a topology."""

    step: Step
    kernels: set[str]  # names of the custom kernels in the program
    matmuls: Counter[str]  # input types of the matmuls outside of these kernels
    seconds_to_compile: float


def chip(name: str) -> Chip:
    """Raises:
    PlanError: no chip has that name.
    """
    if name not in CHIPS:
        raise PlanError(f"no chip {name!r}: expected one of {', '.join(CHIPS)}")
    return CHIPS[name]


def topology(name: str) -> tuple[Chip | None, list[Any]]:
    """The chip and the devices of "v5e:16x16", which need not be attached, or of "cpu:8", virtual devices.

    Raises:
      PlanError: the chip is unknown, no compiler for it is installed, or each chip is two devices.
    """
    kind, _, arrangement = name.partition(":")
    if kind == "cpu" and arrangement.isdecimal() and int(arrangement):
        return None, _virtual(int(arrangement))
    if kind not in CHIPS or not CHIPS[kind].torus:
        tpus = ", ".join(name for name, chip in CHIPS.items() if chip.torus and name != "v4")  # see below
        raise PlanError(
            f"--topology {name}: expected a TPU and its arrangement, as in v5e:16x16, of {tpus}, or cpu:8; GPUs are "
            "only estimated, --chips 8 --chip h100"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for Google's metadata server
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so no other process is disturbed
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **_host(arrangement))
    except Exception as error:
        hint = f"expected an arrangement as in {kind}:{'x'.join('4' * CHIPS[kind].torus)}"
        if importlib.util.find_spec("libtpu") is None:
            hint = "pip install 'jaxgpt[tpu]' brings the compiler"
        raise PlanError(f"--topology {name}: {error}; {hint}") from error
    devices: list[Any] = list(found.devices)
    chips = len({tuple(device.coords) for device in devices})
    if chips < len(devices):
        raise PlanError(
            f"--topology {name}: expected one device per chip, found {len(devices)} on {chips} chips; "
            f"{kind} can only be estimated, --chips {chips} --chip {kind}"
        )
    return CHIPS[kind], devices


def _host(arrangement: str) -> dict[str, Any]:
    """The compiler option for the chips per host: 2 x 2, or fewer in a smaller arrangement."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", arrangement):
        return {}
    x, y, *_ = map(int, arrangement.split("x"))
    return {"chips_per_host_bounds": (min(2, x), min(2, y), 1)}


def _virtual(n: int) -> list[Any]:
    with suppress(RuntimeError):  # JAX is already initialized
        jax.config.update("jax_num_cpu_devices", n)
    if len(jax.devices("cpu")) < n:
        raise PlanError(f"--topology cpu:{n}: there are {len(jax.devices('cpu'))} devices, JAX_NUM_CPU_DEVICES={n}")
    return jax.devices("cpu")[:n]


def resolved(config: Config, precision: Precision = "bfloat16") -> Config:
    """`config` with the compute dtype that "auto" means on the chips."""
    return replaced(config, precision=precision) if config.model.precision == "auto" else config


def mesh(config: Config, chip: Chip | None, devices: list[Any], sizes: Sizes | None = None) -> Sizes:
    """`sizes`, or the mesh of "auto" for None.

    Raises:
      MeshError: the mesh does not divide what it splits.
      PlanError: the mesh needs more devices than there are, or "auto" cannot use them all.
    """
    if sizes is None:
        sizes, why = choose(config, len(devices), int(chip.memory) if chip else None)
        if sizes.devices < len(devices):
            raise PlanError(f"{why}: give another --batch-size or a --mesh, or rank all meshes by --sweep")
    check(config, sizes)
    if sizes.devices > len(devices):
        raise PlanError(f"the mesh {sizes} needs {sizes.devices} devices, the topology has {len(devices)}")
    return sizes


def plan(config: Config, chip: Chip | None, devices: list[Any], sizes: Sizes) -> Plan:
    """Compile one step of `config` for `devices` and sizes that `mesh` has checked.

    Raises:
      TooLargeError, PlanError: as `compile_step`; or the compiler reports no memory.
    """
    config = resolved(config, "bfloat16" if chip else "float32")
    began = time.perf_counter()
    compiled = compile_step(config, make_mesh(sizes, devices[: sizes.devices]))
    return read(compiled, config, chip, sizes, time.perf_counter() - began)


def compile_step(config: Config, mesh: Mesh) -> Any:
    """The training step compiled for the devices of a mesh.

    The compiler is asked for the least effort: that takes a fifth of the time of training's, and memory and
    communication of the program hardly change.

    Raises:
      TooLargeError: the step does not fit, in the compiler's words.
      PlanError: the compiler fails for another reason.
    """
    dtype = jnp.uint16 if config.model.vocab_size <= 2**16 else jnp.uint32
    tokens = jax.ShapeDtypeStruct((TOKENS,), dtype, sharding=replicated(mesh))
    starts = jax.ShapeDtypeStruct((1, config.train.batch_size), jnp.int32, sharding=replicated(mesh))
    with jax.set_mesh(mesh):
        lowered = jit_train_steps(config, mesh).lower(abstract_state(config, mesh), tokens, starts)
        try:
            with _without_cache():
                # The name of the option changed with jax 0.11.
                old = "jax_exec_time_optimization_effort" in jax.config.values
                return lowered.compile({"exec_time_optimization_effort": -1.0} if old else {"optimization_level": "O0"})
        except Exception as error:
            why = str(error).splitlines()[0]
            if "RESOURCE_EXHAUSTED" in why:
                raise TooLargeError(why) from error
            raise PlanError(f"the compiler failed: {why}") from error


@contextmanager
def _without_cache() -> Iterator[None]:
    """Keep programs for absent chips out of the compile cache: they cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def read(compiled: Any, config: Config, chip: Chip | None, sizes: Sizes, seconds: float) -> Plan:
    """The figures of a compiled step."""
    figures, text = compiled_bytes(compiled), compiled.as_text() or ""
    if figures is None:
        raise PlanError("the compiler reports no memory")
    useful, computed = flops(config, sizes)
    sent, precision = hlo.collectives(text), config.model.precision
    step = Step(sizes, chip, *figures, useful, computed, updated(config, sizes), sent, precision=precision)
    return Plan(step, hlo.custom_calls(text), hlo.matmul_dtypes(text), seconds)


def ranked(config: Config, chip: Chip, n: int, batches: Sequence[int] = ()) -> list[tuple[Config, Step]]:
    """The config on n chips with each mesh that divides it and each batch size, most tokens per second first, if
    communication is not overlapped; steps that do not fit come last.

    A batch size that n does not divide is tried as it is and rounded up. Micro-batches are as few as fit.

    Args:
      batches: sequences per step; default: the config's own.

    Raises:
      PlanError: no mesh divides the config, or n chips exceed a pod and the rate between pods is unknown.
    """
    reachable(chip, n)
    B = config.train.batch_size
    found = []
    for batch in sorted({size for one in batches or (B,) for size in (one, -(-one // n) * n)}):
        for sizes in meshes(n):
            tried = None
            for accumulate in divisors(batch):
                changed = replaced(config, batch_size=batch, accumulate=accumulate)
                if possible(changed, chip, sizes):
                    tried = changed, estimate(changed, chip, sizes)
                    if tried[1].fits:
                        break
            found += [tried] if tried else []
    if not found:
        raise PlanError(f"no mesh of {n} chips divides the model and {B} sequences: try --batch-size {n}")
    return sorted(found, key=lambda item: (not item[1].fits, item[1].bounds[1] / item[0].train.batch_size))


def batches(config: Config) -> list[int]:
    """The batch sizes of a sweep: a quarter, half, once, twice and four times the config's, if whole."""
    return [config.train.batch_size * k // 4 for k in (1, 2, 4, 8, 16) if config.train.batch_size * k % 4 == 0]


def possible(config: Config, chip: Chip, sizes: Sizes) -> bool:
    """Whether a config can run on a mesh of such chips, memory aside."""
    if sizes.data % chip.slices(sizes.devices) or problems(config, sizes) or config_problems(config):
        return False
    return sizes.devices <= chip.pod or bool(chip.network_rate)


def estimated(config: Config, chip: Chip, sizes: Sizes, chips: Sequence[int]) -> Step:
    """The step on a given mesh.

    Raises:
      MeshError: the mesh does not divide the config.
      PlanError: `chips` is not the size of the mesh, or the pods do not divide its data axis.
    """
    check(config, sizes)
    if list(chips) != [sizes.devices]:
        raise PlanError(f"the mesh {sizes} has {sizes.devices} chips: give --chips {sizes.devices}")
    reachable(chip, sizes.devices)
    if sizes.data % (slices := chip.slices(sizes.devices)):
        raise PlanError(f"the mesh {sizes} spans {slices} pods of {chip.pod}: data must be a multiple of {slices}")
    return estimate(config, chip, sizes)


def reachable(chip: Chip, n: int) -> None:
    """Raises:
    PlanError: n chips are more than a pod, and the rate between pods is unknown.
    """
    if n > chip.pod and not chip.network_rate:
        raise PlanError(
            f"{n} chips are more than the {chip.pod} of a pod, and the rate between pods of this chip is unknown"
        )


def meshes(n: int) -> Iterator[Sizes]:
    """All meshes of n devices."""
    for context in divisors(n):
        for tensor in divisors(n // context):
            for fsdp in divisors(n // context // tensor):
                yield Sizes(n // context // tensor // fsdp, fsdp, tensor, context)
