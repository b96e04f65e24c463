"""A plan as lines of text."""

from collections.abc import Iterator
from dataclasses import replace

from jaxgpt.cli.memory import size
from jaxgpt.cli.mesh import divisors
from jaxgpt.config import Config, replaced
from jaxgpt.monitor import cost
from jaxgpt.plan.estimate import Step, estimate
from jaxgpt.plan.plan import Plan, possible
from jaxgpt.sharding import Sizes

ASSUMED = (
    "  (at the published rates of matmuls and memory, of which programs reach about half, and of the torus links; "
    "communication is not overlapped in the first figure, fully in the second)"
)


def compiled(config: Config, topology: str, plan: Plan) -> Iterator[str]:
    """A plan compiled for a topology, the verdict last."""
    matmuls = ", ".join(f"{n} of {types}" for types, n in plan.matmuls.most_common())
    kernels = "splash attention" if "tpu_custom_call" in plan.kernels else "none"
    yield f"{about(config, plan.step.sizes)} of {topology}; compiled in {plan.seconds_to_compile:.0f} s"
    yield f"  matmuls in the program: {matmuls or 'none'}; custom kernels: {kernels}"
    guess = estimate(config, plan.step.chip, plan.step.sizes) if plan.step.chip else None
    yield from costs(config, plan.step, "by the compiler", guess)


def estimated(config: Config, name: str, step: Step, why: str = "") -> Iterator[str]:
    """An estimate for chips of that name; `why` the compiler refuses the step, if it does."""
    yield f"{about(config, step.sizes)} {name}; " + ("the compiler refuses:" if why else "nothing was compiled")
    yield from [f"  {why}"] if why else []
    yield from costs(config, step, "estimated", refused=bool(why))


def about(config: Config, sizes: Sizes) -> str:
    train = config.train
    return (
        f"{cost.n_params(config.model):,} parameters, mesh {sizes}: steps of {train.batch_size} x "
        f"{config.model.block_size} tokens in {train.accumulate} micro-batches, on {sizes.devices} chips"
    )


def costs(config: Config, step: Step, how: str, guess: Step | None = None, refused: bool = False) -> Iterator[str]:
    """Memory, communication and time of a chip, and the verdict."""
    yield f"per chip, {how}:"
    held = f"state and tokens {size(step.arguments)}, temporaries {size(step.temporaries)}"
    yield f"  {held}: {size(step.memory)}" + (f" of {size(step.chip.memory)}" if step.chip else "")
    for (kind, n), (times, n_bytes) in step.collectives.items():
        among = f" among {n}" if kind != "collective-permute" else ""
        yield f"  {kind}{among}: {times:,} per step, {size(n_bytes)}"
    if step.network:
        yield f"  between pods: {size(step.network)}"
    if step.chip:
        seconds = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in step.seconds.items())
        yield f"  {seconds} ({step.flops:.3g} FLOPs, {step.computed / step.flops:.2f} times with recomputation)"
        n_tokens, (least, most) = config.train.batch_size * config.model.block_size, step.bounds
        slow, fast = step.utilisation
        yield (
            f"  a step in {1000 * most:.0f} to {1000 * least:.0f} ms, {n_tokens / most:,.0f} to "
            f"{n_tokens / least:,.0f} tokens/s, utilisation {slow:.0%} to {fast:.0%}"
        )
        yield ASSUMED
        if step.precision == "float32":
            kind = "bfloat16" if step.chip.torus else "TF32"
            yield f"  (float32 matmuls at the rate of {kind}, which is JAX's default there)"
    if guess:
        yield f"  estimated: {size(guess.memory)}, communication {1000 * guess.seconds['communication']:.1f} ms"
    yield f"verdict: {f'it does not fit: {suggestion(config, step)}' if refused else verdict(config, step)}"


def verdict(config: Config, step: Step) -> str:
    if step.chip is None:
        return "it compiles"
    if step.fits:
        return "it fits"
    if step.memory > step.chip.memory:
        return f"it does not fit, by {size(step.memory - step.chip.memory)}: {suggestion(config, step)}"
    return (
        f"it may not fit: the estimate is {step.memory / step.chip.memory:.0%} of the memory, and only up to "
        f"{step.room:.0%} is safe: {suggestion(config, step)}"
    )


def suggestion(config: Config, step: Step) -> str:
    """The cheapest change that can run and takes less memory."""
    model, train, sizes, chip = config.model, config.train, step.sizes, step.chip
    assert chip is not None
    meshes = []
    if step.arguments > chip.memory / 2:
        meshes = [replace(sizes, data=sizes.data // n, fsdp=sizes.fsdp * n) for n in divisors(sizes.data)[1:]]
        if step.arguments > step.room * chip.memory:  # then nothing else helps
            over = sizes.data * sizes.fsdp
            meshes += [replace(sizes, data=1, fsdp=n) for n in range(over + 1, 4 * over + 1)]
    if more := next((one for one in meshes if possible(config, chip, one)), None):
        chips = f" of {more.devices} chips" if more.devices > sizes.devices else ""
        return f"split the state over more chips, --mesh {more}{chips}"
    if model.remat != "blocks":
        return "recompute blocks in the backward pass, --remat blocks"
    for accumulate in divisors(train.batch_size):
        if accumulate > train.accumulate and possible(replaced(config, accumulate=accumulate), chip, sizes):
            return f"smaller micro-batches, --accumulate {accumulate}"
    if not model.scan_layers:
        return "scan over the blocks, --scan-layers"
    more = replace(sizes, context=2 * sizes.context)
    if possible(config, chip, more):
        return f"split each context over more chips, --mesh {more} of {more.devices} chips"
    return "use more chips"


HEAD = ("mesh", "batch", "accumulate", "memory per chip", "ms per step", "tokens/s", "utilisation")


def table(ranked: list[tuple[Config, Step]]) -> Iterator[str]:
    """Steps as rows of Markdown, each with the time without overlapped communication."""
    yield "| chips | " + " | ".join(HEAD) + " |"
    yield "| --- |" + " --- |" * len(HEAD)
    for config, step in ranked:
        train, (_, most) = config.train, step.bounds
        rate = train.batch_size * config.model.block_size / most
        holds = size(step.memory) + ("" if step.fits else ", too much or nearly")
        cells = (step.sizes, train.batch_size, train.accumulate, holds, f"{1000 * most:,.0f}", f"{rate:,.0f}")
        yield f"| {step.sizes.devices} | " + " | ".join(map(str, cells)) + f" | {step.utilisation[0]:.0%} |"
