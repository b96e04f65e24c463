"""Whether a run fits: the memory that a training step needs, what there is, and a refusal that names the knob.

What is counted on paper stays below what a compiled step takes, so that nothing that fits is refused before it is
compiled; the compiler's own figures, where it gives them, then say it exactly.
"""

import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxgpt import cost
from jaxgpt.config import Config, UsageError


class OutOfMemoryError(UsageError):
    """A run needs more memory than there is."""


class Parts(NamedTuple):
    """Into how many parts the devices of a run split what they hold."""

    state: int = 1
    batch: int = 1
    per_host: int = 1
    """Devices that share the memory of a host, where they have none of their own."""


WHOLE = Parts()


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs at least on each device."""

    parameters: int
    gradients: int
    """There all at once, as whether a step is applied hangs on all of them."""
    optimizer_state: int
    """AdamW's two moments, Muon's one."""
    activations: int
    """Of one micro-batch, as `cost.activation_bytes`."""
    tokens: int
    """The text on the device."""
    total: int
    """At the worst moment. Gradients replace activations in the backward pass, so of the two the larger counts; a sum
    over micro-batches is there beside the activations, so then both do."""


def needed(config: Config, n_tokens_on_device: int, *, recomputed: bool = False, parts: Parts = WHOLE) -> Memory:
    """What a step of `config`, its vocab_size known, needs at least; `recomputed` as in `cost.activation_bytes`."""
    train = config.train
    parameters = gradients = cost.FLOAT * cost.n_params(config.model) // parts.state
    micro = max(1, train.batch_size // train.accumulate // parts.batch)
    activations = cost.activation_bytes(config.model, micro, recomputed=recomputed)
    tokens = n_tokens_on_device * (2 if config.model.vocab_size <= 2**16 else 4)
    worst = gradients + activations if train.accumulate > 1 else max(gradients, activations)
    moments = 2 * parameters
    if config.optimizer.algorithm == "muon" and config.model.kind == "gpt":
        inside = config.model.n_layer * sum(k * n for k, n in cost.kernels(config.model).values())
        moments -= cost.FLOAT * inside // parts.state
    total = parameters + moments + worst + tokens
    return Memory(parameters, gradients, moments, activations, tokens, total)


def require(
    config: Config, n_tokens: int = 0, free: int | None = None, *, new: bool = True, parts: Parts = WHOLE
) -> None:
    """Check, before anything is compiled or the state is made, that a step of `config` can fit.

    Args:
      n_tokens: tokens that go to the device. They do not count on a CPU, which maps their file.
      free: bytes; None for `available()`.
      new: whether the run's settings can still be changed.

    Raises:
      OutOfMemoryError: it cannot; with the numbers, and the setting to change.
    """
    free = available() if free is None else free
    memory = _paper(config, n_tokens, parts)
    if free is None or memory.total * _sharing(parts) <= free:
        return
    working = f"activations {size(memory.activations)} {'and' if config.train.accumulate > 1 else 'or, after them,'} "
    raise OutOfMemoryError(
        f"a training step needs at least {size(memory.total)}: parameters {size(memory.parameters)}, optimizer state "
        f"{size(memory.optimizer_state)}, {working}gradients {size(memory.gradients)}, tokens {size(memory.tokens)}; "
        f"{size(free)} are free{_each(parts)}: {knob(config, n_tokens, free, parts) if new else ELSEWHERE}"
    )


def require_compiled(
    compiled: Any, config: Config, free: int | None = None, *, new: bool = True, parts: Parts = WHOLE
) -> None:
    """Check that a compiled `train_steps` fits beside its arguments, which are on the device already.

    Args:
      compiled: `train_steps.lower(config, state, tokens, starts).compile()`. Of the arrays and not of their shapes: a
        call of `train_steps` then finds the same program, also where a restored state is tied to its device.
      free, new: as in `require`.

    Raises:
      OutOfMemoryError: it does not. Nothing is checked where the compiler gives no figures.
    """
    free = available() if free is None else free
    figures = compiled_bytes(compiled)
    if figures is None or free is None or figures[1] * _sharing(parts) <= free:
        return
    held, more = (figure * _sharing(parts) for figure in figures)
    # What a change saves is known on paper only: the room there shrinks by as much as the compiler takes more.
    room = int((held + free) * _paper(config, 0, parts).total * _sharing(parts) / (held + more))
    raise OutOfMemoryError(
        f"the compiled training step needs {size(more)} beside its state and tokens of {size(held)}; {size(free)} are "
        f"free{_each(parts)}: {knob(config, 0, room, parts) if new else ELSEWHERE}"
    )


ELSEWHERE = "a run that has begun cannot be made smaller; go on with it where there is more memory"


def compiled_bytes(compiled: Any) -> tuple[int, int] | None:
    """(bytes of its arguments, bytes that a run of it takes beside them), None where the backend does not say."""
    with suppress(NotImplementedError, RuntimeError):
        if stats := compiled.memory_analysis():
            more = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
            return stats.argument_size_in_bytes, more
    return None


def knob(config: Config, n_tokens: int, free: int, parts: Parts = WHOLE) -> str:
    """The smallest change that fits into `free` bytes on paper, as the options to type.

    Smaller micro-batches come first, which learn the same; then smaller batches, shorter contexts, a smaller model.
    """
    B, T = config.train.batch_size, config.model.block_size
    divisors = {A for i in range(1, math.isqrt(B) + 1) if B % i == 0 for A in (i, B // i)}
    halves = [B >> i for i in range(1, B.bit_length())]
    lengths = [T >> i for i in range(1, T.bit_length())]
    changes: list[tuple[dict[str, Any], dict[str, Any]]]
    changes = [({"accumulate": A}, {}) for A in sorted(divisors) if config.train.accumulate < A]
    changes += [({"batch_size": b, "accumulate": 1}, {}) for b in halves]
    changes += [({"batch_size": 1, "accumulate": 1}, {"block_size": t}) for t in lengths]
    for train, model in changes:
        smaller = replace(config, train=replace(config.train, **train), model=replace(config.model, **model))
        micro = smaller.train.batch_size // smaller.train.accumulate
        if micro % parts.batch == 0 and _paper(smaller, n_tokens, parts).total * _sharing(parts) <= free:
            return "try " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (train | model).items())
    if config.model.kind == "bigram":
        return "try a smaller vocabulary (--tokenizer)"
    return "try a smaller model (--n-embd, --n-layer)"


def size(n_bytes: float) -> str:
    """Bytes for a person, in powers of ten.

    >>> size(84_200_000_000), size(1_234_000)
    ('84.2 GB', '1.2 MB')
    """
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def available() -> int | None:
    """Bytes that are free on the device that a step runs on, None where nobody says."""
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

    The least of what Linux has available, what the process's control groups leave and what its limit of address space
    (`ulimit -v`) leaves; the whole physical memory where there is no /proc.
    """
    left = _control_groups_left(proc, cgroups)
    if found := re.search(r"^MemAvailable:\s*(\d+) kB", _read(proc / "meminfo"), re.M):
        left.append(int(found[1]) * 1024)
    elif not left:
        with suppress(AttributeError, ValueError, OSError):  # no sysconf on Windows
            left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if sys.platform != "win32":
        import resource

        limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _read(proc / "self" / "statm").split()
        if limit != resource.RLIM_INFINITY:
            left.append(limit - (int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0))
    return max(0, min(left)) if left else None


def _control_groups_left(proc: Path, root: Path) -> list[int]:
    """Limit minus usage of each control group, version 2 or 1, from the root down to the process's own.

    The pages of files count as free: the kernel gives them up when memory is short.
    """
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


def _paper(config: Config, n_tokens: int, parts: Parts) -> Memory:
    """`needed` as it holds on this backend."""
    on_cpu = jax.default_backend() == "cpu"
    return needed(config, 0 if on_cpu else n_tokens, recomputed=not on_cpu, parts=parts)


def _sharing(parts: Parts) -> int:
    """How many devices take from the memory that `available` counts."""
    return parts.per_host if jax.default_backend() == "cpu" else 1


def _each(parts: Parts) -> str:
    return f" for all {parts.per_host} devices" if _sharing(parts) > 1 else ""


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""
