"""The scaling law L(N, D) = E + A / N^a + B / D^b of parameters and tokens, fitted to finished runs.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv:2203.15556, section 3.3: the Huber loss of
log L is minimized from several starts. Here by Gauss-Newton: L-BFGS takes tens of times as long in this narrow valley.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import UsageError

DELTA = 1e-2
"""Threshold of the Huber loss in log L: about the scatter of small runs. The paper has 1e-3, for larger runs."""
LOW, HIGH = (-7.0, -7.0, -7.0, 0.02, 0.02), (3.0, 3.0, 3.0, 2.5, 2.5)
"""Bounds of log E, of log(A / N^a) and log(B / D^b) at the geometric mean of the runs, and of a and b."""
STARTS = tuple(itertools.product((0.15, 0.3, 0.6, 1.0), (0.15, 0.3, 0.6, 1.0)))
"""Exponents (a, b) to start from, each with the best E, A and B for them."""
INTERVAL = 0.9
FLOPS = 6
"""Training FLOPs per parameter and token: two forward, four backward."""

Array = NDArray[np.float64]
Point = tuple[int, int, float]
"""Parameters, tokens, loss in nats per token."""


class Law(NamedTuple):
    """The coefficients, in nats per token."""

    E: float  # the irreducible loss
    A: float
    B: float
    a: float
    b: float

    def loss(self, N: Any, D: Any) -> Any:
        """At N parameters and D tokens."""
        return self.E + self.A / N**self.a + self.B / D**self.b

    def optimum(self, flops: Any) -> tuple[Any, Any]:
        """The N and D of least loss for a budget of 6 N D FLOPs (equation 4 of the paper)."""
        ratio = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        N = ratio * (flops / FLOPS) ** (self.b / (self.a + self.b))
        return N, flops / FLOPS / N


class Fit(NamedTuple):
    """A law, its residuals, and bootstrap resamples of it."""

    law: Law
    resampled: tuple[Law, ...]  # fitted to runs with resampled residuals
    error: float  # root mean square of the residuals of log L

    def interval(self, of: Callable[[Law], Any]) -> Any:
        """The ends of the middle 90% of `of(law)` over the resampled laws: (2, ...) as lists."""
        ends = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
        return np.quantile([of(law) for law in self.resampled], ends, axis=0).tolist()

    def to_json(self, points: Sequence[Point]) -> str:
        """The law, its intervals and the points that it was fitted to, as indented JSON."""
        ends = zip(*self.interval(lambda law: law), strict=True)
        tree = {
            "law": self.law._asdict(),
            f"intervals_{INTERVAL:.0%}": dict(zip(Law._fields, ends, strict=True)),
            "error": self.error,
            "runs": [{"N": N, "D": D, "loss": loss} for N, D, loss in points],
        }
        return json.dumps(tree, indent=2) + "\n"


def fit(points: Sequence[Point], resamples: int = 300) -> Fit:
    """Fit the law to runs.

    The intervals come from a bootstrap of the residuals (Efron 1979), scaled up for the five fitted coefficients.

    Raises:
      UsageError: fewer than 6 runs, 3 sizes or 3 amounts of tokens; or a loss is not a finite number above 0.
    """
    N, D, losses = np.array(points, np.float64).reshape(-1, 3).T
    if len(losses) < 6 or len(set(N)) < 3 or len(set(D)) < 3:
        raise UsageError(
            f"{len(losses)} runs of {len(set(N))} sizes and {len(set(D))} amounts of tokens: a fit of five "
            "coefficients needs at least 6 runs, 3 sizes and 3 amounts"
        )
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise UsageError("a run has no loss above 0: leave it out")
    law = best(N, D, losses, STARTS)
    predicted = law.loss(N, D)
    residuals = np.log(losses / predicted)
    spread = (residuals - residuals.mean()) * np.sqrt(len(losses) / max(1, len(losses) - len(law)))
    random = np.random.Generator(np.random.Philox(0))
    samples = (predicted * np.exp(random.choice(spread, len(losses))) for _ in range(resamples))
    resampled = tuple(best(N, D, sample, [(0.3, 0.3), (law.a, law.b)]) for sample in samples)
    return Fit(law, resampled, float(np.sqrt((residuals**2).mean())))


def best(N: Array, D: Array, losses: Array, starts: Sequence[tuple[float, float]]) -> Law:
    """The law of least Huber loss over all `starts`, exponents (a, b)."""
    from scipy.optimize import least_squares, nnls

    # L = exp(e) + exp(A - a x) + exp(B - b y). Centred, so that a change of an exponent needs none of its factor.
    x, y = (np.log(each) - np.log(each).mean() for each in (N, D))

    def terms(at: Array) -> Array:
        e, A, B, a, b = at
        return np.stack([np.full_like(x, e), A - a * x, B - b * y])

    def residuals(at: Array) -> Array:
        return np.logaddexp.reduce(terms(at)) - np.log(losses)

    def jacobian(at: Array) -> Array:
        logs = terms(at)
        e, A, B = np.exp(logs - np.logaddexp.reduce(logs))  # the share of each term in L
        return np.stack([e, A, B, -A * x, -B * y], axis=1)

    tries = []
    for a, b in starts:
        linear = nnls(np.stack([np.ones_like(x), np.exp(-a * x), np.exp(-b * y)], axis=1), losses)[0]
        start = np.clip([*np.log(np.maximum(linear, 1e-3 * losses.min())), a, b], LOW, HIGH)
        options = {"bounds": (LOW, HIGH), "loss": "huber", "f_scale": DELTA, "x_scale": 1.0, "max_nfev": 300}
        tries.append(least_squares(residuals, start, jacobian, **options))
    e, A, B, a, b = min(tries, key=lambda found: found.cost).x
    factors = np.exp([e, A + a * np.log(N).mean(), B + b * np.log(D).mean()])
    return Law(*(float(x) for x in (*factors, a, b)))
