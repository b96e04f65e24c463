"""What a person reads of a plan."""

from collections.abc import Iterator

from jaxgpt.config import Config
from jaxgpt.nn import cost
from jaxgpt.scaling.plan import Plan
from jaxgpt.training.memory import size


def lines(config: Config, topology: str, plan: Plan) -> Iterator[str]:
    """A plan for a topology, line by line, the verdict last."""
    train, T = config.train, config.model.block_size
    yield (
        f"{cost.n_params(config.model):,} parameters on {plan.sizes.devices} chips of {topology}, mesh {plan.sizes}: "
        f"steps of {train.batch_size} x {T} tokens in {train.accumulate} micro-batches; "
        f"compiled in {plan.seconds_to_compile:.0f} s"
    )
    yield "a chip, by the compiler:"
    held = f"state and tokens {size(plan.arguments)}, temporaries {size(plan.temporaries)}"
    yield f"  {held}: {size(plan.memory)} of {size(plan.chip.memory)}"
    for kind, (n, n_bytes) in plan.collectives.items():
        yield f"  {kind}: {n:,} a step, {size(n_bytes)}"
    yield f"  kernels: {', '.join(plan.kernels) or 'none of its own'}"
    seconds, (least, most) = plan.seconds, plan.utilisation
    yield "a step, on paper, at the published rates of the chip:"
    products, sending = (f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    yield f"  {products} ({plan.flops:.3g} FLOP), {sending}"
    n_tokens = train.batch_size * T
    slow, fast = seconds["products"] + seconds["sending"], max(seconds.values())
    yield (
        f"  {n_tokens / slow:,.0f} to {n_tokens / fast:,.0f} tokens/s, utilisation {least:.0%} to {most:.0%}: sending "
        "beside nothing, or wholly beside products"
    )
    verdict = (
        "it fits" if plan.fits else f"it does not fit, by {size(plan.memory - plan.chip.memory)}: {knob(config, plan)}"
    )
    yield f"verdict: {verdict}"


def knob(config: Config, plan: Plan) -> str:
    """What would make it fit, the cheapest first."""
    model, state = config.model, plan.arguments > plan.chip.memory / 2
    if state and plan.sizes.data > 1:
        return f"split the state over more chips, --mesh fsdp={plan.sizes.data * plan.sizes.fsdp}"
    if model.remat != "blocks":
        return "compute blocks again in the backward pass, --remat blocks"
    micro = config.train.batch_size // config.train.accumulate
    if micro > plan.sizes.data * plan.sizes.fsdp:
        return f"smaller micro-batches, --accumulate {2 * config.train.accumulate}"
    return "split each context, --mesh ...,context=2, or take more chips"
