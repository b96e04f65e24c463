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
from jaxgpt.profile.timing import series
from scripts.benchmarks.contest import require_round
from scripts.benchmarks.machine import facts
from scripts.benchmarks.shapes import Device, config_of, describe

FUSED = {"cudnn": "gpu", "flash": "gpu", "splash": "tpu"}
"""Kernel -> the only device that it runs on."""


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
    require_round(rounds)
    machine, tables, failed = facts(device), list[dict[str, Any]](), dict[str, str]()
    for shape in shapes:
        config = config_of(shape, device, "bfloat16")
        B, H, T = config.train.batch_size, config.model.n_head, config.model.block_size
        given = jax.random.normal(jax.random.key(0), (4, B, H, T, config.model.n_embd // H)).astype(jnp.bfloat16)
        rows = []
        for rate in (0.0, dropout):
            exact = compiled(replace(config.model, precision="float32"), "reference", rate)(*given)
            calls = {}
            for used in get_args(kernels.Kernel):
                if FUSED.get(used, device) == device and not (rate and used == "cudnn"):
                    try:
                        calls[used] = compiled(config.model, used, rate)
                        jax.block_until_ready(calls[used](*given))
                    except Exception as error:
                        why = str(error) or type(error).__name__
                        failed[f"{used}, {shape}, dropout {rate}"] = why.splitlines()[0]
                        del calls[used]
            rows += [{"kernel": used, "dropout": rate} | row for used, row in measured(calls, given, exact, rounds)]
        tables.append({"title": describe(shape, config), "rows": rows})
    notes = [
        "ms: forward and backward in bfloat16, median of the rounds (least to greatest)",
        "error: largest difference from the reference in float32, of the output and the three gradients, as a share of "
        "the largest entry",
        "repeatable: each round had the same bits",
    ]
    return {"mode": "attention", "facts": machine, "notes": notes, "failed": failed, "tables": tables}


def compiled(config: ModelConfig, used: kernels.Kernel, rate: float) -> Callable[..., Any]:
    """(q, k, v, g) -> the output and the three gradients for its cotangent g."""
    drop = prng.Drop(prng.key(1), 1 - rate) if rate else None

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, vjp = jax.vjp(partial(kernels.causal_attention, config, drop=drop, used=used), q, k, v)
        return out, *vjp(g.astype(out.dtype))

    return jax.jit(run)


def measured(calls: dict[Any, Any], given: jax.Array, exact: Any, rounds: int) -> list[tuple[str, dict[str, Any]]]:
    """A row of each call."""
    times, first = {used: list[float]() for used in calls}, {used: call(*given) for used, call in calls.items()}
    same = dict.fromkeys(calls, True)
    for _ in range(rounds):
        for used, call in calls.items():
            began = time.perf_counter()
            found = jax.block_until_ready(call(*given))
            times[used].append(1000 * (time.perf_counter() - began))
            same[used] &= all(bool((a == b).all()) for a, b in zip(found, first[used], strict=True))
    return [
        (used, {"ms": series(times[used]), "error": f"{error(first[used], exact):.4f}", "repeatable": same[used]})
        for used in calls
    ]


def error(found: Any, exact: Any) -> float:
    return max(
        float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b.astype(jnp.float32)).max())
        for a, b in zip(found, exact, strict=True)
    )
