"""Plans, estimates and rankings, printed."""

from collections.abc import Iterator, Sequence

from rich.filesize import decimal as size

from jaxgpt.cli.mesh import check
from jaxgpt.config import Config, UsageError
from jaxgpt.display.text import count, percent, span
from jaxgpt.monitor import cost
from jaxgpt.monitor.chips import CHIPS
from jaxgpt.monitor.terminal import RunConsole
from jaxgpt.plan import plan
from jaxgpt.plan.estimate import Step, estimate
from jaxgpt.plan.topology import PlanError, topology
from jaxgpt.sharding import Sizes

SHOWN = 10
"""Rows of a ranking."""
KERNELS = {
    "tpu_custom_call": "splash attention",
    "__cudnn$fmhaSoftmax": "cuDNN's attention",
    "__gpu$xla.gpu.triton": "jaxgpt's attention",
}
"""Custom calls in the programs of TPUs and GPUs."""
COLUMNS = ("chips", "mesh", "batch", "accumulate", "memory per chip", "ms per step", "tokens/s", "utilization")


def print_estimates(config: Config, kind: str, chips: Sequence[int], mesh: str, sweep: bool) -> bool:
    """Print the estimate for a mesh of chips of a kind or, if it is "auto", a ranking of meshes, for several numbers of
    chips the best of each; return whether the step, or each best, fits."""
    if kind not in CHIPS:
        raise PlanError(f"no chip {kind!r}: expected one of {', '.join(CHIPS)}")
    chip, config = CHIPS[kind], plan.resolved(config)
    if mesh != "auto":
        check(config, sizes := Sizes.parse(mesh))
        if list(chips) != [sizes.devices]:
            raise PlanError(f"the mesh {sizes} has {count(sizes.devices, 'chip')}: give --chips {sizes.devices}")
        plan.require_pods(chip, sizes)
        bests = [estimate(config, chip, sizes)]
        lines = estimated(kind, bests[0])
    else:
        shown = SHOWN if len(chips) == 1 else 1
        rankings = [plan.ranked(config, chip, n, sweep)[:shown] for n in chips]
        bests, lines = [steps[0] for steps in rankings], table([step for steps in rankings for step in steps])
    RunConsole().print(*lines, sep="\n")
    return all(step.fits for step in bests)


def print_plan(config: Config, name: str, mesh: str, sweep: bool) -> bool:
    """Print the step compiled for a topology, with `sweep` on the best mesh of a ranking, or its estimate if it is too
    large for the compiler; return whether it fits."""
    console, (chip, devices) = RunConsole(), topology(name)
    config = plan.resolved(config, "bfloat16" if chip else "float32")
    asked = None if mesh == "auto" else Sizes.parse(mesh)
    if sweep:
        if chip is None:
            raise UsageError("--sweep ranks by the rates of chips, which virtual devices lack: another --topology")
        steps = plan.ranked(config, chip, len(devices), sweep=True)
        console.print(*table(steps[:SHOWN]), sep="\n")
        config, asked = steps[0].config, steps[0].sizes
    sizes = plan.mesh(config, chip, devices, asked)
    try:
        found = plan.plan(config, chip, devices, sizes)
        fits, lines = found.step.fits, compiled(name, found)
    except plan.TooLargeError as error:
        if chip is None:
            raise
        fits, lines = False, estimated(name, estimate(config, chip, sizes), str(error))
    console.print(*lines, sep="\n")
    return fits


def compiled(name: str, found: plan.Plan) -> Iterator[str]:
    """A plan compiled for a topology, the verdict last."""
    step, matmuls = found.step, ", ".join(found.matmuls) or "none"
    kernels = ", ".join(name for call, name in KERNELS.items() if call in found.kernels) or "none"
    yield f"{about(step, name)}; compiled in {found.seconds_to_compile:.0f} s"
    yield f"  matmuls in the program: {matmuls}; custom kernels: {kernels}"
    yield from costs(step, "by the compiler")
    if step.chip:
        guess = estimate(step.config, step.chip, step.sizes)
        yield f"  estimated: {size(guess.memory)}, communication {ms(guess.seconds['communication'], 1)} ms"
    yield f"verdict: {verdict(step)}"


def estimated(name: str, step: Step, refused: str = "") -> Iterator[str]:
    """An estimate for chips of that name, the verdict last; `refused` is the compiler's message if the step is too
    large for it."""
    yield f"{about(step, name)}; " + (f"the compiler refuses:\n  {refused}" if refused else "nothing was compiled")
    yield from costs(step, "estimated")
    yield f"verdict: {f'it does not fit: {suggestion(step)}' if refused else verdict(step)}"


def about(step: Step, chips: str) -> str:
    model, train = step.config.model, step.config.train
    return (
        f"{cost.n_params(model):,} parameters, mesh {step.sizes}: steps of {train.batch_size} x {model.block_size} "
        f"tokens in {count(train.accumulate, 'micro-batch')}, on {count(step.sizes.devices, 'chip')} ({chips})"
    )


def costs(step: Step, how: str) -> Iterator[str]:
    """Memory, communication and time of a chip."""
    yield f"per chip, {how}:"
    held = f"state and tokens {size(step.arguments)}, temporaries {size(step.temporaries)}"
    yield f"  {held}: {size(step.memory)}" + (f" of {size(int(step.chip.memory))}" if step.chip else "")
    for (kind, n), (times, n_bytes) in step.collectives.items():
        among = f" among {n}" if kind != "collective-permute" else ""
        yield f"  {kind}{among}: {times:,} per step, {size(n_bytes)}"
    if step.network:
        yield f"  between pods: {size(int(step.network))}"
    if step.chip:
        seconds = ", ".join(f"{name} {ms(value, 1)} ms" for name, value in step.seconds.items())
        more = "Muon and recomputation" if step.config.optimizer.algorithm == "muon" else "recomputation"
        yield f"  {seconds} ({step.flops:.3g} FLOPs, {step.computed / step.flops:.2f} times with {more})"
        bounds = step.bounds[::-1]
        speeds = (f"{step.tokens / each:,.0f}" for each in bounds)
        yield (
            f"  a step in {span(*map(ms, bounds))} ms, {span(*speeds)} tokens/s, utilization "
            f"{span(*map(percent, step.utilization))}\n"
            "  (at published rates of matmuls, memory and links; programs reach about half of the first two"
            + (". The first figure overlaps no communication, the second all of it)" if step.collectives else ")")
        )


def ms(seconds: float, digits: int = 0) -> str:
    """Milliseconds with so many decimals; those below 10 have two significant digits."""
    return f"{1000 * seconds:,.{digits}f}" if seconds >= 0.01 else f"{1000 * seconds:.2g}"


def verdict(step: Step) -> str:
    """Whether a step fits and, if not, a `suggestion`."""
    if step.chip is None:
        return "it compiles"
    if step.fits:
        more = step.memory > step.chip.allocated
        return "it fits" + (", with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 75% by default" if more else "")
    if step.memory > step.chip.memory:
        return f"it does not fit, by {size(int(step.memory - step.chip.memory))}: {suggestion(step)}"
    return (
        f"it may not fit: the estimate is {step.memory / step.chip.memory:.0%} of the memory, and only up to "
        f"{step.room:.0%} is safe: {suggestion(step)}"
    )


def suggestion(step: Step) -> str:
    """What may take less memory."""
    remat = "" if step.config.model.remat == "blocks" else " --remat blocks,"
    return f"try another --mesh or a larger --accumulate (--sweep ranks them),{remat} or more chips"


def table(steps: list[Step]) -> Iterator[str]:
    """Steps as rows of Markdown, with times and rates as if no communication were overlapped."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "| --- " * len(COLUMNS) + "|"
    for step in steps:
        train, (_, most), memory = step.config.train, step.bounds, size(step.memory)
        memory += "" if step.fits else ", too much or nearly"
        cells = [step.sizes.devices, step.sizes, train.batch_size, train.accumulate, memory, ms(most)]
        yield f"| {' | '.join(map(str, cells))} | {step.tokens / most:,.0f} | {percent(step.utilization[0])} |"
