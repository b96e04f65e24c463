"""The four programs of training (forward, loss, gradient and step), and the report of `jaxgpt inspect` on them."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import matmul, model, prng
from jaxgpt.cli import memory
from jaxgpt.config import Config, ModelConfig
from jaxgpt.data import Batch
from jaxgpt.display.text import percent
from jaxgpt.monitor import cost
from jaxgpt.monitor.chips import flops_per_token
from jaxgpt.profile import hlo, roofline, trace
from jaxgpt.profile.report import Report, Rows, cell, facts
from jaxgpt.profile.roofline import Machine
from jaxgpt.profile.timing import repeat, series
from jaxgpt.sharding import one_device, replicated
from jaxgpt.step import DROPOUT, init_state, loss_and_grads, sharded_init, stream_key, train_step

SHOWN = 12
"""Rows of long tables: matmuls, instructions, operations of a profile."""
TRACED = 5
"""Steps of a profile."""
NOTES = (
    "by formula: flops_per_token, three times that with the backward pass. compiled: of the optimized program; more "
    "with remat, chunked logits or Muon, fewer where a library's kernel or, from 256 tokens, blocks compute attention.",
    "XLA: all FLOPs, before and after optimization; the body of a loop counts once, custom calls as nothing.",
    "compulsory: arguments and results of a program, once. XLA's bytes: reads and writes of each operation before "
    "optimization, and of each fusion after it.",
    "gradient minus loss: the cost of the backward pass. memory: donated arguments count once.",
)


@dataclass(frozen=True)
class Program:
    """A jitted function of arrays with given shapes, compiled on first use."""

    jitted: Any
    shapes: tuple[Any, ...]
    formula_flops: int  # of matmuls, by `chips.flops_per_token`

    @cached_property
    def traced(self) -> Any:
        return self.jitted.trace(*self.shapes)

    @cached_property
    def lowered(self) -> Any:
        return self.traced.lower()

    @cached_property
    def compiled(self) -> Any:
        return self.lowered.compile()

    @property
    def bytes(self) -> int:
        """Compulsory memory traffic: arguments and results, once."""
        arrays = jax.tree.leaves((self.shapes, self.traced.out_info))
        return sum(x.size * x.dtype.itemsize for x in arrays)

    @cached_property
    def text(self) -> str:
        """Optimized HLO."""
        return self.compiled.as_text() or ""


def programs(config: Config) -> dict[str, Program]:
    """The programs of `config`, its vocab_size known, by name; nothing is compiled yet."""
    B, T = config.train.batch_size, config.model.block_size
    state, idx = jax.eval_shape(init_state, config), jax.ShapeDtypeStruct((B, T), jnp.int32)
    forward = flops_per_token(config.model) * B * T

    def loss(params: model.Params, batch: Batch) -> jax.Array:
        return model.losses(config.model, params, batch.inputs, batch.targets).mean()

    def gradient(params: model.Params, batch: Batch) -> Any:
        key = stream_key(config.train.seed, DROPOUT) if config.model.dropout else None
        return loss_and_grads(config, params, batch, key)

    batch = Batch(idx, idx)
    return {
        "forward": Program(jax.jit(partial(model.forward, config.model)), (state.params, idx), forward),
        "loss": Program(jax.jit(loss), (state.params, batch), forward),
        "gradient": Program(jax.jit(gradient), (state.params, batch), 3 * forward),
        "step": Program(jax.jit(partial(train_step, config), donate_argnums=0), (state, batch), 3 * forward),
    }


def xla_counts(stage: Any) -> dict[str, float]:
    """XLA's cost analysis of a lowered or compiled function, in millions: "flops", "bytes accessed" and others."""
    return {name: count / 1e6 for name, count in (stage.cost_analysis() or {}).items()}


def inspect(config: Config, name: str, *, measured: bool = True, trace_folder: Path | None = None) -> Report:
    """A report on `config`, its vocab_size known, called `name`, on the first device. If `measured`, some steps are
    profiled, into `trace_folder` if there is one, and the machine and the step are timed. Raises OutOfMemoryError if
    these steps do not fit into memory."""
    machine = facts()
    if measured:
        memory.require(config)
    found = programs(config)
    step = found["step"]
    tables = {
        f"Parameters of {name}": parameter_rows(config.model),
        "Each program: FLOPs in millions, bytes in MB": program_rows(found),
        "Matmuls of a step, with the kernel of each": matmul_rows(step.text),
    }
    calls = ", ".join(sorted(hlo.custom_calls(step.text)))
    notes, figures = [cost.describe(config.model), *NOTES, f"custom calls: {calls or 'none'}"], dict[str, Any]()
    if measured:
        longest, more, figures = measure(config, step, trace_folder)
        tables |= {"Roofline, part by part": figures["rows"], "Operations of a step that took longest": longest}
        notes += more
    titled = [{"title": title, "rows": rows} for title, rows in tables.items()]
    return {"mode": f"inspecting {name}", "facts": machine, "tables": titled, "notes": notes, "roofline": figures}


def shares(rows: Rows, column: str) -> Rows:
    """Each row with its share of the sum of a column."""
    total = sum(row[column] for row in rows) or 1
    return [row | {"share, %": 100 * row[column] / total} for row in rows]


def parameter_rows(config: ModelConfig) -> Rows:
    """A row for each parameter, those of all blocks in one, and the total."""
    unrolled = replace(config, scan_layers=False)
    params = jax.eval_shape(lambda: model.init_params(unrolled, prng.key(0)))
    found = Counter[tuple[str, tuple[int, ...]]]()  # elements of the parameters of this name and shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found[re.sub(r"^h_\d+/", "h_*/", "/".join(key.key for key in path)), leaf.shape] += leaf.size
    rows: Rows = [
        {
            "module": name,
            "shape": " x ".join(map(str, shape)),
            "blocks": config.n_layer if name.startswith("h_*") else None,
            "count": count,
        }
        for (name, shape), count in found.items()
    ]
    return [*shares(rows, "count"), {"module": "total", "count": cost.n_params(config), "share, %": 100.0}]


def program_rows(found: dict[str, Program]) -> Rows:
    """A row for each figure, with a column for each program: by formula, of its HLO, and by XLA's analyses where the
    backend has them."""
    rows = defaultdict[str, dict[str, float | None]](dict)
    for name, program in found.items():
        before, after = xla_counts(program.lowered), xla_counts(program.compiled)
        figures = {
            "FLOPs of matmuls, by formula": program.formula_flops / 1e6,
            "FLOPs of matmuls, compiled": sum(each.flops for each in hlo.matmuls(program.text)) / 1e6,
            "FLOPs, XLA": before.get("flops"),
            "FLOPs, XLA, optimized": after.get("flops"),
            "exp, log, roots": before.get("transcendentals"),
            "bytes, compulsory": program.bytes / 1e6,
            "bytes, XLA": before.get("bytes accessed"),
            "bytes, XLA, optimized": after.get("bytes accessed"),
        }
        if stats := program.compiled.memory_analysis():
            figures |= {
                "memory, arguments": (arguments := stats.argument_size_in_bytes / 1e6),
                "memory, results": (results := stats.output_size_in_bytes / 1e6),
                "memory, temporaries": (temporaries := stats.temp_size_in_bytes / 1e6),
                "memory, donated": (donated := -stats.alias_size_in_bytes / 1e6),
                "memory, total": arguments + results + temporaries + donated,
            }
        for figure, value in figures.items():
            rows[figure][name] = value
    return [{"figure": figure, **values} for figure, values in rows.items()]


def matmul_rows(text: str) -> Rows:
    """The matmuls of a program that take most FLOPs, by shape and kernel."""
    rows: Rows = [
        {"operands": each.shapes, "computed by": each.kernel, "times": each.runs, "MFLOP": each.flops / 1e6}
        for each in hlo.matmuls(text)
    ]
    return shares(rows, "MFLOP")[:SHOWN]


def stepper(config: Config, step: Program) -> Callable[[], int]:
    """A function that runs one compiled step on random tokens, and returns 1."""
    shape = (2, config.train.batch_size, config.model.block_size)
    ids = np.random.default_rng(0).integers(config.model.vocab_size, size=shape).astype(np.int32)
    batch, state = Batch(*jax.device_put(ids, replicated(one_device()))), [sharded_init(config, one_device())]

    def run() -> int:
        state[0], _ = step.compiled(state[0], batch)
        jax.block_until_ready(state[0])
        return 1

    run()
    return run


def measure(config: Config, step: Program, folder: Path | None) -> tuple[Rows, list[str], dict[str, Any]]:
    """The longest operations, notes, and the roofline: rates of the machine, and a row for each part. The profile is
    kept in `folder`."""
    precision, run = matmul.resolve(config.model.precision), stepper(config, step)
    first = roofline.measure_machine(precision)
    times = [took / n for n, took in (repeat(run, 0.3) for _ in range(5))]
    lines = trace.capture(folder, lambda: [run() for _ in range(TRACED)])
    last = roofline.measure_machine(precision)  # the machine may have been slower at either end
    machine = Machine(*map(max, zip(first, last, strict=True)))
    peak, bandwidth = machine.flops / 1e9, machine.bandwidth / 1e9
    ran, known = trace.operations(lines), hlo.instructions(step.text)
    modules = [name for row in parameter_rows(config.model) for name in row["module"].split("/")[:-1]]
    took, tokens = statistics.median(times), config.train.batch_size * config.model.block_size
    notes = [
        f"measured here, by JAX: {peak:,.0f} GFLOP/s in {precision} matmuls of {roofline.N} x {roofline.N}, "
        f"{bandwidth:.1f} GB/s through an array of {4 * roofline.STREAMED / 1e6:,.0f} MB; the ridge is at "
        f"{machine.ridge:.1f} FLOP/byte. A part above its roof has its arrays in caches",
        f"a step of {tokens:,} tokens takes {cell(series([1e3 * each for each in times]))} ms, "
        f"{tokens / took:,.0f} tokens/s: its matmuls, {step.formula_flops:.3g} FLOPs, use "
        f"{percent(step.formula_flops / took / machine.flops)} of the machine's peak",
        f"profiled: {cell(1e3 * sum(each.seconds for each in ran) / TRACED)} ms of work per step, which threads share, "
        f"in {len(ran)} operations; programs dispatched per step: {trace.dispatches(lines) / TRACED:g}. A "
        "fusion belongs to the part of its last operation. FLOPs and bytes are those of the optimized program, every "
        "iteration of a loop included",
    ]
    if folder:
        viewers = f"https://ui.perfetto.dev, or tensorboard --logdir {folder} with XProf's plug-in"
        notes.append(f"the profile of {TRACED} steps is in {folder}: open its .trace.json.gz in {viewers}")
    rows = roofline.rows(known, ran, TRACED, modules, machine)
    return operation_rows(known, ran), notes, {"peak, GFLOP/s": peak, "bandwidth, GB/s": bandwidth, "rows": rows}


def operation_rows(known: dict[str, hlo.Instruction], ran: list[trace.Operation]) -> Rows:
    """The operations that took longest, those of all blocks in one row."""
    found: dict[tuple[str, str | None], dict[str, Any]] = {}
    for each in ran:
        instruction = known.get(each.name)
        origin, kernel = (instruction.origin, instruction.kernel) if instruction else ("", None)
        new = {"comes from": origin or each.name, "computed by": kernel, "times a step": 0.0, "ms a step": 0.0}
        row = found.setdefault((origin or each.name, kernel), new)
        row["times a step"] += each.runs / TRACED
        row["ms a step"] += 1e3 * each.seconds / TRACED
    return shares(sorted(found.values(), key=lambda row: -row["ms a step"]), "ms a step")[:SHOWN]
