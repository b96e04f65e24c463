"""Every mesh and batch that would do, ranked on paper, and the best of them compiled."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxgpt.config import Config
from jaxgpt.config import problems as config_problems
from jaxgpt.mesh import Sizes, check, divisors, problems
from jaxgpt.monitor.chips import Chip
from jaxgpt.plan import estimate
from jaxgpt.plan.estimate import Step
from jaxgpt.plan.plan import PlanError


def ranked(config: Config, chip: Chip, n: int, batches: Sequence[int] = ()) -> list[tuple[Config, Step]]:
    """The config on n chips with each mesh that divides it and each batch, those of most tokens per second and chip
    first, where nothing that is sent goes beside products; what does not fit comes last.

    A batch that does not divide among the chips is tried, and the next one that does too. Micro-batches are as few as
    fit.

    Args:
      batches: sequences a step; none for the config's own alone.

    Raises:
      PlanError: no mesh does, it is a bigram, or nothing is known of the network between so many.
    """
    if config.model.kind == "bigram":
        one = next((sizes for sizes in meshes(n) if possible(config, chip, sizes)), "...")
        raise PlanError(f"a bigram has no products to rank meshes by: say one instead, --mesh {one}")
    reachable(chip, n)
    B = config.train.batch_size
    found = []
    for batch in sorted({size for one in batches or (B,) for size in (one, -(-one // n) * n)}):
        for sizes in meshes(n):
            found += list(_smallest(config, chip, sizes, batch))[:1]
    if not found:
        raise PlanError(f"no mesh of {n} chips divides the model and {B} sequences: try --batch-size {n}")
    return sorted(found, key=lambda item: (not item[1].fits, item[1].bounds[1] / item[0].train.batch_size))


def batches(config: Config) -> list[int]:
    """The batch sizes of a sweep: the config's, its half and its quarter where they are whole, twice and four times."""
    return [config.train.batch_size * k // 4 for k in (1, 2, 4, 8, 16) if config.train.batch_size * k % 4 == 0]


def possible(config: Config, chip: Chip, sizes: Sizes) -> bool:
    """Whether a config, its vocabulary known, can run on a mesh of such chips, wherever its memory ends."""
    if sizes.data % chip.slices(sizes.devices) or problems(config, sizes) or config_problems(config):
        return False
    return sizes.devices <= chip.pod or bool(chip.network_rate)


def _smallest(config: Config, chip: Chip, sizes: Sizes, batch: int) -> Iterator[tuple[Config, Step]]:
    """Those of a mesh with the fewest micro-batches first, if they fit; the last whether it fits or not."""
    tried = None
    for accumulate in divisors(batch):
        changed = replace(config, train=replace(config.train, batch_size=batch, accumulate=accumulate))
        if not possible(changed, chip, sizes):
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
