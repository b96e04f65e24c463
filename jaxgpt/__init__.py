"""A GPT as pure functions in JAX."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {  # module -> its public names
    "config": "Config DataConfig ModelConfig OptimizerConfig TrainConfig",
    "data": "Batch take window_starts",
    "prepare.build": "prepare_corpus",
    "tokenizer": "BPETokenizer ByteTokenizer CharTokenizer",
    "loss": "cross_entropy",
    "model": "forward init_params logits_and_loss losses",
    "step": "TrainState init_state train_step train_steps",
    "evaluation": "evaluate",
    "cli.runs": "start_run",
    "train": "fit",
    "sample": "SamplingParams generate",
    "monitor.notebook": "load",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import public names at first use, so that `import jaxgpt` is fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    return getattr(import_module(f"jaxgpt.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
