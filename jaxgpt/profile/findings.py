"""All that is found about one config, as a report of tables and notes."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import cost, memory
from jaxgpt import matmul as numerics
from jaxgpt import model as nn
from jaxgpt.bench import peak, profile, ruler
from jaxgpt.bench.facts import facts
from jaxgpt.bench.table import Report
from jaxgpt.config import Config
from jaxgpt.data import Batch
from jaxgpt.placement import ONE_DEVICE, fresh
from jaxgpt.profile import programs, roofline, tables
from jaxgpt.profile.roofline import Machine, Work
from jaxgpt.profile.seams import Seam, seams
from jaxgpt.profile.tables import SHOWN


def inspect(config: Config, name: str, *, measured: bool = True, trace: Path | None = None) -> Report:
    """A report on `config`, its vocab_size known, called `name`, on the first device.

    Args:
      measured: also time the machine, each part and the step; else only count and compile.
      trace: a folder for a profile of some steps.

    Raises:
      OutOfMemoryError: what is to be measured does not fit.
    """
    if measured or trace:
        memory.require(config)
    at = seams(config)
    report: Report = {"mode": f"inspecting {name}", "facts": _facts(), "failed": {}}
    report["tables"] = [
        {"title": f"Parameters of {name}", "rows": tables.parameter_rows(config)},
        {"title": "Operations, in millions: products on paper, and what XLA counts", "rows": tables.operation_rows(at)},
        {"title": "Bytes, in millions", "rows": tables.byte_rows(at)},
        {"title": "Memory by kind, on paper", "rows": tables.memory_rows(config)},
        {"title": "Memory of each program, by XLA", "rows": tables.program_rows(at)},
        {"title": "Products of a step, and what computes them", "rows": tables.product_rows(at["step"])},
        {"title": "Fusions of a step, by kind", "rows": tables.fusion_rows(at["step"])},
        {"title": "The largest fusions of a step", "rows": tables.largest_rows(at["step"])},
    ]
    report["notes"] = [nn.describe(config.model), *tables.differences(config, at)]
    step = Stepper(config, at["step"]) if measured or trace else None
    if measured and step:
        before, own = ruler.machine_seconds(), time.process_time()
        works, precision = roofline.works(config), numerics.resolve(config.model.precision)
        peaks = [peak.here(precision)]
        seconds, steps = roofline.measure(works), step.seconds()
        peaks.append(peak.here(precision))  # the machine may have been slower at either end
        machine = Machine(*map(max, zip(*peaks, strict=True)))
        report["tables"].append({"title": "Roofline, part by part", "rows": roofline_rows(works, seconds, machine)})
        share = ruler.others(before, ruler.machine_seconds(), time.process_time() - own)
        report["notes"].append(ruler.disturbance([] if share is None else [share]))
        report["notes"] += measured_notes(config, machine, works, seconds, steps)
        report["roofline"] = {
            "peak_flops": machine.flops,
            "bandwidth": machine.bandwidth,
            "works": [{**work._asdict(), "call": None, "seconds": s} for work, s in zip(works, seconds, strict=True)],
        }
    if trace and step:
        rows, note = profiled(step, trace)
        report["tables"].append({"title": "Operations of a step that took longest", "rows": rows})
        report["notes"].append(note)
    return report


def texts(config: Config, jaxpr: Sequence[str], hlo: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(file name, text) of the jaxpr and of the optimised HLO of the seams that are named."""
    at = seams(config)
    yield from ((f"{name}.jaxpr.txt", str(at[name].traced.jaxpr)) for name in jaxpr)
    yield from ((f"{name}.hlo.txt", at[name].text) for name in hlo)


class Stepper:
    """The compiled step on a state and random tokens of its own."""

    def __init__(self, config: Config, step: Seam):
        self.compiled, self.state = step.compiled, fresh(config, ONE_DEVICE)
        self.text = step.text
        shape = (config.train.batch_size, config.model.block_size)
        ids = np.random.default_rng(0).integers(config.model.vocab_size, size=(2, *shape)).astype(np.int32)
        self.batch = Batch(*jax.device_put(ids, ONE_DEVICE.everywhere))
        self.run()

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.state, _ = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)

    def seconds(self, rounds: int = 5, seconds: float = 0.3) -> list[float]:
        """Of a step, round by round, each of `seconds` and a step at least."""
        times = []
        for _ in range(rounds):
            n, began = 0, time.perf_counter()
            while not n or time.perf_counter() - began < seconds:
                self.run()
                n += 1
            times.append((time.perf_counter() - began) / n)
        return times


def roofline_rows(works: list[Work], seconds: list[float], machine: Machine) -> list[dict[str, Any]]:
    """Each part, forward alone and with its backward pass."""
    return [
        {
            "part": work.part + ("" if not work.training or work.part == "optimizer" else ", + backward"),
            "times": work.times,
            "MFLOP": work.flops / 1e6,
            "MB": work.bytes / 1e6,
            "FLOP/byte": work.intensity,
            "bound by": "products" if work.intensity > machine.ridge else "memory",
            "least, ms": 1e3 * machine.least(work),
            "measured, ms": 1e3 * took,
            "GFLOP/s": work.flops / took / 1e9,
            "of the roof, %": 100 * machine.least(work) / took,
        }
        for work, took in zip(works, seconds, strict=True)
    ]


def measured_notes(
    config: Config, machine: Machine, works: list[Work], seconds: list[float], step: list[float]
) -> Iterator[str]:
    """The machine, and what share of it a step uses."""
    took = statistics.median(step)
    tokens = config.train.batch_size * config.model.block_size
    flops = 3 * cost.flops_per_token(config.model) * tokens
    precision = numerics.resolve(config.model.precision)
    yield (
        f"measured here, by JAX: {machine.flops / 1e9:,.0f} GFLOP/s in {precision} products of {peak.N} x {peak.N}, "
        f"{machine.bandwidth / 1e9:.1f} GB/s through an array of {4 * peak.STREAMED / 1e6:,.0f} MB; the ridge is at "
        f"{machine.ridge:.1f} FLOP/byte. A part above its roof has its arrays in caches"
    )
    yield (
        f"a step of {tokens:,} tokens takes {1e3 * took:.1f} ms ({1e3 * min(step):.1f} to {1e3 * max(step):.1f}), "
        f"{tokens / took:,.0f} tokens/s: its products, {flops / 1e9:.2f} GFLOP, use "
        f"{flops / took / machine.flops:.0%} of what the machine can multiply"
    )
    spent = [
        (w.times * s * (1 if w.part == "optimizer" else config.train.accumulate), w.part)
        for w, s in zip(works, seconds, strict=True)
        if w.training
    ]
    parts, (longest, part) = sum(s for s, _ in spent), max(spent)
    why = "what the step fuses across them it saves" if parts > took else "each runs with its own arrays in caches"
    yield (
        f"the parts one by one, with their backward passes and the optimizer, take {1e3 * parts:.1f} ms, "
        f"{parts / took:.0%} of the step: {why}; most of it {part}, {1e3 * longest:.1f} ms"
    )


def profiled(step: Stepper, folder: Path, steps: int = 5) -> tuple[list[dict[str, Any]], str]:
    """The operations of some steps by their own time, and where the trace lies."""
    events = profile.capture(folder, lambda: step.run(steps))
    found, known = profile.operations(events), programs.instructions(step.text)
    total = sum(each.seconds for each in found) or 1.0
    runs: Counter[tuple[str, str]] = Counter()
    seconds: Counter[tuple[str, str]] = Counter()
    for each in found:
        instruction = known.get(each.name)
        key = (instruction.origin or each.name, instruction.kernel) if instruction else (each.name, "")
        runs[key] += each.runs
        seconds[key] += each.seconds  # type: ignore[assignment]
    rows = [
        {
            "comes from": key[0],
            "computed by": key[1] or None,
            "times a step": runs[key] / steps,
            "ms a step": 1e3 * spent / steps,
            "share, %": 100 * spent / total,
        }
        for key, spent in seconds.most_common(SHOWN)
    ]
    said = (
        f"{steps} steps were traced into {folder}: {len(found)} operations, {1e3 * total / steps:.1f} ms of work a "
        f"step, {profile.dispatches(events) / steps:g} programs handed over a step. Open the .trace.json.gz in "
        f"https://ui.perfetto.dev, or tensorboard --logdir {folder} with XProf's plug-in"
    )
    return rows, said


def _facts() -> dict[str, Any]:
    device = jax.local_devices()[0]
    return facts(device.platform) | {"device": f"{device.platform}, {device.device_kind}"}
