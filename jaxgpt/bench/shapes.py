"""What is measured: models by name, with the batch that goes with them."""

from dataclasses import dataclass, replace
from typing import Literal

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Shape:
    """A model, its batch, and how many steps are taken between two looks at the loss, on both sides."""

    model: ModelConfig
    batch_size: int
    steps_on_cpu: int
    steps_on_gpu: int
    parts_on_cpu: int = 1
    """Micro-batches, in which the same batch is tried on a CPU too, on both sides: they may stay in its caches."""


SHAPES = {
    "micro": Shape(ModelConfig(vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16), 2, 2, 2),
    "tiny": Shape(ModelConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128), 12, 20, 50),
    "baby": Shape(ModelConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384), 64, 1, 50, 16),
    "small": Shape(ModelConfig(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768), 8, 1, 10),
}
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
"""The precisions of ours that are measured; "auto" is the faster one of them here."""
ABOUT = {
    "micro": "for tests",
    "tiny": "nanoGPT's Tiny Shakespeare on a CPU: L 4, H 4, C 128, T 64, B 12, V 65",
    "baby": "nanoGPT's Tiny Shakespeare on a GPU: L 6, H 6, C 384, T 256, B 64, V 65",
    "small": "GPT-2 124M: L 12, H 12, C 768, T 1024, V 50304; B 8 on a GPU, 1 on a CPU",
}


def config_of(name: str, device: str, precision: Precision = "float32", dropout: float = 0.0) -> Config:
    """The run of a shape's name with nanoGPT's optimizer; `scan_steps` is the number of steps between two looks.

    Raises:
      UsageError: there is no such shape.
    """
    if name not in SHAPES:
        raise UsageError(f"no shape {name!r}, expected one of {', '.join(SHAPES)}")
    shape, gpu = SHAPES[name], device == "gpu"
    batch_size = 1 if name == "small" and not gpu else shape.batch_size
    return Config(
        model=replace(shape.model, dropout=dropout, precision=precision),
        optimizer=OptimizerConfig(),
        train=TrainConfig(
            steps=2000,
            batch_size=batch_size,
            sampling="random",
            scan_steps=shape.steps_on_gpu if gpu else shape.steps_on_cpu,
            eval_every=0,
        ),
    )


def flops_per_step(config: Config) -> int:
    """Operations of the products of a training step: three times those of a forward pass."""
    from jaxgpt import cost

    return 3 * cost.flops_per_token(config.model) * config.train.batch_size * config.model.block_size
