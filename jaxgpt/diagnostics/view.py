"""The results of diagnoses as lines of text and as JSON."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxgpt.diagnostics.derivatives import NoiseScale
from jaxgpt.diagnostics.diagnose import Attention, Curvature, Influence, Landscape, Subject
from jaxgpt.diagnostics.inside import Lens, Scores
from jaxgpt.monitor import cost

LONGEST = 20_000
"""Most elements of an array in JSON; a larger one is written as its shape."""


def noise(found: NoiseScale, subject: Subject) -> Iterator[str]:
    T, B = subject.config.model.block_size, subject.config.train.batch_size
    if found.signal <= 0 or not np.isfinite(found.standard_error):
        yield f"the noise exceeds the gradient: more than {len(found.norms)} windows are needed (--windows)"
    else:
        scale = " ± ".join(f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in (found.scale, found.standard_error))
        yield f"gradient noise scale {scale} windows of {T} tokens; trained with batches of {B}"
    yield f"squared gradient {found.signal:.3g}, summed variance over windows {found.noise:.3g} (nats/token)²"


def curvature(found: Curvature, subject: Subject) -> Iterator[str]:
    values, errors, traces = found.spectrum.values, found.spectrum.errors, np.asarray(found.traces)
    yield (
        f"Hessian eigenvalues from {values[0]:.3g} ± {errors[0]:.1g} to {values[-1]:.3g} ± {errors[-1]:.1g}, trace "
        f"{traces.mean():.3g} ± {traces.std(ddof=1) / math.sqrt(len(traces)):.2g}, nats/token"
    )
    stable = f"; gradient descent is stable up to a learning rate of {2 / values[-1]:.2g}" if values[-1] > 0 else ""
    yield f"over {cost.n_params(subject.config.model):,} parameters{stable}"


def landscape(found: Landscape, subject: Subject) -> Iterator[str]:
    losses, (first, here) = np.asarray(found.losses), np.interp([0, 1], found.shares, found.path)
    middle, least = len(losses) // 2, int(np.argmin(found.path))
    edge = np.concatenate([losses[[0, -1], middle], losses[middle, [0, -1]]])
    yield f"loss {here:.3f} here, {edge.min():.3f} to {edge.max():.3f} at one filter norm along random directions"
    lowest = f"{found.path[least]:.3f}, at {found.shares[least]:.2f} of the way"
    yield f"on the line from the initial parameters, of loss {first:.3f}, the lowest loss is {lowest}"


def influence(found: Influence, subject: Subject) -> Iterator[str]:
    order, T = np.argsort(np.asarray(found.dots)), subject.config.model.block_size
    yield f"of training windows on the loss of '{subject.show(subject.text[: T + 1])[:64]}'"
    for what, sign in (("lowered most by", 1), ("raised most by", -1)):
        for i in (i for i in order[::-sign][:3] if sign * found.dots[i] > 0):
            window = subject.show(subject.train[found.starts[i] : found.starts[i] + T + 1])
            yield f"{what:<16} {found.dots[i]:+8.3g}  '{window[:64]}'"
    if not np.any(found.dots):
        yield f"not changed by any of the {len(order)} windows (--windows)"


def lens(found: Lens, subject: Subject) -> Iterator[str]:
    yield "depth      " + "".join(f"{depth:>8}" for depth in range(len(found.losses)))
    for name, row in (("loss", found.losses), ("KL to last", found.divergence)):
        yield f"{name:<11}" + "".join(f"{x:z8.3f}" for x in row.mean(axis=(1, 2)))


def attention(found: Attention, subject: Subject) -> Iterator[str]:
    yield f"entropy in nats (uniform: {found.uniform:.2f}) and mean distance in tokens, by head"
    for block, (entropies, distances) in enumerate(zip(found.entropy, found.distance, strict=True)):
        yield f"block {block:<3} " + "  ".join(f"{e:z.2f}/{d:.0f}" for e, d in zip(entropies, distances, strict=True))


def tokens(found: Scores, subject: Subject) -> Iterator[str]:
    yield f"mean loss {found.losses.mean():.4f} nats over {len(found.losses)} tokens; the least expected:"
    for i in np.argsort(found.losses)[::-1][:5]:
        before, token = subject.show(subject.text[max(0, i - 24) : i + 1]), subject.show(subject.text[i + 1])
        likely = zip(found.ids[i, :3], found.probabilities[i, :3], strict=True)
        instead = ", ".join(f"'{subject.show(id)}' {p:.2f}" for id, p in likely)
        yield f"{found.losses[i]:6.2f}  '{before}' -> '{token}'; likelier: {instead}"


VIEWS: dict[str, Callable[[Any, Subject], Iterator[str]]] = {
    each.__name__: each for each in (noise, curvature, landscape, influence, lens, attention, tokens)
}


def lines(name: str, found: Any, subject: Subject) -> Iterator[str]:
    """The result of a diagnosis as a few lines, the first with its name."""
    for i, line in enumerate(VIEWS[name](found, subject)):
        yield f"  {'' if i else name:<10} {line}"


def plain(value: Any) -> Any:
    """Nested results as JSON values: arrays longer than LONGEST as their shape, non-finite numbers as null."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    array = np.asarray(value)
    if array.size > LONGEST:
        return {"shape": list(array.shape)}
    whole: Any = array.astype(object)
    whole[~np.isfinite(array)] = None
    return whole.tolist()
