"""What `jaxgpt inspect` finds about a config: parameters, FLOPs, memory, kernels and the roofline, as a report."""

import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import matmul, memory, model, prng
from jaxgpt.config import Config, ModelConfig
from jaxgpt.data import Batch
from jaxgpt.mesh import one_device, replicated
from jaxgpt.monitor.chips import flops_per_token
from jaxgpt.profile import hlo, roofline, trace
from jaxgpt.profile.programs import Program, programs, xla_counts
from jaxgpt.profile.report import Report, facts
from jaxgpt.profile.roofline import Machine, Work
from jaxgpt.profile.rounds import disturbance, machine_seconds, others, repeat
from jaxgpt.step import sharded_init

SHOWN = 12
"""Rows of long tables: matmuls, fusions, operations of a trace."""
NOTES = (
    "by formula: FLOPs of the matmuls by flops_per_token, three times that with the backward pass. traced: of the "
    "matmuls in the jaxpr; fewer where attention skips masked blocks or is a library's kernel, more where remat or "
    "chunked logits compute again, or where Muon orthogonalises.",
    "XLA: all operations, one for each element where it is no matmul, before and after XLA optimises. It counts the "
    "body of a loop (scanned blocks, micro-batches) once, and custom calls as nothing.",
    "compulsory: arguments and results of a program, once. XLA's bytes: what each operation reads and writes, before "
    "optimising of all operations, then of fusions, whose inner results stay in registers or caches.",
)


def inspect(config: Config, name: str, *, measured: bool = True, trace_folder: Path | None = None) -> Report:
    """A report on `config`, its vocab_size known, called `name`, on the first device.

    Args:
      measured: also time the machine, each part and the step; else only count and compile.
      trace_folder: where to write a trace of some steps.

    Raises:
      OutOfMemoryError: a step does not fit into memory.
    """
    if measured or trace_folder:
        memory.require(config)
    found = programs(config)
    tables = [
        (f"Parameters of {name}", parameter_rows(config.model)),
        ("FLOPs, in millions", _with_backward({name: flop_counts(each) for name, each in found.items()})),
        ("Memory traffic, in MB", _with_backward({name: byte_counts(each) for name, each in found.items()})),
        ("Memory of each program, by XLA", memory_rows(found)),
        ("Matmuls of a step, and what computes them", matmul_rows(found["step"].text)),
        ("Instructions of a step, by kind", instruction_rows(found["step"].text)),
    ]
    notes = [model.describe(config.model), *NOTES, needed(config)]
    calls = {each.kernel for each in hlo.instructions(found["step"].text).values() if each.op == "custom-call"}
    notes += [f"custom calls: {', '.join(sorted(calls))}"] if calls else []
    device = jax.local_devices()[0]
    report: Report = {
        "mode": f"inspecting {name}",
        "facts": facts(device.platform) | {"device": f"{device.platform}, {device.device_kind}"},
        "failed": {},
    }
    if measured or trace_folder:
        step = Stepper(config, found["step"])
    if measured:
        rows, measured_notes, report["roofline"] = measure(config, step)
        tables.append(("Roofline, part by part", rows))
        notes += measured_notes
    if trace_folder:
        rows, note = traced(step, trace_folder)
        tables.append(("Operations of a step that took longest", rows))
        notes.append(note)
    return report | {"tables": [{"title": title, "rows": rows} for title, rows in tables], "notes": notes}


def texts(config: Config, jaxpr: Sequence[str], hlo: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(file name, text) of the jaxpr and of the optimised HLO of the named programs."""
    found = programs(config)
    yield from ((f"{name}.jaxpr.txt", str(found[name].traced.jaxpr)) for name in jaxpr)
    yield from ((f"{name}.hlo.txt", found[name].text) for name in hlo)


def parameter_rows(config: ModelConfig) -> list[dict[str, Any]]:
    """A row for each array of parameters, equal ones of all blocks in one, and the total."""
    params = jax.eval_shape(lambda key: model.init_params(config, key), prng.key(0))
    sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    blocks: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        stacked = config.scan_layers and name.startswith("h/")
        key = re.sub(r"^h(_\d+)?/", "h_*/", name), leaf.shape[1:] if stacked else leaf.shape
        sizes[key] += leaf.size
        blocks[key] += leaf.shape[0] if stacked else 1
    rows = [
        {
            "module": name,
            "shape": " x ".join(map(str, shape)),
            "blocks": blocks[name, shape] if name.startswith("h_*") else None,
            "count": n,
            "share, %": 100 * n / sizes.total(),
        }
        for (name, shape), n in sizes.items()
    ]
    return [*rows, {"module": "in all", "count": sizes.total(), "share, %": 100.0}]


def flop_counts(program: Program) -> dict[str, float | None]:
    before, after = xla_counts(program.lowered), xla_counts(program.compiled)
    return {
        "matmuls by formula": program.formula_flops / 1e6,
        "traced": program.matmul_flops / 1e6,
        "XLA": _millions(before, "flops"),
        "XLA, optimised": _millions(after, "flops"),
        "exp, log, roots": _millions(before, "transcendentals"),
    }


def byte_counts(program: Program) -> dict[str, float | None]:
    return {
        "compulsory": program.bytes / 1e6,
        "XLA": _millions(xla_counts(program.lowered), "bytes accessed"),
        "XLA, optimised": _millions(xla_counts(program.compiled), "bytes accessed"),
    }


def _millions(count: dict[str, float], name: str) -> float | None:
    return count[name] / 1e6 if name in count else None


def _with_backward(counts: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    """A row for each program, and one for what the backward pass adds."""
    loss, gradient = counts["loss"], counts["gradient"]
    backward = {
        key: None if a is None or b is None else a - b
        for (key, a), b in zip(gradient.items(), loss.values(), strict=True)
    }
    rows = [{"program": name, **count} for name, count in counts.items()]
    return [*rows[:3], {"program": "backward (gradient - loss)", **backward}, *rows[3:]]


def needed(config: Config) -> str:
    """A note on the memory that a step needs at least."""
    found = memory.needed(config, 0)
    kinds = ("parameters", "gradients", "optimizer_state", "activations")
    sizes = ", ".join(f"{kind.replace('_', ' ')} {memory.size(getattr(found, kind))}" for kind in kinds)
    return f"a step needs at least {memory.size(found.total)}: {sizes} of a micro-batch; gradients replace activations"


def memory_rows(found: dict[str, Program]) -> list[dict[str, Any]]:
    """XLA's analysis of each program, where the backend gives one."""
    rows = []
    for name, program in found.items():
        if (stats := program.compiled.memory_analysis()) is not None:
            sizes = {
                "arguments": stats.argument_size_in_bytes,
                "results": stats.output_size_in_bytes,
                "temporaries": stats.temp_size_in_bytes,
                "donated": -stats.alias_size_in_bytes,
            }
            sizes["in all"] = sum(sizes.values())
            rows.append({"program": name} | {f"{key}, MB": size / 1e6 for key, size in sizes.items()})
    return rows


def matmul_rows(text: str) -> list[dict[str, Any]]:
    """The matmuls of a program by shape and kernel, and the share of each kernel."""
    found = hlo.matmuls(text)
    total = sum(each.flops for each in found)
    by_kernel: Counter[str] = Counter()
    for each in found:
        by_kernel[each.kernel] += each.flops
    rows: list[tuple[str, str | None, int | None, int]] = [
        (each.shapes, each.kernel, each.runs, each.flops) for each in found[:SHOWN]
    ]
    if rest := found[SHOWN:]:
        rows.append(("all others", None, sum(each.runs for each in rest), sum(each.flops for each in rest)))
    rows += [("in all", kernel, None, flops) for kernel, flops in by_kernel.most_common()]
    return [
        {"operands": operands, "computed by": kernel, "times": n, "MFLOP": flops / 1e6, "share, %": 100 * flops / total}
        for operands, kernel, n, flops in rows
    ]


def instruction_rows(text: str) -> list[dict[str, Any]]:
    """How many instructions of each kind the program runs, and how many operations are fused in them."""
    runs, fused = Counter[str](), Counter[str]()
    for each in hlo.instructions(text).values():
        if each.op not in hlo.FREE:
            runs[each.kernel] += each.runs
            fused[each.kernel] += each.runs * max(1, len(each.inside))
    return [{"kind": kind, "times": n, "operations": fused[kind]} for kind, n in runs.most_common(SHOWN)]


class Stepper:
    """The compiled step with a state and a batch of random tokens."""

    def __init__(self, config: Config, step: Program):
        self.compiled, self.text, self.state = step.compiled, step.text, sharded_init(config, one_device())
        shape = (2, config.train.batch_size, config.model.block_size)
        ids = np.random.default_rng(0).integers(config.model.vocab_size, size=shape).astype(np.int32)
        self.batch = Batch(*jax.device_put(ids, replicated(one_device())))
        self.run()

    def run(self) -> int:
        self.state, _ = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return 1


def measure(config: Config, step: Stepper) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """The roofline of each part: table rows, notes, and raw figures."""
    before, own = machine_seconds(), time.process_time()
    works, precision = roofline.works(config), matmul.resolve(config.model.precision)
    first = roofline.measure_machine(precision)
    seconds = roofline.measure(works)
    rounds = [repeat(step.run, 0.3) for _ in range(5)]
    last = roofline.measure_machine(precision)  # the machine may have been slower at either end
    machine = Machine(*map(max, zip(first, last, strict=True)))
    busy = [others(before, machine_seconds(), time.process_time() - own)] if before else []
    figures = {
        "peak_flops": machine.flops,
        "bandwidth": machine.bandwidth,
        "works": [{**work._asdict(), "call": None, "seconds": s} for work, s in zip(works, seconds, strict=True)],
    }
    times = [took / n for n, took in rounds]
    notes = [disturbance(busy), *measured_notes(config, machine, works, seconds, times)]
    return roofline_rows(works, seconds, machine), notes, figures


def roofline_rows(works: list[Work], seconds: list[float], machine: Machine) -> list[dict[str, Any]]:
    return [
        {
            "part": work.part + (", + backward" if work.training and work.part != "optimizer" else ""),
            "times": work.times or None,
            "MFLOP": work.flops / 1e6,
            "MB": work.bytes / 1e6,
            "FLOP/byte": work.flops / work.bytes,
            "bound by": "compute" if work.flops / work.bytes > machine.ridge else "memory",
            "least, ms": 1e3 * machine.least(work),
            "measured, ms": 1e3 * took,
            "GFLOP/s": work.flops / took / 1e9,
            "of the roof, %": 100 * machine.least(work) / took,
        }
        for work, took in zip(works, seconds, strict=True)
    ]


def measured_notes(
    config: Config, machine: Machine, works: list[Work], seconds: list[float], steps: list[float]
) -> Iterator[str]:
    """The machine, the share of it that a step uses, and what the parts take one by one.

    Args:
      steps: seconds of a step, round by round.
    """
    took, precision = statistics.median(steps), matmul.resolve(config.model.precision)
    tokens = config.train.batch_size * config.model.block_size
    flops = 3 * flops_per_token(config.model) * tokens
    yield (
        f"measured here, by JAX: {machine.flops / 1e9:,.0f} GFLOP/s in {precision} matmuls of {roofline.N} x "
        f"{roofline.N}, {machine.bandwidth / 1e9:.1f} GB/s through an array of {4 * roofline.STREAMED / 1e6:,.0f} MB; "
        f"the ridge is at {machine.ridge:.1f} FLOP/byte. A part above its roof has its arrays in caches"
    )
    yield (
        f"a step of {tokens:,} tokens takes {1e3 * took:.1f} ms ({1e3 * min(steps):.1f} to {1e3 * max(steps):.1f}), "
        f"{tokens / took:,.0f} tokens/s: its matmuls, {flops / 1e9:.2f} GFLOP, use {flops / took / machine.flops:.0%} "
        "of the machine's peak"
    )
    spent = {
        work.part: work.times * s * (1 if work.part == "optimizer" else config.train.accumulate)
        for work, s in zip(works, seconds, strict=True)
        if work.training
    }
    longest, whole = max(spent, key=spent.__getitem__), sum(spent.values())
    yield (
        f"the parts one by one, with their backward passes and the optimizer, take {1e3 * whole:.1f} ms, "
        f"{whole / took:.0%} of the step, most of it {longest}: {1e3 * spent[longest]:.1f} ms"
    )


def traced(step: Stepper, folder: Path, steps: int = 5) -> tuple[list[dict[str, Any]], str]:
    """Trace some steps into `folder`: rows of the operations by their own time, and a note."""
    lines = trace.capture(folder, lambda: [step.run() for _ in range(steps)])
    found, known = trace.operations(lines), hlo.instructions(step.text)
    total = sum(each.seconds for each in found) or 1.0
    runs: Counter[tuple[str, str | None]] = Counter()
    seconds: dict[tuple[str, str | None], float] = {}
    for each in found:
        instruction = known.get(each.name)
        key = (instruction.origin or each.name, instruction.kernel) if instruction else (each.name, None)
        runs[key] += each.runs
        seconds[key] = seconds.get(key, 0.0) + each.seconds
    rows = [
        {
            "comes from": origin,
            "computed by": kernel,
            "times a step": runs[origin, kernel] / steps,
            "ms a step": 1e3 * seconds[origin, kernel] / steps,
            "share, %": 100 * seconds[origin, kernel] / total,
        }
        for origin, kernel in sorted(seconds, key=lambda key: -seconds[key])[:SHOWN]
    ]
    note = (
        f"{steps} steps were traced into {folder}: {len(found)} operations, {1e3 * total / steps:.1f} ms of work and "
        f"{trace.dispatches(lines) / steps:g} programs dispatched per step. Open the .trace.json.gz in "
        f"https://ui.perfetto.dev, or run tensorboard --logdir {folder} with XProf's plug-in"
    )
    return rows, note
