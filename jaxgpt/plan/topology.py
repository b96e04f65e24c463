"""Devices that are not attached: TPUs and GPUs for which a compiler is installed, and virtual CPU devices."""

import importlib.util
import os
import re
from contextlib import suppress
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxgpt.config import UsageError
from jaxgpt.monitor.chips import CHIPS, Chip

TPUS = ("v5e", "v5p", "v6e")
"""They are one device each; a v4 is two."""
MOST_VIRTUAL = 1024
"""More virtual devices are taken for a typo: JAX takes a minute of processor time to make 8,192."""


class Gpu(NamedTuple):
    """What XLA's compiler asks of a GPU, besides the rates of its `Chip`."""

    capability: int  # compute capability, major
    processors: int  # streaming multiprocessors
    shared: int  # KiB of shared memory of each, of which a block of threads may use one less
    cache: int  # MiB of L2 cache
    clock: float  # GHz


GPUS = {
    "a100": Gpu(8, 108, 164, 40, 1.41),
    "h100": Gpu(9, 132, 228, 50, 1.98),
    "h200": Gpu(9, 132, 228, 50, 1.98),
    "b200": Gpu(10, 148, 228, 126, 1.965),
}
"""Sources: the compute capabilities in NVIDIA's CUDA C++ Programming Guide, and its white papers of these GPUs."""


class PlanError(UsageError):
    """A step cannot be planned."""


def topology(name: str) -> tuple[Chip | None, list[Any]]:
    """The chip and the devices of "v5e:16x16" or "h100:8", which need not be attached, or of "cpu:8", virtual devices.
    Raises PlanError if the chip is none of `TPUS` and `GPUS`, or the compiler is not installed or refuses it."""
    kind, _, arrangement = name.partition(":")
    n = int(arrangement) if arrangement.isdecimal() else 0
    if kind == "cpu" and 1 <= n <= MOST_VIRTUAL:
        with suppress(RuntimeError):  # JAX is already initialized
            jax.config.update("jax_num_cpu_devices", n)
        if len(devices := jax.devices("cpu")) < n:
            raise PlanError(f"--topology {name}: there are {len(devices)} devices; set JAX_NUM_CPU_DEVICES={n}")
        return None, devices[:n]
    if kind in GPUS and n:
        described, expected, extra = _gpus(kind, n), f"{kind}:8", "cuda"
    elif kind in TPUS:
        described, expected, extra = _tpus(name, arrangement), f"{kind}:{'x'.join('4' * CHIPS[kind].torus)}", "tpu"
    else:
        raise PlanError(
            f"--topology {name}: expected a TPU ({', '.join(TPUS)}) and its arrangement, as in v5e:16x16, a GPU "
            f"({', '.join(GPUS)}) and their number, as in h100:8, or cpu:8, up to cpu:{MOST_VIRTUAL}; others can only "
            "be estimated, --chips 8 --chip v4"
        )
    try:
        return CHIPS[kind], list(topologies.get_topology_desc(**described).devices)
    except Exception as error:
        hint = f"expected an arrangement as in {expected}"
        if importlib.util.find_spec({"tpu": "libtpu", "cuda": "jax_plugins"}[extra]) is None:
            hint = f"pip install 'jaxgpt[{extra}]' brings the compiler"
        raise PlanError(f"--topology {name}: {error}; {hint}") from error


def _tpus(name: str, arrangement: str) -> dict[str, Any]:
    """The description of TPUs, with their number per host: 2 x 2, or fewer in a smaller arrangement."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for Google's metadata server
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so no other process is disturbed
    described = {"platform": "tpu", "topology_name": name}
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", arrangement):
        return described
    x, y, *_ = map(int, arrangement.split("x"))
    return described | {"chips_per_host_bounds": (min(2, x), min(2, y), 1)}


def _gpus(kind: str, n: int) -> dict[str, Any]:
    """The description of n GPUs, in machines as large as a pod of the chip."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # do not look for a driver
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # XLA warns that a kernel for sorting is not measured
    chip, gpu = CHIPS[kind], GPUS[kind]
    machine = min(n, chip.pod)
    if n % machine:
        raise PlanError(f"--topology {kind}:{n}: expected up to {machine} GPUs, or whole machines of {machine}")
    target = f"""
        platform_name: "CUDA"  device_description_str: "NVIDIA {kind.upper()}"
        dnn_version_info {{ major: 9 minor: 8 }}  runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
            cuda_compute_capability {{ major: {gpu.capability} }}  core_count: {gpu.processors}
            device_memory_size: {int(chip.memory)}  memory_bandwidth: {int(chip.memory_rate)}
            l2_cache_size: {gpu.cache * 2**20}  clock_rate_ghz: {gpu.clock}
            shared_memory_per_core: {gpu.shared * 2**10}  shared_memory_per_block: {48 * 2**10}
            shared_memory_per_block_optin: {(gpu.shared - 1) * 2**10}
            threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
            fpus_per_core: {64 if gpu.capability == 8 else 128}
            registers_per_core_limit: 65536  registers_per_block_limit: 65536
            block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
        }}"""
    arrangement = f"1x{-(-n // machine)}x{machine}"
    return {"platform": "cuda", "topology_name": "", "target_config": target, "topology": arrangement}
