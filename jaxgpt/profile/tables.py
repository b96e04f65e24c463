"""What can be told of a config without running it, row by row: parameters, counts, memory, products, fusions."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from jaxgpt import memory
from jaxgpt import model as nn
from jaxgpt.config import Config
from jaxgpt.profile import parameters, programs
from jaxgpt.profile.seams import Seam, xla

SHOWN = 12
"""Rows of what could be endless: products, fusions, operations of a profile."""


def parameter_rows(config: Config) -> list[dict[str, Any]]:
    """A row for each kind of array, and the sum."""
    found = parameters.rows(config.model)
    total = sum(row.size for row in found)
    rows = [
        {
            "module": row.module,
            "shape": " x ".join(map(str, row.shape)),
            "blocks": row.times if row.module.startswith("h_*") else None,
            "count": row.size,
            "share, %": 100 * row.size / total,
        }
        for row in found
    ]
    return [*rows, {"module": "in all", "count": total, "share, %": 100.0}]


def operation_rows(at: dict[str, Seam]) -> list[dict[str, Any]]:
    """Millions of operations of the four seams, and of what the backward pass adds."""

    def count(seam: Seam) -> dict[str, float | None]:
        before, after = xla(seam.lowered), xla(seam.compiled)
        return {
            "products on paper": seam.paper / 1e6,
            "traced": seam.products / 1e6,
            "XLA, all": _millions(before, "flops"),
            "XLA, optimised": _millions(after, "flops"),
            "exp, log, roots": _millions(before, "transcendentals"),
        }

    return _with_backward({name: count(seam) for name, seam in at.items()})


def byte_rows(at: dict[str, Seam]) -> list[dict[str, Any]]:
    """Millions of bytes of the four seams, and of what the backward pass adds."""

    def count(seam: Seam) -> dict[str, float | None]:
        before, after = xla(seam.lowered), xla(seam.compiled)
        return {
            "moved at least": seam.moved / 1e6,
            "XLA, nothing fused": _millions(before, "bytes accessed"),
            "XLA, optimised": _millions(after, "bytes accessed"),
        }

    return _with_backward({name: count(seam) for name, seam in at.items()})


def _with_backward(rows: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    loss, gradient = rows["loss"], rows["gradient"]
    backward = {key: _minus(gradient[key], loss[key]) for key in loss}
    done = [{"program": name, **row} for name, row in rows.items()]
    return [*done[:3], {"program": "backward (gradient - loss)", **backward}, *done[3:]]


def differences(config: Config, at: dict[str, Seam]) -> Iterator[str]:
    """Why the counts differ, in sentences; only what holds for this config."""
    forward, gradient = at["forward"], at["gradient"]
    T, model = config.model.block_size, config.model
    if forward.products == forward.paper and gradient.products == gradient.paper:
        yield "the products on paper are those that are traced, forward and backward, to the last operation"
    if forward.products != forward.paper:
        why = f"attention goes block by block and skips blocks of the masked half (T {T})"
        kernel = nn.kernels.kernel(model, T, False)
        why = why if kernel == "blocked" else f"attention is {kernel}'s, of whose operations a jaxpr says nothing"
        yield f"forward, {forward.products / max(1, forward.paper):.0%} of the products on paper are traced: {why}"
    if gradient.products > gradient.paper:
        again = (
            f"remat {model.remat} computes forward products again"
            if model.remat != "none"
            else "blocks of attention, or parts of the logits, are computed again"
        )
        share = f"{gradient.products / gradient.paper:.0%} of the products on paper"
        yield f"the gradient has {share}: {again} in the backward pass"
    if at["step"].products > gradient.products:
        more = (at["step"].products - gradient.products) / 1e6
        yield f"the optimizer has {more:,.0f} MFLOP of products of its own (Muon's Newton-Schulz steps)"
    before, after = (xla(stage).get("flops") for stage in (gradient.lowered, gradient.compiled))
    loops = " while(" in gradient.text
    if before and gradient.products and not loops:
        yield (
            f"XLA counts the products and, an operation for each element, all else (norms, softmax, the non-linearity, "
            f"the loss): before it optimises {before / gradient.products - 1:+.1%} beside the products of the gradient"
        )
    if before and after and not loops:
        yield (
            f"what it has optimised counts {after / before - 1:+.1%}: fusions that each compute an element which they "
            "share, against what was simplified away"
        )
    if loops:
        yield "XLA counts the body of a loop (scanned blocks, micro-batches) once, however often it runs"
    if libraries := sorted(hlo_calls(at["step"])):
        yield f"what a library computes in a custom call counts as nothing to XLA: {', '.join(libraries)}"
    yield (
        "moved at least: the arguments and results of a program, once. XLA's bytes are those that each operation reads "
        "and writes: of all operations before it optimises, then of fusions, which keep what is between to themselves"
    )


def hlo_calls(step: Seam) -> set[str]:
    """The libraries' kernels in a program, by their targets."""
    return {each.kernel for each in programs.instructions(step.text).values() if each.op == "custom-call"}


def memory_rows(config: Config) -> list[dict[str, Any]]:
    """What a step holds, by kind (`memory.needed`)."""
    found = memory.needed(config, 0)
    kinds = ("parameters", "gradients", "optimizer_state", "activations", "total")
    said = {
        "parameters": "float32",
        "gradients": "of all parameters at once",
        "optimizer_state": "AdamW's two moments, Muon's one",
        "activations": f"of a micro-batch of {config.train.batch_size // config.train.accumulate}, from below",
        "total": "gradients take the place of activations: of the two the larger, with micro-batches both",
    }
    return [{"kind": kind.replace("_", " "), "MB": getattr(found, kind) / 1e6, "what": said[kind]} for kind in kinds]


def program_rows(at: dict[str, Seam]) -> list[dict[str, Any]]:
    """XLA's own analysis of each program; none where the backend gives no figures."""
    rows = []
    for name, seam in at.items():
        stats = seam.compiled.memory_analysis()
        if stats is None:
            continue
        sizes = {
            "arguments": stats.argument_size_in_bytes,
            "results": stats.output_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "overwritten": -stats.alias_size_in_bytes,
        }
        rows.append(
            {"program": name}
            | {f"{key}, MB": size / 1e6 for key, size in sizes.items()}
            | {"in all, MB": sum(sizes.values()) / 1e6}
        )
    return rows


def product_rows(step: Seam) -> list[dict[str, Any]]:
    """The products of the optimised program by shape and kernel, and what share of its products each is."""
    found = programs.products(step.text)
    total = sum(product.flops for product in found)
    rows = [
        {
            "operands": product.shapes,
            "computed by": product.kernel,
            "times": product.runs,
            "MFLOP": product.flops / 1e6,
            "share, %": 100 * product.flops / total,
        }
        for product in found[:SHOWN]
    ]
    rest = found[SHOWN:]
    if rest:
        flops = sum(product.flops for product in rest)
        rows.append(
            {
                "operands": "all others",
                "times": sum(product.runs for product in rest),
                "MFLOP": flops / 1e6,
                "share, %": 100 * flops / total,
            }
        )
    by: Counter[str] = Counter()
    for product in found:
        by[product.kernel] += product.flops
    return rows + [
        {"operands": "in all", "computed by": kernel, "MFLOP": flops / 1e6, "share, %": 100 * flops / total}
        for kernel, flops in by.most_common()
    ]


def fusion_rows(step: Seam) -> list[dict[str, Any]]:
    """How many instructions of each kind the program runs."""
    found = programs.instructions(step.text).values()
    kinds: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for each in found:
        if each.op not in programs.FREE:
            kinds[each.kernel] += each.runs
            inside[each.kernel] += each.runs * max(1, len(each.inside))
    shown = kinds.most_common(SHOWN)
    return [{"kind": kind, "run in a step": n, "operations in them": inside[kind]} for kind, n in shown]


def largest_rows(step: Seam) -> list[dict[str, Any]]:
    """The fusions that fuse most, of each origin the largest."""
    first: dict[str, programs.Instruction] = {}
    for each in programs.fusions(programs.instructions(step.text)):
        first.setdefault(each.origin, each)
    return [
        {
            "fusion": each.name,
            "operations": len(each.inside),
            "mostly": ", ".join(f"{n} {op}" for op, n in Counter(each.inside).most_common(2)),
            "result, MB": each.bytes / 1e6,
            "comes from": each.origin or None,
        }
        for each in list(first.values())[: SHOWN // 2]
    ]


def _millions(count: dict[str, float], name: str) -> float | None:
    return count[name] / 1e6 if name in count else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
