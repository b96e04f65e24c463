"""Additions to the events of a run: notices of loss spikes, and a sample now and then."""

import math
from collections import deque
from collections.abc import Callable

from jaxgpt.config import ModelConfig
from jaxgpt.metrics_log import Event, Progress, notify
from jaxgpt.model import Params
from jaxgpt.run import Run
from jaxgpt.sample import write
from jaxgpt.tokenizer import Tokenizer

WINDOW, FEWEST, DEVIATIONS = 100, 50, 6.0
"""A loss is compared with the last 100, once there are 50. It spikes if it exceeds their mean by 6 of their standard
deviations, or by 6% of the mean where that is more."""
TOKENS = 60
"""Length of a sample."""


class Spikes:
    """Watches the losses of consecutive steps."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._high = False

    def usual(self, loss: float) -> float | None:
        """The mean of the losses before `loss` if it spikes, else None.

        A loss that stays high is reported once. NaN and infinities are ignored.
        """
        if not math.isfinite(loss):
            return None
        n, before = len(self._recent), self._recent
        mean = sum(before) / n if n else 0.0
        deviation = math.sqrt(sum((x - mean) ** 2 for x in before) / (n - 1)) if n > 1 else 0.0
        deviation = max(deviation, 0.01 * abs(mean))
        was_high, self._high = self._high, n >= FEWEST and loss > mean + DEVIATIONS * deviation
        before.append(loss)
        return mean if self._high and not was_high else None


def with_spikes(run: Run, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """`on_event`, with a notice of each spike of the training loss, which events.jsonl records too."""
    spikes = Spikes()

    def watch(event: Event) -> None:
        on_event(event)
        if isinstance(event, Progress):
            for step, loss in enumerate(event.losses, event.step - len(event.losses) + 1):
                if (usual := spikes.usual(loss)) is not None:
                    notify(run, on_event, "spike", step, f"loss {loss:.4f}; the loss before was about {usual:.4f}")

    return watch


def sampler(config: ModelConfig, tokenizer: Tokenizer) -> Callable[[Params], str]:
    """The `sample` of `fit`: from parameters to a short text, always with the same seed, which training does not use.
    Empty where memory runs out, which does not end the run."""

    def sample(params: Params) -> str:
        try:
            (pieces,) = write(config, params, tokenizer, None, TOKENS)
            return "".join(pieces).strip()
        except (MemoryError, RuntimeError):
            return ""

    return sample
