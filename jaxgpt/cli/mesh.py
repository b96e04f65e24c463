"""The mesh of a run: its sizes, from --mesh or automatic, and whether a config fits it."""

from math import lcm

import jax
from jax.sharding import Mesh
from rich.filesize import decimal

from jaxgpt.cli.memory import n_moments
from jaxgpt.config import Config
from jaxgpt.monitor import cost
from jaxgpt.sharding import MeshError, Sizes, make_mesh


def check(config: Config, sizes: Sizes) -> None:
    """Raise a MeshError that lists all `problems`, if there are any."""
    if wrong := problems(config, sizes):
        raise MeshError(f"the mesh {sizes} does not fit:\n" + "\n".join(f"  {line}" for line in wrong))


def problems(config: Config, sizes: Sizes) -> list[str]:
    """Dimensions of a config, whose vocab_size is set, that mesh axes do not divide; each with an option to change."""
    model, A = config.model, config.train.accumulate
    sequences = "sequences per micro-batch (batch_size / accumulate)"
    rows = [  # axis, its size, dimension, its name, option, and the option's value per unit of the dimension
        ("data x fsdp", sizes.data * sizes.fsdp, config.train.batch_size // A, sequences, "--batch-size", A),
        ("context", sizes.context, model.block_size, "tokens of a context (block_size)", "--block-size", 1),
    ]
    if model.kind == "gpt":
        rows += [
            ("fsdp", sizes.fsdp, model.n_embd, "channels (n_embd)", "--n-embd", 1),
            ("tensor", sizes.tensor, model.n_embd, "channels (n_embd)", "--n-embd", 1),
            ("tensor", sizes.tensor, model.n_kv_head, "KV heads (n_kv_head)", "--n-kv-head", 1),
            ("tensor", sizes.tensor, model.vocab_size, "tokens of the vocabulary (vocab_size)", "--vocab-size", 1),
        ]
    found, heads = list[str](), model.n_head * (2 if model.position == "rope" else 1)
    for axis, n, size, name, option, unit in rows:
        if size % n:
            step = lcm(n, heads) if option == "--n-embd" else n  # a config asks for a multiple of heads
            value = -(-size // step) * step * unit
            if option == "--n-kv-head" and model.n_head % value:
                value = 0  # n_head, which tensor need not divide
            found.append(f"{axis} = {n} does not divide {size} {name}: try {option} {value}")
    hidden = cost.kernels(model)["c_fc"][1]
    if model.kind == "gpt" and not found and hidden % sizes.tensor:
        found = [f"tensor = {sizes.tensor} does not divide {hidden} hidden channels: try a divisor of it"]
    return found


def mesh_for(config: Config, sizes: Sizes | None) -> tuple[Mesh, str]:
    """The mesh to train a config on, whose vocab_size is set, and a line that describes it.

    Args:
      sizes: None lets `choose` pick them; on a CPU it gets one device, because virtual devices share the cores.

    Raises:
      MeshError: there are too few devices, or a dimension is not divisible.
    """
    devices, why = jax.devices(), ""
    n, kind = len(devices), devices[0].device_kind
    if sizes is None and devices[0].platform == "cpu" and jax.process_count() == 1:
        sizes, why = Sizes(), f"the {n} devices of one CPU share its cores; --mesh data={n} takes them all"
    elif sizes is None:
        sizes, why = choose(config, n, (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"))
    check(config, sizes)
    if sizes.devices > n:
        raise MeshError(f"the mesh {sizes} needs {sizes.devices} devices, expected at most {n}: try --mesh auto")
    if jax.process_count() > 1 and sizes.devices != n:
        raise MeshError(
            f"the mesh {sizes} leaves {n - sizes.devices} of the {n} devices of {jax.process_count()} processes out, "
            f"but every process must take part: start fewer, or name a mesh of {n} devices{why and f'; {why}'}"
        )
    line = f"on {kind}" if sizes.devices == 1 else f"on {sizes.devices} of {n} x {kind} as {sizes}"
    return make_mesh(sizes), f"{line}: {why}" if why and n > 1 else line


def choose(config: Config, devices: int, memory: int | None) -> tuple[Sizes, str]:
    """The mesh of "auto" and the reason for it, for `devices` equal devices with `memory` bytes each (None: unknown).

    The state is replicated (data) if it takes at most half of a device's memory, else sharded (fsdp) over as few
    devices as possible. Devices stay idle if their number does not divide a micro-batch; the reason then names a better
    --accumulate.
    """
    state = cost.FLOAT * (2 * cost.n_params(config.model) + n_moments(config))
    B, A = config.train.batch_size, config.train.accumulate
    used = max(n for n in divisors(devices) if B // A % n == 0)
    valid = [n for n in divisors(used) if not problems(config, Sizes(used // n, n))]
    fsdp = next((n for n in valid if memory is None or state / n <= memory / 2), max(valid, default=1))
    why = f"parameters, gradients and moments take {decimal(state)}"
    why += f" of {decimal(memory)} a device" if memory else ""
    why += f", split over {fsdp} devices" if fsdp > 1 else ", whole on each device"
    if used < devices:
        why += f"; {devices - used} of {devices} devices stay idle, as only {used} divide a micro-batch"
        # The fewest micro-batches that all devices share, with no more sequences per device than a micro-batch has now.
        better = next((a for a in divisors(B) if B // a % devices == 0 and B // a // devices <= B // A), A)
        why += f": all share it with --accumulate {better}" if better != A else ": name a mesh with tensor or context"
    return Sizes(used // fsdp, fsdp), why


def divisors(n: int) -> list[int]:
    """All divisors of n, smallest first."""
    return [i for i in range(1, n + 1) if n % i == 0]
