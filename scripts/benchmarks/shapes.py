"""The models that are measured, by name, and how each side computes them."""

from typing import Any, Literal

from jaxgpt.config import Config, UsageError, replaced

Device = Literal["cpu", "gpu"]
Precision = Literal["float32", "bfloat16"]
"""Compute dtypes of jaxgpt."""
Way = Literal["float32", "float32+compile", "tf32", "tf32+compile", "bfloat16", "bfloat16+compile"]
"""How PyTorch computes: in true float32, with TF32 matmuls, or with bf16 matmuls under autocast, where parameters and
updates stay in float32 (and what is left of float32 matmuls is TF32). With +compile, `torch.compile` of the model."""

SHAPES: dict[str, dict[str, Any]] = {
    "micro": dict(vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=2),  # for tests
    # nanoGPT's Tiny Shakespeare on a CPU and on a GPU, and GPT-2 124M, of which a CPU trains one sequence at a time
    "tiny": dict(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128, batch_size=12),
    "baby": dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, batch_size=64),
    "small": dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768, batch_size=16),
}
SCAN_STEPS = {"micro": (2, 2), "tiny": (20, 50), "baby": (1, 50), "small": (1, 10)}
"""Steps between two readings of the loss, on both sides: on a CPU, on a GPU."""


def config_of(name: str, device: Device, **changes: Any) -> Config:
    """A shape with nanoGPT's optimizer, and `changes` to its fields by name.

    Raises:
      UsageError: there is no such shape.
    """
    if name not in SHAPES:
        raise UsageError(f"no shape {name!r}, expected one of {', '.join(SHAPES)}")
    settings = dict(scan_steps=SCAN_STEPS[name][device == "gpu"], steps=2000, sampling="random", eval_every=0)
    if (name, device) == ("small", "cpu"):
        settings["batch_size"] = 1
    return replaced(Config(), **SHAPES[name] | settings | changes)
