"""What a person reads of a plan."""

from collections.abc import Iterator
from dataclasses import replace

from jaxgpt import cost
from jaxgpt.config import Config, replaced
from jaxgpt.memory import size
from jaxgpt.mesh import Sizes, divisors
from jaxgpt.plan import estimate, rank
from jaxgpt.plan.estimate import Step
from jaxgpt.plan.plan import Plan

ASSUMED = (
    "  (at the published rates of products and memory, which programs come to about half of, and of links, round the "
    "rings of the torus; all that is sent goes beside products in the second figure, nothing in the first)"
)


def lines(config: Config, topology: str, plan: Plan) -> Iterator[str]:
    """A plan for a topology, line by line, the verdict last."""
    yield f"{about(config, plan.step.sizes)} of {topology}; compiled in {plan.seconds_to_compile:.0f} s"
    products = ", ".join(f"{n} of {types}" for types, n in plan.products.most_common())
    kernels = "splash attention" if "tpu_custom_call" in plan.kernels else "none of its own"
    yield f"  products in the program: {products or 'none'}; kernels: {kernels}"
    yield "a chip, by the compiler:"
    yield from costs(config, plan.step)
    if plan.step.chip:
        paper = estimate.on_paper(config, plan.step.chip, plan.step.sizes)
        yield f"  on paper it was {size(paper.memory)}, sending {1000 * paper.seconds['sending']:.1f} ms"
    yield f"verdict: {verdict(config, plan.step)}"


def on_paper(config: Config, name: str, step: Step) -> Iterator[str]:
    """The same of a step that was not compiled, on chips of that name."""
    yield f"{about(config, step.sizes)} {name}; nothing was compiled"
    yield "a chip, on paper:"
    yield from costs(config, step)
    yield f"verdict: {verdict(config, step)}"


def refused(config: Config, topology: str, why: str, step: Step) -> Iterator[str]:
    """What is told where the compiler finds that a step does not fit: its words, and the paper's figures."""
    yield f"{about(config, step.sizes)} of {topology}; the compiler refuses:"
    yield f"  {why}"
    yield "a chip, on paper:"
    yield from costs(config, step)
    yield f"verdict: it does not fit: {knob(config, step)}"


def about(config: Config, sizes: Sizes) -> str:
    train = config.train
    return (
        f"{cost.n_params(config.model):,} parameters, mesh {sizes}: steps of {train.batch_size} x "
        f"{config.model.block_size} tokens in {train.accumulate} micro-batches, on {sizes.devices} chips"
    )


def costs(config: Config, step: Step) -> Iterator[str]:
    """What a chip holds and sends, and how long it takes."""
    held = f"state and tokens {size(step.arguments)}, temporaries {size(step.temporaries)}"
    yield f"  {held}: {size(step.memory)}" + (f" of {size(step.chip.memory)}" if step.chip else "")
    for (kind, n), (times, n_bytes) in step.collectives.items():
        among = f" among {n}" if kind != "collective-permute" else ""
        yield f"  {kind}{among}: {times:,} a step, {size(n_bytes)}"
    if step.network:
        yield f"  between pods: {size(step.network)}"
    if step.chip is None:
        return
    if not step.flops:
        yield "  a bigram has no products, and its look-ups are not timed"
        return
    seconds = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in step.seconds.items())
    yield f"  {seconds} ({step.flops:.3g} FLOP, {step.computed / step.flops:.2f} of it computed)"
    n_tokens, (least, most) = config.train.batch_size * config.model.block_size, step.bounds
    slow, fast = step.utilisation
    yield (
        f"  a step in {1000 * most:.0f} to {1000 * least:.0f} ms, {n_tokens / most:,.0f} to {n_tokens / least:,.0f} "
        f"tokens/s, utilisation {slow:.0%} to {fast:.0%}"
    )
    yield ASSUMED
    if step.precision == "float32":
        kind = "bfloat16" if step.chip.torus else "TF32"
        yield f"  (products of float32 at the rate of {kind}, as JAX does them there unless told otherwise)"


def verdict(config: Config, step: Step) -> str:
    if step.chip is None:
        return "it compiles"
    if step.fits:
        return "it fits"
    if step.memory > step.chip.memory:
        return f"it does not fit, by {size(step.memory - step.chip.memory)}: {knob(config, step)}"
    return (
        f"it may not fit: it takes {step.memory / step.chip.memory:.0%} of the memory on paper, where more than "
        f"{step.room:.0%} is not trusted: {knob(config, step)}"
    )


def knob(config: Config, step: Step) -> str:
    """What would make it fit, the cheapest first, of what can run."""
    model, train, sizes, chip = config.model, config.train, step.sizes, step.chip
    assert chip is not None
    meshes = []
    if model.kind == "gpt" and step.arguments > chip.memory / 2:
        meshes = [replace(sizes, data=sizes.data // n, fsdp=sizes.fsdp * n) for n in divisors(sizes.data)[1:]]
        if step.arguments > step.room * chip.memory:  # then nothing else helps
            over = sizes.data * sizes.fsdp
            meshes += [replace(sizes, data=1, fsdp=n) for n in range(over + 1, 4 * over + 1)]
    if more := next((one for one in meshes if rank.possible(config, chip, one)), None):
        chips = f" of {more.devices} chips" if more.devices > sizes.devices else ""
        return f"split the state over more chips, --mesh {more}{chips}"
    if model.kind == "gpt" and model.remat != "blocks":
        return "compute blocks again in the backward pass, --remat blocks"
    for accumulate in divisors(train.batch_size):
        if accumulate > train.accumulate and rank.possible(replaced(config, accumulate=accumulate), chip, sizes):
            return f"smaller micro-batches, --accumulate {accumulate}"
    if model.kind == "bigram":
        return "take a smaller vocabulary, or a smaller --batch-size"
    if not model.scan_layers:
        return "run the blocks as a loop, --scan-layers"
    more = replace(sizes, context=2 * sizes.context)
    if rank.possible(config, chip, more):
        return f"split each context over more chips, --mesh {more} of {more.devices} chips"
    return "take more chips"


HEAD = ("mesh", "batch", "accumulate", "a chip holds", "ms a step", "tokens/s", "utilisation")


def table(ranked: list[tuple[Config, Step]]) -> Iterator[str]:
    """Steps as rows of Markdown, each with the time where nothing is sent beside products."""
    yield "| chips | " + " | ".join(HEAD) + " |"
    yield "| --- |" + " --- |" * len(HEAD)
    for config, step in ranked:
        train, (_, most) = config.train, step.bounds
        rate = train.batch_size * config.model.block_size / most
        holds = size(step.memory) + ("" if step.fits else ", too much or nearly so")
        cells = (step.sizes, train.batch_size, train.accumulate, holds, f"{1000 * most:,.0f}", f"{rate:,.0f}")
        yield f"| {step.sizes.devices} | " + " | ".join(map(str, cells)) + f" | {step.utilisation[0]:.0%} |"
