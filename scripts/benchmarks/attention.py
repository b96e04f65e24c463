"""The attention kernels of a device: time, error and repeatability."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxgpt import kernels, prng, sharding
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.profile.report import Report
from jaxgpt.profile.timing import Series, series
from scripts.benchmarks.contest import WorkerError, alternate
from scripts.benchmarks.machine import facts
from scripts.benchmarks.shapes import Device, config_of

FUSED = {"cudnn": "gpu", "flash": "gpu", "splash": "tpu"}
"""Kernel -> the only device that it runs on."""
NOTES = (
    "ms: forward and backward in bfloat16, median of the rounds (least to greatest)",
    "error: largest difference from the reference in float32, of the output and the three gradients, as a share of "
    "the largest entry",
    "repeatable: each round had the same bits",
)


def attention(
    device: Device = "cpu", shapes: tuple[str, ...] = ("baby", "small"), dropout: float = 0.2, rounds: int = 5
) -> Report:
    """The attention kernels of jaxgpt: time forward and backward, error, and whether results are repeatable.

    Args:
      device: where to compute
      shapes: models, by name
      dropout: of the weights, in half of the rows
      rounds: measurements of each kernel, in turn
    """
    if (found := sharding.platform()) != device:
        raise UsageError(f"JAX's default device is a {found}, not a {device}: choose with --device or JAX_PLATFORMS")
    report: Report = {"mode": "attention", "facts": facts(device), "notes": NOTES, "failed": {}, "tables": []}
    for shape in shapes:
        config = config_of(shape, device, precision="bfloat16")
        B, H, T = config.train.batch_size, config.model.n_head, config.model.block_size
        given = jax.random.normal(jax.random.key(0), (4, B, H, T, config.model.n_embd // H)).astype(jnp.bfloat16)
        cases = {
            f"{used}, {shape}, dropout {rate}": (used, rate)
            for rate in (0.0, dropout)
            for used in get_args(kernels.Kernel)
            if FUSED.get(used, device) == device and not (rate and used == "cudnn")
        }
        calls = {case: compiled(config.model, used, rate) for case, (used, rate) in cases.items()}
        results, failed = measured(calls, given, rounds)
        rows, float32 = [], replace(config.model, precision="float32")
        for case, (out, ms, same) in results.items():
            used, rate = cases[case]
            exact = compiled(float32, "reference", rate)(*given)
            row = {"kernel": used, "dropout": rate, "ms": ms, "error": f"{error(out, exact):.4f}"}
            rows.append(row | {"repeatable": same})
        report["tables"].append({"title": f"{shape}, batch {B}", "rows": rows})
        report["failed"] |= failed
    return report


def compiled(config: ModelConfig, used: kernels.Kernel, rate: float) -> Callable[..., Any]:
    """(q, k, v, g) -> the output and the three gradients for its cotangent g."""
    drop = prng.Drop(prng.key(1), 1 - rate) if rate else None

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, vjp = jax.vjp(partial(kernels.causal_attention, config, drop=drop, used=used), q, k, v)
        return out, *vjp(g.astype(out.dtype))

    return jax.jit(run)


def measured(
    calls: dict[str, Callable[..., Any]], given: jax.Array, rounds: int
) -> tuple[dict[str, tuple[Any, Series, bool]], dict[str, str]]:
    """(its result, milliseconds, whether each round had the same bits) of each call, and why others failed."""
    first, same = dict[str, Any](), dict.fromkeys(calls, True)

    def ask(name: str) -> float:
        began = time.perf_counter()
        found = jax.block_until_ready(calls[name](*given))
        seconds = time.perf_counter() - began
        same[name] &= all(bool((a == b).all()) for a, b in zip(found, first.setdefault(name, found), strict=True))
        return 1000 * seconds

    def start(name: str) -> None:
        try:
            ask(name)
        except Exception as error:
            raise WorkerError((str(error) or type(error).__name__).splitlines()[0]) from error

    times, failed = alternate(list(calls), rounds, ask, start)
    return {name: (first[name], series(ms), same[name]) for name, ms in times.items()}, failed


def error(found: Any, exact: Any) -> float:
    return max(
        float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b.astype(jnp.float32)).max())
        for a, b in zip(found, exact, strict=True)
    )
