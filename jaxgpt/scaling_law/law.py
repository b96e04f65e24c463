"""The scaling law L(N, D) = E + A / N^a + B / D^b of parameters and tokens, fitted to finished runs.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv:2203.15556, section 3.3: minimizes the
Huber loss of log L from several starts; by Gauss-Newton, since L-BFGS takes tens of times as long in this narrow
valley. Does not import jax.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import UsageError

DELTA = 1e-2
"""Threshold of the Huber loss in log L: about the scatter of small runs. The paper has 1e-3, for larger runs."""
LOW, HIGH = (-7.0, -7.0, -7.0, 0.02, 0.02), (3.0, 3.0, 3.0, 2.5, 2.5)
"""Bounds of log E, of log(A / N^a) and log(B / D^b) at the geometric mean of the runs, and of a and b."""
STARTS = (0.15, 0.3, 0.6, 1.0)
"""Exponents to start from, each pair with the best E, A and B for it."""
RESAMPLES = 300
INTERVAL = 0.9
FLOPS = 6
"""Training FLOPs per parameter and token: two forward, four backward."""

Array = NDArray[np.float64]


class Law(NamedTuple):
    """The coefficients, in nats per token."""

    E: float
    """The irreducible loss."""
    A: float
    B: float
    a: float
    b: float

    def loss(self, N: Any, D: Any) -> Any:
        """At N parameters and D tokens."""
        return self.E + self.A / N**self.a + self.B / D**self.b

    def optimum(self, flops: float) -> tuple[float, float]:
        """The N and D of least loss for a budget of 6 N D FLOPs (equation 4 of the paper)."""
        ratio = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        N = ratio * (flops / FLOPS) ** (self.b / (self.a + self.b))
        return N, flops / FLOPS / N


@dataclass(frozen=True)
class Fit:
    """A law, its residuals, and bootstrap resamples of it."""

    law: Law
    resampled: tuple[Law, ...]
    """Laws fitted to runs with resampled residuals."""
    error: float
    """The root mean square of the residuals of log L."""
    bounded: tuple[str, ...] = ()
    """Coefficients at their bounds: these runs do not determine them."""

    def to_json(self, points: Sequence[tuple[int, int, float]]) -> str:
        """The law, its intervals and the (N, D, loss) that it was fitted to, as indented JSON."""
        intervals = {name: self.interval(lambda law, name=name: getattr(law, name)) for name in Law._fields}
        tree = {"law": self.law._asdict(), f"intervals_{INTERVAL:.0%}": intervals, "error": self.error}
        tree |= {"at_their_bounds": self.bounded}
        runs = [{"N": N, "D": D, "loss": loss} for N, D, loss in points]
        return json.dumps(tree | {"runs": runs}, indent=2) + "\n"

    def interval(self, of: Any) -> tuple[float, float]:
        """The middle 90% of `of(law)` over the resampled laws."""
        low, high = np.quantile([of(law) for law in self.resampled], [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
        return float(low), float(high)


def fit(N: Sequence[float], D: Sequence[float], losses: Sequence[float], resamples: int | None = None) -> Fit:
    """Fit runs of N parameters and D tokens that ended with `losses`, (n,) each.

    The intervals come from a bootstrap of the residuals (Efron 1979), scaled up for the five fitted coefficients.

    Raises:
      UsageError: fewer than 6 runs, 3 sizes or 3 amounts of tokens, or a loss is not a number above 0.
    """
    x, y, found = (np.asarray(each, np.float64) for each in (N, D, losses))
    if len(found) < 6 or len(set(x)) < 3 or len(set(y)) < 3:
        raise UsageError(
            f"{len(found)} runs of {len(set(x))} sizes and {len(set(y))} amounts of tokens: a fit of five coefficients "
            "needs at least 6 runs, 3 sizes and 3 amounts"
        )
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise UsageError("a run has no loss above 0: leave it out")
    logs = np.log(found)
    law = _best(x, y, logs, [_start(x, y, found, a, b) for a, b in itertools.product(STARTS, STARTS)])
    residuals = logs - np.log(law.loss(x, y))
    spread = residuals - residuals.mean()
    spread *= np.sqrt(len(logs) / max(1, len(logs) - len(law)))
    random = np.random.Generator(np.random.Philox(0))
    resampled = []
    for _ in range(RESAMPLES if resamples is None else resamples):
        sample = np.log(law.loss(x, y)) + random.choice(spread, len(logs))
        starts = [_logs(law), *(_start(x, y, np.exp(sample), a, b) for a, b in ((0.3, 0.3), (law.a, law.b)))]
        resampled.append(_best(x, y, sample, starts))
    return Fit(law, tuple(resampled), float(np.sqrt((residuals**2).mean())), _bounded(law, x, y))


def _bounded(law: Law, N: Array, D: Array) -> tuple[str, ...]:
    """The coefficients that are at LOW or HIGH."""
    found = _centred(_logs(law), np.log(N).mean(), np.log(D).mean())
    at = np.isclose(found, LOW, atol=1e-3) | np.isclose(found, HIGH, atol=1e-3)
    return tuple(name for name, bounded in zip(Law._fields, at, strict=True) if bounded)


def _centred(logs: Array, middle_N: float, middle_D: float) -> Array:
    """(log E, log A, log B, a, b) with the terms of A and B at the geometric mean of the runs, as in LOW and HIGH."""
    e, A, B, a, b = logs
    return np.array([e, A - a * middle_N, B - b * middle_D, a, b])


def _logs(law: Law) -> Array:
    return np.array([*np.log(law[:3]), *law[3:]])


def _start(N: Array, D: Array, losses: Array, a: float, b: float) -> Array:
    """(log E, log A, log B, a, b) of the best E, A and B above 0 for these exponents."""
    from scipy.optimize import nnls

    # Columns of order one, for precision.
    columns = np.stack([np.ones_like(N), (N / N.min()) ** -a, (D / D.min()) ** -b], axis=1)
    E, A, B = np.log(np.maximum(nnls(columns, losses)[0], 1e-3 * losses.min()))
    return np.array([E, A + a * np.log(N.min()), B + b * np.log(D.min()), a, b])


def _best(N: Array, D: Array, logs: Array, starts: Sequence[Array]) -> Law:
    """The law of least Huber loss from any of the starts."""
    from scipy.optimize import least_squares

    log_N, log_D = np.log(N), np.log(D)
    # Centred, so that an exponent can change without its factor.
    middle_N, middle_D = log_N.mean(), log_D.mean()
    x_N, x_D = log_N - middle_N, log_D - middle_D

    def terms(x: Array) -> Array:
        e, A, B, a, b = x
        return np.stack([np.full_like(logs, e), A - a * x_N, B - b * x_D])

    def residuals(x: Array) -> Array:
        return np.asarray(logsumexp(terms(x)) - logs)

    def slopes(x: Array) -> Array:
        each = terms(x)
        e, A, B = np.exp(each - logsumexp(each))
        return np.stack([e, A, B, -A * x_N, -B * x_D], axis=1)

    settings = {"bounds": (LOW, HIGH), "loss": "huber", "f_scale": DELTA, "x_scale": 1.0, "max_nfev": 300}
    clipped = [np.clip(_centred(start, middle_N, middle_D), LOW, HIGH) for start in starts]
    tries = [least_squares(residuals, x, slopes, **settings) for x in clipped]
    e, A, B, a, b = min(tries, key=lambda found: found.cost).x
    return Law(*(float(x) for x in (np.exp(e), np.exp(A + a * middle_N), np.exp(B + b * middle_D), a, b)))


def logsumexp(terms: Array) -> Array:
    """The logarithm of the sum of exponentials over the first axis."""
    most = terms.max(axis=0)
    return np.asarray(most + np.log(np.exp(terms - most).sum(axis=0)))
