"""Curves, figures and texts on one line, and the text of tokens. Imports no jax."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxgpt.tokenizer import Tokenizer

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"


def sparkline(values: Sequence[float], width: int, levels: str = BLOCKS) -> str:
    """`values` as at most `width` characters, each the mean of equally many values; a space where all are non-finite.

    >>> sparkline([4, 3, 2, 1], 8), sparkline([1, 1, 2, 2], 2, ASCII), sparkline([math.nan, 1.0], 8)
    ('█▆▃▁', '_#', ' ▁')
    """
    n = min(width, len(values))
    shares = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    finite = [[value for value in share if math.isfinite(value)] for share in shares]
    means = [sum(share) / len(share) if share else None for share in finite]
    known = [mean for mean in means if mean is not None]
    low = min(known, default=0.0)
    step = (max(known, default=0.0) - low) / (len(levels) - 1) or 1.0
    return "".join(" " if mean is None else levels[round((mean - low) / step)] for mean in means)


def count(n: int, noun: str) -> str:
    """
    >>> count(1, "member"), count(2048, "token"), count(2, "batch")
    ('1 member', '2,048 tokens', '2 batches')
    """
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('ch') else 's'}"


def span(low: str, high: str) -> str:
    """The range of two figures; one figure if they look the same."""
    return low if low == high else f"{low} to {high}"


def fixed(x: float, digits: int = 4) -> str:
    """`x` with so many decimals; from a million on in scientific notation.

    >>> fixed(2.71828), fixed(3.4028e38, 2)
    ('2.7183', '3.40e+38')
    """
    return f"{x:.{digits}f}" if abs(x) < 1e6 else f"{x:.{digits}e}"


def percent(share: float) -> str:
    """A share in two significant digits.

    >>> percent(0.4213), percent(0.00312), percent(0), percent(1)
    ('42%', '0.31%', '0%', '100%')
    """
    return f"{share:.0%}" if share >= 0.095 else f"{100 * share:.2g}%"


def token_texts(tokenizer: "Tokenizer") -> list[str]:
    r"""The text of each token id; bytes that are not UTF-8 by themselves as \xNN."""
    return [data.decode("utf-8", "backslashreplace") for data in tokenizer.token_bytes]


def visible(text: str) -> str:
    r"""`text` on one line, with a symbol for each character that cannot be printed.

    >>> visible("two\nlines")
    'two↵lines'
    """
    return "".join("↵" if char == "\n" else char if char.isprintable() else "·" for char in text)
