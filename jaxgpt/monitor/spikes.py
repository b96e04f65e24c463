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


def with_spikes(run: Run, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """`on_event`, with a Notice of each spike of the training loss, also in events.jsonl: one while it stays high.
    Non-finite losses are ignored."""
    recent, high = deque[float](maxlen=WINDOW), False

    def watch(event: Event) -> None:
        nonlocal high
        on_event(event)
        losses = event.losses if isinstance(event, Progress) else ()
        for step, loss in enumerate(losses, event.step - len(losses) + 1):
            if not math.isfinite(loss):
                continue
            was_high = high
            if len(recent) >= FEWEST:
                mean, deviation = np.mean(recent), np.std(recent, ddof=1)
                high = bool(loss > mean + DEVIATIONS * max(deviation, 0.01 * abs(mean)))
                if high and not was_high:
                    notify(run, on_event, "spike", step, f"loss {loss:.4f}; the loss before was about {mean:.4f}")
            recent.append(loss)

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
