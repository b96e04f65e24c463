"""A scaling law as lines of text."""

from collections.abc import Iterator, Sequence

from jaxgpt.scaling_law.law import FLOPS, INTERVAL, Fit

Point = tuple[int, int, float]
"""Parameters, tokens, loss in nats per token."""


def lines(found: Fit, points: Sequence[Point], flops: Sequence[float]) -> Iterator[str]:
    """A fit to `points`, and the best size and amount of text for budgets of FLOPs."""
    trained = [FLOPS * N * D for N, D, _ in points]
    least, most = min(trained), max(trained)
    E, A, B, a, b = found.law
    yield f"L(N, D) = {E:.3f} + {A:.3g} / N^{a:.3f} + {B:.3g} / D^{b:.3f} nats/token"
    yield f"  residuals of {found.error:.2%} (root mean square); {INTERVAL:.0%} intervals by bootstrap:"
    for name in found.law._fields:
        low, high = found.interval(lambda law, name=name: getattr(law, name))
        yield f"  {name}  {getattr(found.law, name):>8.3g}  {low:.3g} to {high:.3g}"
    if bounded := found.bounded:
        they, which = ("is at its bound", "it") if len(bounded) == 1 else ("are at their bounds", "them")
        yield f"  {' and '.join(bounded)} {they}: these runs do not determine {which}"
    yield f"best parameters and tokens for a budget of {FLOPS} N D FLOPs:"
    for budget in flops:
        N, D = found.law.optimum(budget)
        low_N, high_N = found.interval(lambda law, budget=budget: law.optimum(budget)[0])
        beyond = "" if least <= budget <= most else ", extrapolated"
        yield (
            f"  {budget:.0e}  {N:>13,.0f} parameters ({low_N:,.0f} to {high_N:,.0f}), {D:,.0f} tokens, "
            f"loss {found.law.loss(N, D):.3f}{beyond}"
        )
