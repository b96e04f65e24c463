"""A GPT as pure functions in JAX."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "DataConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "TrainConfig": "config",
    "Batch": "text.batches",
    "take": "text.batches",
    "window_starts": "text.batches",
    "prepare": "text.prepare",
    "BPETokenizer": "text.bpe",
    "ByteTokenizer": "text.tokenizer",
    "CharTokenizer": "text.tokenizer",
    "cross_entropy": "nn",
    "forward": "nn",
    "init_params": "nn",
    "logits_and_loss": "nn",
    "TrainState": "training.step",
    "init_state": "training.step",
    "train_step": "training.step",
    "train_steps": "training.step",
    "evaluate": "training.evaluate",
    "fit": "training.loop",
    "generate": "sampling.generate",
    "load": "report.notebook",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public noun from its home at first use, so that `import jaxgpt` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    return getattr(import_module(f"jaxgpt.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
