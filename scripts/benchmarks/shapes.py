"""The models that are measured, by name, with their batch sizes."""

from dataclasses import dataclass, replace
from typing import Literal

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError
from jaxgpt.monitor.chips import flops_per_token

Device = Literal["cpu", "gpu"]
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
"""The compute dtypes of jaxgpt that are measured."""


@dataclass(frozen=True)
class Shape:
    about: str
    model: ModelConfig
    batch_size: int
    steps_on_cpu: int
    """Steps between two readings of the loss, on both sides."""
    steps_on_gpu: int


def _model(V: int, T: int, L: int, H: int, C: int) -> ModelConfig:
    return ModelConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C)


SHAPES = {
    "micro": Shape("for tests", _model(13, 8, 1, 2, 16), 2, 2, 2),
    "tiny": Shape("nanoGPT's Tiny Shakespeare on a CPU", _model(65, 64, 4, 4, 128), 12, 20, 50),
    "baby": Shape("nanoGPT's Tiny Shakespeare on a GPU", _model(65, 256, 6, 6, 384), 64, 1, 50),
    "small": Shape("GPT-2 124M, one sequence at a time on a CPU", _model(50304, 1024, 12, 12, 768), 16, 1, 10),
}


def config_of(
    name: str, device: Device, precision: Precision = "float32", dropout: float = 0.0, batch_size: int = 0
) -> Config:
    """A shape with nanoGPT's optimizer; `scan_steps` is the number of steps between two readings of the loss.

    Args:
      batch_size: 0 is that of the shape.

    Raises:
      UsageError: there is no such shape.
    """
    if name not in SHAPES:
        raise UsageError(f"no shape {name!r}, expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    steps = shape.steps_on_gpu if device == "gpu" else shape.steps_on_cpu
    batch_size = batch_size or (1 if name == "small" and device == "cpu" else shape.batch_size)
    train = TrainConfig(steps=2000, batch_size=batch_size, sampling="random", scan_steps=steps, eval_every=0)
    model = replace(shape.model, dropout=dropout, precision=precision)
    return Config(model=model, optimizer=OptimizerConfig(), train=train)


def describe(name: str, config: Config) -> str:
    """A note on a shape."""
    m, B = config.model, config.train.batch_size
    sizes = f"L {m.n_layer}, H {m.n_head}, C {m.n_embd}, T {m.block_size}, B {B}, V {m.vocab_size}"
    return f"{name}: {SHAPES[name].about}: {sizes}"


def tokens_per_step(config: Config) -> int:
    return config.train.batch_size * config.model.block_size


def flops_per_step(config: Config) -> int:
    """Matmul FLOPs of a training step: three times those of a forward pass."""
    return 3 * flops_per_token(config.model) * tokens_per_step(config)
