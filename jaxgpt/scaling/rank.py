"""Every mesh and batch that would do, ranked on paper, and the best of them compiled."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxgpt.config import Config
from jaxgpt.scaling import estimate
from jaxgpt.scaling.chips import Chip
from jaxgpt.scaling.estimate import Step
from jaxgpt.scaling.mesh import Sizes, check, divisors, problems
from jaxgpt.scaling.plan import PlanError


def ranked(config: Config, chip: Chip, n: int) -> list[tuple[Config, Step]]:
    """The config on n chips with each mesh that divides it, the fastest first, by the time where nothing that is sent
    goes beside products; what does not fit comes last.

    The batch is the config's, and where that does not divide among the chips, the next one that does too. Micro-batches
    are as few as fit.

    Raises:
      PlanError: no mesh does, or nothing is known of the network between so many.
    """
    reachable(chip, n)
    B = config.train.batch_size
    found = []
    for batch in sorted({B, -(-B // n) * n}):
        for sizes in meshes(n):
            found += list(_smallest(config, chip, sizes, batch))[:1]
    if not found:
        raise PlanError(f"no mesh of {n} chips divides the model and {B} sequences: try --batch-size {n}")
    return sorted(found, key=lambda item: (not item[1].fits, item[1].bounds[1] / item[0].train.batch_size))


def _smallest(config: Config, chip: Chip, sizes: Sizes, batch: int) -> Iterator[tuple[Config, Step]]:
    """Those of a mesh with the fewest micro-batches first, if they fit; the last whether it fits or not."""
    tried = None
    for accumulate in divisors(batch):
        changed = replace(config, train=replace(config.train, batch_size=batch, accumulate=accumulate))
        if problems(changed, sizes) or sizes.data % chip.slices(sizes.devices):
            continue
        tried = changed, estimate.on_paper(changed, chip, sizes)
        if tried[1].fits:
            yield tried
            return
    if tried:
        yield tried


def on_paper(config: Config, chip: Chip, sizes: Sizes, chips: Sequence[int]) -> Step:
    """The config on a mesh of one of these numbers of chips.

    Raises:
      MeshError: the mesh does not divide it.
      PlanError: the mesh is of another number, or its copies do not divide among pods.
    """
    check(config, sizes)
    if list(chips) != [sizes.devices]:
        raise PlanError(f"the mesh {sizes} is of {sizes.devices} chips: say --chips {sizes.devices}")
    reachable(chip, sizes.devices)
    if sizes.data % (slices := chip.slices(sizes.devices)):
        raise PlanError(
            f"the mesh {sizes} goes over {slices} pods of {chip.pod}: data has to be a multiple of {slices}"
        )
    return estimate.on_paper(config, chip, sizes)


def reachable(chip: Chip, n: int) -> None:
    """Raises:
    PlanError: n chips are more than a pod, and the rate of the network between pods is not known.
    """
    if n > chip.pod and not chip.network_rate:
        raise PlanError(
            f"{n} chips are more than the {chip.pod} of a pod, and no rate between pods is known of this chip"
        )


def meshes(n: int) -> Iterator[Sizes]:
    """All of n devices."""
    for context in divisors(n):
        for tensor in divisors(n // context):
            for fsdp in divisors(n // context // tensor):
                yield Sizes(n // context // tensor // fsdp, fsdp, tensor, context)
