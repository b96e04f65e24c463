"""A line of what a model writes, while it is trained."""

from collections.abc import Callable

from jaxgpt.config import ModelConfig
from jaxgpt.model import Params
from jaxgpt.sample import write
from jaxgpt.tokenizer import Tokenizer

TOKENS = 60


def glimpse(config: ModelConfig, tokenizer: Tokenizer) -> Callable[[Params], str]:
    """Parameters to a short text, always with the same seed, which is none of the training's. Where there is no room
    for it, it is empty: a glimpse is no reason to end a run."""

    def look(params: Params) -> str:
        try:
            (pieces,) = write(config, params, tokenizer, None, TOKENS)
            return "".join(pieces).strip()
        except (MemoryError, RuntimeError):
            return ""

    return look
