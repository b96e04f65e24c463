"""The runs behind a scaling law: models of several sizes, each trained on several amounts of tokens."""

from collections.abc import Sequence

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError, replaced
from jaxgpt.monitor import cost
from jaxgpt.scaling_law.law import Point
from jaxgpt.sweep import grid
from jaxgpt.sweep.grid import Member
from jaxgpt.sweep.program import Score

HEAD = 16
"""Channels per attention head."""
LEARNING_RATE, CHANNELS = 2.5e-3, 64
"""A good learning rate for this many channels, found by a sweep; it scales with the inverse root of the channels."""
BASE = Config(
    model=ModelConfig(block_size=64),
    optimizer=OptimizerConfig(min_learning_rate=0.0, schedule="linear", warmup_steps=0, weight_decay=0.1),
    train=TrainConfig(batch_size=12, scan_steps=20, eval_every=0, eval_start=False, eval_batches=0),
)


def parse_size(text: str) -> tuple[int, int]:
    """(n_layer, n_embd) of "4x128". Raises UsageError if it is malformed."""
    layers, _, channels = text.partition("x")
    if not (layers.isdecimal() and channels.isdecimal() and int(channels) and int(channels) % HEAD == 0):
        raise UsageError(f"size {text!r}: expected LAYERSxCHANNELS, channels a multiple of {HEAD}, as in 4x128")
    return int(layers), int(channels)


def family(base: Config, sizes: Sequence[tuple[int, int]], tokens: Sequence[int], seeds: int = 1) -> list[Member]:
    """A member for each size (n_layer, n_embd), amount of tokens (in whole scans of steps) and seed; its schedule is as
    long as its run. Raises as `grid.members`."""
    found = []
    per_scan = base.train.batch_size * base.model.block_size * base.train.scan_steps
    for n_layer, n_embd in sizes:
        for n in tokens:
            steps = max(1, round(n / per_scan)) * base.train.scan_steps
            setting = {"n_layer": n_layer, "n_embd": n_embd, "steps": steps}
            learning_rate = float(f"{LEARNING_RATE * (CHANNELS / n_embd) ** 0.5:.3g}")
            schedule = {"learning_rate": learning_rate, "decay_steps": steps, "warmup_steps": max(1, steps // 10)}
            config = replaced(base, **setting, **schedule, n_head=n_embd // HEAD)
            found += [member._replace(setting=setting) for member in grid.members(config, [], seeds)]
    return found


def points(members: Sequence[Member], scores: Sequence[Score]) -> list[Point]:
    """The point of each finished member that did not diverge. N counts all parameters, embeddings included, as in
    Hoffmann et al. 2022."""
    found = []
    for score in sorted(scores, key=lambda score: score.member):
        if score.done and score.val_loss is not None:
            config = members[score.member].config
            found.append((cost.n_params(config.model), tokens_seen(config), score.val_loss))
    return found


def tokens_seen(config: Config) -> int:
    """D: the tokens of all batches, repetitions included."""
    return config.train.steps * config.train.batch_size * config.model.block_size
