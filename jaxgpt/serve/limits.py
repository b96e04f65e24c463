"""What one server gives at most."""

from dataclasses import dataclass

from jaxgpt.config import UsageError

PATIENCE = 30.0
"""Seconds that a client may keep the server waiting: for a request, or until it takes more of the answer."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many there may be."""

    max_prompt: int = 20_000
    """Characters of a prompt."""
    max_tokens: int = 1000
    """Tokens that one request may write."""
    places: int = 32
    """Requests that a model writes for at once; the others wait for their turn."""
    max_requests: int = 64
    """Requests under way, those that wait among them; one more is told to come back."""

    def check(self) -> "Limits":
        """`self`, if it makes sense.

        Raises:
          UsageError: a limit below 1.
        """
        for name, value in vars(self).items():
            if not 1 <= value < 2**31:
                raise UsageError(f"{name} is {value}, expected 1 or more")
        return self
