"""Additions to the events of a run in training: notices of loss spikes, and samples."""

import math
from collections import deque
from collections.abc import Callable

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.metrics_log import Event, Progress, notify
from jaxgpt.model import Params
from jaxgpt.run import Run
from jaxgpt.sample import write
from jaxgpt.tokenizer import Tokenizer

WINDOW, FEWEST, DEVIATIONS = 100, 50, 6.0
"""A loss is compared with the 100 before it, once there are 50. It spikes if it exceeds their mean by 6 standard
deviations, or by 6% of the mean if that is more."""
TOKENS = 60
"""Tokens of a sample."""


class Spikes:
    """Watches the losses of consecutive steps."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._high = False

    def add(self, loss: float) -> float | None:
        """The mean of the losses before `loss` if it spikes, once while it stays high; NaN and inf are ignored."""
        if not math.isfinite(loss):
            return None
        mean, was_high = 0.0, self._high
        if len(self._recent) >= FEWEST:
            mean, deviation = float(np.mean(self._recent)), float(np.std(self._recent, ddof=1))
            self._high = loss > mean + DEVIATIONS * max(deviation, 0.01 * abs(mean))
        self._recent.append(loss)
        return mean if self._high and not was_high else None


def with_spikes(run: Run, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """`on_event`, with a Notice of each spike of the training loss, also in events.jsonl."""
    spikes = Spikes()

    def watch(event: Event) -> None:
        on_event(event)
        if isinstance(event, Progress):
            for step, loss in enumerate(event.losses, event.step - len(event.losses) + 1):
                if (mean := spikes.add(loss)) is not None:
                    notify(run, on_event, "spike", step, f"loss {loss:.4f}; the loss before was about {mean:.4f}")

    return watch


def sampler(config: ModelConfig, tokenizer: Tokenizer) -> Callable[[Params], str]:
    """The `sample` of `fit`: parameters -> a short text, from a seed of its own. Empty if memory runs out, which must
    not end the run."""

    def sample(params: Params) -> str:
        try:
            (pieces,) = write(config, params, tokenizer, None, TOKENS)
            return "".join(pieces).strip()
        except (MemoryError, RuntimeError):
            return ""

    return sample
