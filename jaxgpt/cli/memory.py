"""Estimate the memory of a training step before it is compiled, and refuse a run that cannot fit.

The estimate is a lower bound of what a compiled step takes, so nothing that fits is refused.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.filesize import decimal as size

from jaxgpt import flash
from jaxgpt.config import Config, ModelConfig, UsageError, replaced
from jaxgpt.data import DEVICE_TOKENS
from jaxgpt.kernels import BLOCKED
from jaxgpt.loss import logits_at_once
from jaxgpt.monitor import cost
from jaxgpt.sharding import Sizes

ONE_DEVICE = Sizes()
ELSEWHERE = "a run that has begun cannot be made smaller; resume it where there is more memory"


class OutOfMemoryError(UsageError):
    """A run needs more memory than there is."""


class Memory(NamedTuple):
    """Lower bounds of the bytes of a training step on each device."""

    parameters: int  # and as much for the gradients
    optimizer_state: int  # two moments of AdamW, one of Muon
    activations: int  # of one micro-batch
    tokens: int  # of the corpus on the device
    total: int  # at the peak


def needed(config: Config, n_tokens: int, sizes: Sizes = ONE_DEVICE, *, recomputed: bool = False) -> Memory:
    """The memory of a step of `config`, whose vocab_size is set, with `n_tokens` on each device of a mesh of `sizes`.

    All gradients exist at once, because whether a step is applied depends on all of them. During the backward pass they
    replace activations, so the larger of both counts; with several micro-batches, their sum is held beside activations.
    """
    model, train, state_shards = config.model, config.train, sizes.fsdp * sizes.tensor
    parameters = gradients = cost.FLOAT * cost.n_params(model) // state_shards
    micro_batch = max(1, train.batch_size // train.accumulate // (sizes.data * sizes.fsdp))
    activations = activation_bytes(model, micro_batch, recomputed=recomputed) // (sizes.tensor * sizes.context)
    tokens = n_tokens * (2 if model.vocab_size <= 2**16 else 4)
    peak = gradients + activations if train.accumulate > 1 else max(gradients, activations)
    moments = cost.FLOAT * n_moments(config) // state_shards
    return Memory(parameters, moments, activations, tokens, parameters + moments + peak + tokens)


def n_moments(config: Config) -> int:
    """Elements of the optimizer state: AdamW has two per parameter, Muon one per parameter of a kernel in a block."""
    model, moments = config.model, 2 * cost.n_params(config.model)
    if config.optimizer.algorithm == "muon" and model.kind == "gpt":
        moments -= model.n_layer * sum(k * n for k, n in cost.kernels(model).values())
    return moments


def activation_bytes(config: ModelConfig, batch_size: int, *, recomputed: bool = False) -> int:
    """Lower bound of the bytes that the forward pass of `batch_size` full contexts keeps for the backward pass.

    With GPT-2's blocks, L (10 C + H T) + V floats per token, of two bytes with bf16 matmuls: in each block the results
    of kernels (9 C), the weighted values and the attention weights; then the logits. Unless `recomputed`, as XLA does
    on accelerators, also L (6 C + H T) + 2 C: the outputs of norms (2 C) and GELU (4 C), the attention weights before
    normalization; then the input and output of the last norm.

    Not counted: the gradient of the logits, which may replace them, masks, temporaries, attention weights that can be
    computed by blocks, what remat recomputes except in one block, and logits beyond one chunk.
    """
    C, T, V = config.n_embd, config.block_size, config.vocab_size
    if config.kind == "bigram":
        return 2 * cost.FLOAT * batch_size * T * V  # the logits, and their gradient
    low = config.precision != "float32"
    columns = {name: n for name, (_, n) in cost.kernels(config).items()}
    fused = low and (not config.dropout or flash.supports(T, C // config.n_head))
    weights = 0 if fused or T >= BLOCKED else config.n_head * T
    last = min(V, logits_at_once() // (batch_size * T) + 1)
    block = sum(columns.values()) + C + weights  # results of the kernels, and the weighted values
    if not recomputed:
        block += 2 * C + weights + (columns["c_fc"] if config.mlp == "gelu" else 0)  # outputs of norms, and of GELU
        last += 2 * C
    kept = {"blocks": C, "matmuls": sum(columns.values())}.get(config.remat, block)  # of the other blocks
    return (cost.FLOAT // 2 if low else cost.FLOAT) * batch_size * T * ((config.n_layer - 1) * kept + block + last)


def require(config: Config, n_tokens: int = 0, sizes: Sizes = ONE_DEVICE, *, copies: int = 1, new: bool = True) -> None:
    """Check, before anything is compiled or allocated, that a step of `config` fits on a mesh of `sizes`.

    Args:
      n_tokens: size of the training split. It does not count on a CPU, where the file is memory-mapped.
      copies: steps that run at once, each on a mesh of its own.
      new: whether the settings of the run can still be changed.

    Raises:
      OutOfMemoryError: it cannot fit. The message has the numbers and the setting to change.
    """
    free, on_cpu = available(), jax.default_backend() == "cpu"
    sharing = copies * sizes.devices // jax.process_count() if on_cpu else 1  # devices that share the free memory

    def estimate(config: Config) -> Memory:
        train = config.train
        windows = train.scan_steps * train.batch_size * (config.model.block_size + 1)  # of one chunk
        on_device = n_tokens if n_tokens <= DEVICE_TOKENS else windows
        return needed(config, 0 if on_cpu else on_device, sizes, recomputed=not on_cpu)

    memory = estimate(config)
    if free is None or memory.total * sharing <= free:
        return
    advice, B = "a smaller --batch-size, --block-size or model (--n-embd, --n-layer)", config.train.batch_size
    for A in range(config.train.accumulate + 1, B + 1):  # smaller micro-batches train the same
        valid = B % A == 0 and B // A % (sizes.data * sizes.fsdp) == 0
        if valid and estimate(replaced(config, accumulate=A)).total * sharing <= free:
            advice = f"--accumulate {A}"
            break
    then = "and" if config.train.accumulate > 1 else "or, after them,"
    raise OutOfMemoryError(
        f"a training step needs at least {size(memory.total)}: parameters {size(memory.parameters)}, optimizer state "
        f"{size(memory.optimizer_state)}, activations {size(memory.activations)} {then} gradients "
        f"{size(memory.parameters)}, tokens {size(memory.tokens)}; {size(free)} are free"
        f"{f' for all {sharing} devices' if sharing > 1 else ''}: {f'try {advice}' if new else ELSEWHERE}"
    )


def compiled_bytes(compiled: Any) -> tuple[int, int] | None:
    """(bytes of the arguments, further bytes of a call); None if the backend does not report them."""
    with suppress(NotImplementedError, RuntimeError):
        if stats := compiled.memory_analysis():
            more = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
            return stats.argument_size_in_bytes, more
    return None


def available() -> int | None:
    """Free bytes of the first local device; None if it does not report them."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host_available()
    with suppress(NotImplementedError, RuntimeError):
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return None


def host_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process can still take, without swap: the least of the physical memory, MemAvailable,
    and what its cgroup (version 2) and the cgroups above it leave."""
    left = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if found := re.search(r"^MemAvailable:\s*(\d+) kB", _read(proc / "meminfo"), re.M):
        left.append(int(found[1]) * 1024)
    if found := re.search(r"^0::/(.*)$", _read(proc / "self" / "cgroup"), re.M):
        for folder in (cgroups / found[1], *(cgroups / each for each in Path(found[1]).parents)):
            limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
            if limit.isdigit() and used.isdigit():  # "max" is no limit
                cached = re.findall(r"^(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.M)  # is free
                left.append(int(limit) - int(used) + sum(map(int, cached)))
    return max(0, min(left))


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""
