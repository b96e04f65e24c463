"""The memory of a training step, and the refusal of a run that cannot fit, with the setting to change.

The estimate stays below what a compiled step takes, so nothing that fits is refused before compilation. The compiler's
own figures, where the backend gives them, are exact.
"""

import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxgpt import cost
from jaxgpt.config import Config, ModelConfig, UsageError
from jaxgpt.kernels import BLOCKED
from jaxgpt.loss import LOGITS
from jaxgpt.mesh import Shards

ONE = Shards()
ELSEWHERE = "a run that has begun cannot be made smaller; resume it where there is more memory"


class OutOfMemoryError(UsageError):
    """A run needs more memory than there is."""


@dataclass(frozen=True)
class Memory:
    """Least bytes of a training step on each device."""

    parameters: int
    gradients: int
    """All at once, since whether a step is applied depends on all of them."""
    optimizer_state: int
    """Two moments of AdamW, one of Muon."""
    activations: int
    """Of one micro-batch, as `activation_bytes`."""
    tokens: int
    """The corpus on the device."""
    total: int
    """At the peak. Gradients replace activations during the backward pass, so the larger counts. With several
    micro-batches their sum exists beside the activations, so both count."""


def needed(config: Config, n_tokens_on_device: int, *, recomputed: bool = False, shards: Shards = ONE) -> Memory:
    """The least memory of a step of `config`, its vocab_size known; `recomputed` as in `activation_bytes`."""
    train = config.train
    parameters = gradients = cost.FLOAT * cost.n_params(config.model) // shards.state
    micro_batch = max(1, train.batch_size // train.accumulate // shards.batch)
    activations = activation_bytes(config.model, micro_batch, recomputed=recomputed)
    tokens = n_tokens_on_device * (2 if config.model.vocab_size <= 2**16 else 4)
    peak = gradients + activations if train.accumulate > 1 else max(gradients, activations)
    moments = 2 * parameters
    if config.optimizer.algorithm == "muon" and config.model.kind == "gpt":
        inside_blocks = config.model.n_layer * sum(k * n for k, n in cost.kernels(config.model).values())
        moments -= cost.FLOAT * inside_blocks // shards.state
    return Memory(parameters, gradients, moments, activations, tokens, parameters + moments + peak + tokens)


def activation_bytes(config: ModelConfig, batch_size: int, *, recomputed: bool = False) -> int:
    """Least bytes that the backward pass of `batch_size` full contexts needs from the forward pass.

    In floats per token, for GPT-2's blocks L (16 C + 2 H T) + 2 C + V:

    - per block, 16 C: the inputs of norms (2 C), kernels (C, C, C, 4 C) and GELU (4 C), and q, k and v (3 C)
    - and 2 H T: the attention weights before and after normalisation; 3 H T with dropout
    - after the blocks: the input and output of the last norm, and the logits

    Not counted: the gradient of the logits, which may replace them, masks, temporaries, attention weights that can be
    computed by blocks, what remat recomputes, and logits beyond one chunk. With bf16 matmuls a float has two bytes.

    Args:
      recomputed: count the results of matmuls only, L (10 C + H T) + V. Compilers for accelerators can recompute the
        rest from them where memory is short.
    """
    C, T, V, L = config.n_embd, config.block_size, config.vocab_size, config.n_layer
    low = config.precision != "float32"
    logits = min(V, LOGITS // (batch_size * T) + 1)
    if config.kind == "bigram":
        return cost.FLOAT * batch_size * T * V
    columns = {name: n for name, (_, n) in cost.kernels(config).items()}
    weights = config.n_head * T if config.dropout or (T < BLOCKED and not low) else 0
    if config.remat == "blocks":
        block = C
    elif recomputed or config.remat == "matmuls":
        block = sum(columns.values()) + C + weights  # results of the kernels, and the weighted values
    else:
        inputs = 5 * C + sum(columns[name] for name in ("query", "key", "value"))  # of norms and kernels; q, k, v
        hidden = (1 if config.mlp == "relu2" else 2) * columns["c_fc"]
        block = inputs + hidden + (3 if config.dropout else 2) * weights
    floats = L * block + (0 if recomputed else 2 * C) + logits
    return (cost.FLOAT // 2 if low else cost.FLOAT) * batch_size * T * floats


def require(
    config: Config, n_tokens: int = 0, free: int | None = None, *, new: bool = True, shards: Shards = ONE
) -> None:
    """Check, before anything is compiled or allocated, that a step of `config` can fit.

    Args:
      n_tokens: tokens on the device. On a CPU they do not count: their file is memory-mapped.
      free: bytes; None for `available()`.
      new: whether the run's settings can still be changed.

    Raises:
      OutOfMemoryError: it cannot fit; with the numbers, and the setting to change.
    """
    free = available() if free is None else free
    memory = _estimate(config, n_tokens, shards)
    if free is None or memory.total * _sharing(shards) <= free:
        return
    working = f"activations {size(memory.activations)} {'and' if config.train.accumulate > 1 else 'or, after them,'} "
    raise OutOfMemoryError(
        f"a training step needs at least {size(memory.total)}: parameters {size(memory.parameters)}, optimizer state "
        f"{size(memory.optimizer_state)}, {working}gradients {size(memory.gradients)}, tokens {size(memory.tokens)}; "
        f"{size(free)} are free{_for_all(shards)}: {smaller(config, n_tokens, free, shards) if new else ELSEWHERE}"
    )


def require_compiled(
    compiled: Any, config: Config, free: int | None = None, *, new: bool = True, shards: Shards = ONE
) -> None:
    """Check that a compiled `train_steps` fits beside its arguments, which are on the device already.

    Raises:
      OutOfMemoryError: it does not fit. Nothing is checked where the compiler gives no figures.
    """
    free = available() if free is None else free
    figures = compiled_bytes(compiled)
    if figures is None or free is None or figures[1] * _sharing(shards) <= free:
        return
    held, more = (figure * _sharing(shards) for figure in figures)
    # The effect of a change is known for the estimate only, so the free memory is scaled down to it.
    room = int((held + free) * _estimate(config, 0, shards).total * _sharing(shards) / (held + more))
    raise OutOfMemoryError(
        f"the compiled training step needs {size(more)} beside its state and tokens of {size(held)}; {size(free)} are "
        f"free{_for_all(shards)}: {smaller(config, 0, room, shards) if new else ELSEWHERE}"
    )


def compiled_bytes(compiled: Any) -> tuple[int, int] | None:
    """(bytes of its arguments, further bytes that a call takes), None where the backend does not report them."""
    with suppress(NotImplementedError, RuntimeError):
        if stats := compiled.memory_analysis():
            more = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
            return stats.argument_size_in_bytes, more
    return None


def smaller(config: Config, n_tokens: int, free: int, shards: Shards = ONE) -> str:
    """The smallest change of settings whose estimate fits into `free` bytes, as options to type.

    Smaller micro-batches come first: they train the same. Then smaller batches, shorter contexts, a smaller model.
    """
    B, T = config.train.batch_size, config.model.block_size
    divisors = {A for i in range(1, math.isqrt(B) + 1) if B % i == 0 for A in (i, B // i)}
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        *(({"accumulate": A}, {}) for A in sorted(divisors) if config.train.accumulate < A),
        *(({"batch_size": B >> i, "accumulate": 1}, {}) for i in range(1, B.bit_length())),
        *(({"batch_size": 1, "accumulate": 1}, {"block_size": T >> i}) for i in range(1, T.bit_length())),
    ]
    for train, model in changes:
        changed = replace(config, train=replace(config.train, **train), model=replace(config.model, **model))
        micro_batch = changed.train.batch_size // changed.train.accumulate
        fits = _estimate(changed, n_tokens, shards).total * _sharing(shards) <= free
        if fits and micro_batch % shards.batch == 0:
            return "try " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (train | model).items())
    if config.model.kind == "bigram":
        return "try a smaller vocabulary (--tokenizer)"
    return "try a smaller model (--n-embd, --n-layer)"


def size(n_bytes: float) -> str:
    """Bytes as text, in powers of ten.

    >>> size(84_200_000_000), size(1_234_000)
    ('84.2 GB', '1.2 MB')
    """
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def available() -> int | None:
    """Free bytes of the device that a step runs on, None where it does not report them."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host_available()
    with suppress(NotImplementedError, RuntimeError):
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return None


def host_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of the machine's memory that this process may still take, without swap.

    The least of MemAvailable, of what control groups leave, and of what RLIMIT_AS (`ulimit -v`) leaves. Without /proc,
    the whole physical memory.
    """
    left = _cgroups_left(proc, cgroups)
    if found := re.search(r"^MemAvailable:\s*(\d+) kB", _read(proc / "meminfo"), re.M):
        left.append(int(found[1]) * 1024)
    elif not left:
        with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
            left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if sys.platform != "win32":
        import resource

        limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _read(proc / "self" / "statm").split()
        if limit != resource.RLIM_INFINITY:
            left.append(limit - (int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0))
    return max(0, min(left)) if left else None


def _cgroups_left(proc: Path, root: Path) -> list[int]:
    """Limit minus usage of each control group (version 2 or 1) of the process, up to the root. Page cache is free."""
    left = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage, prefix = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in (top / own, *(top / parent for parent in own.parents)):
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit():  # "max" is no limit
                files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.M)
                left.append(int(most) - int(used) + sum(map(int, files)))
    return left


def _estimate(config: Config, n_tokens: int, shards: Shards) -> Memory:
    """`needed` on this backend."""
    on_cpu = jax.default_backend() == "cpu"
    return needed(config, 0 if on_cpu else n_tokens, recomputed=not on_cpu, shards=shards)


def _sharing(shards: Shards) -> int:
    """How many devices share the memory that `available` reports."""
    return shards.per_host if jax.default_backend() == "cpu" else 1


def _for_all(shards: Shards) -> str:
    return f" for all {shards.per_host} devices" if _sharing(shards) > 1 else ""


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""
