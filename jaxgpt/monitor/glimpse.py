"""A line that the model writes while it trains."""

from collections.abc import Callable

from jaxgpt.config import ModelConfig
from jaxgpt.model import Params
from jaxgpt.sample import write
from jaxgpt.tokenizer import Tokenizer

TOKENS = 60


def glimpse(config: ModelConfig, tokenizer: Tokenizer) -> Callable[[Params], str]:
    """A function from parameters to a short text, always with the same seed, which training does not use. Where memory
    runs out the text is empty: a glimpse does not end a run."""

    def look(params: Params) -> str:
        try:
            (pieces,) = write(config, params, tokenizer, None, TOKENS)
            return "".join(pieces).strip()
        except (MemoryError, RuntimeError):
            return ""

    return look
