"""The limits of one server."""

from dataclasses import dataclass

from jaxgpt.config import UsageError

TIMEOUT = 30.0
"""Seconds that a client may take to send a request, or to read more of the response."""


@dataclass(frozen=True)
class Limits:
    max_prompt: int = 20_000
    """Characters, or ids, of a prompt."""
    max_tokens: int = 1000
    """Tokens that one request may generate."""
    places: int = 32
    """Requests that a model serves at once; the others wait."""
    max_requests: int = 64
    """Open requests, waiting ones included; one more gets 429 Too Many Requests."""

    def check(self) -> "Limits":
        """`self`, if every limit is at least 1; raises UsageError otherwise."""
        for name, value in vars(self).items():
            if not 1 <= value < 2**31:
                raise UsageError(f"{name} is {value}, expected 1 or more")
        return self
