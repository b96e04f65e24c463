"""A GPT as pure functions in JAX."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {  # public name -> module
    "Config": "config",
    "DataConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "TrainConfig": "config",
    "Batch": "data",
    "take": "data",
    "window_starts": "data",
    "prepare_corpus": "prepare.build",
    "BPETokenizer": "tokenizer",
    "ByteTokenizer": "tokenizer",
    "CharTokenizer": "tokenizer",
    "cross_entropy": "loss",
    "forward": "model",
    "init_params": "model",
    "logits_and_loss": "model",
    "TrainState": "step",
    "init_state": "step",
    "train_step": "step",
    "train_steps": "step",
    "evaluate": "evaluation",
    "fit": "train",
    "SamplingParams": "sample",
    "generate": "sample",
    "load": "monitor.notebook",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import public names at first use, so that `import jaxgpt` is fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    return getattr(import_module(f"jaxgpt.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
