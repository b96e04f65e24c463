"""The limits of one server."""

from dataclasses import dataclass

from jaxgpt.config import UsageError

TIMEOUT = 30.0
"""Seconds that the body of a request may take to arrive."""


@dataclass(frozen=True)
class Limits:
    max_prompt: int = 20_000
    """Maximum length of a prompt, in characters or ids."""
    max_tokens: int = 1000
    """Maximum number of tokens per request."""
    places: int = 32
    """Batch size of a model: how many requests it serves at once; others wait."""
    max_requests: int = 64
    """Maximum number of open requests, waiting ones included; further ones get 429 Too Many Requests."""

    def check(self) -> "Limits":
        """`self`; raises UsageError unless every limit is from 1 to 2**31 - 1."""
        for name, value in vars(self).items():
            if not 1 <= value < 2**31:
                raise UsageError(f"{name} is {value}, expected 1 to {2**31 - 1}")
        return self
