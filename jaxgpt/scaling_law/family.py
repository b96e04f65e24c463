"""A family of models alike in all but size, at several amounts of text: what a scaling law is fitted to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt import config as configs
from jaxgpt import cost
from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError, replaced
from jaxgpt.sweep.grid import Member

SHAPES = ((2, 16), (2, 32), (3, 48), (4, 64), (4, 96), (5, 128))
"""(n_layer, n_embd): from about 10,000 parameters to 1 million, with the vocabulary of a text of characters."""
HEAD = 16
"""Channels of a head."""
RATE, AT = 2.5e-3, 64
"""A learning rate that a sweep found good for so many channels; for others, in proportion to the root of how many
fewer."""

BASE = Config(
    model=ModelConfig(block_size=64),
    optimizer=OptimizerConfig(min_learning_rate=0.0, schedule="linear", warmup_steps=0, weight_decay=0.1),
    train=TrainConfig(batch_size=12, scan_steps=20, eval_every=0, eval_start=False, eval_batches=0),
)


@dataclass(frozen=True)
class Size:
    """A model of the family."""

    n_layer: int
    n_embd: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """ "4x128": layers and channels.

        Raises:
          UsageError: it is none of that form.
        """
        layers, by, channels = text.partition("x")
        if not (by and layers.isdecimal() and channels.isdecimal() and int(channels) % HEAD == 0 and int(channels)):
            raise UsageError(f"size {text!r}: expected LAYERSxCHANNELS, channels a multiple of {HEAD}, as in 4x128")
        return cls(int(layers), int(channels))


def family(base: Config, sizes: Sequence[Size], tokens: Sequence[int], seeds: int = 1) -> list[Member]:
    """A member for each size, amount of tokens and seed, the schedule of each as long as it is itself.

    Args:
      tokens: to train on, rounded to whole scans of steps.

    Raises:
      ConfigError: one cannot run.
    """
    found = []
    per_scan = base.train.batch_size * base.model.block_size * base.train.scan_steps
    for size in sizes:
        for n in tokens:
            steps = max(1, round(n / per_scan)) * base.train.scan_steps
            setting: dict[str, Any] = {
                "n_layer": size.n_layer,
                "n_embd": size.n_embd,
                "n_head": size.n_embd // HEAD,
                "learning_rate": float(f"{RATE * (AT / size.n_embd) ** 0.5:.3g}"),
                "steps": steps,
                "decay_steps": steps,
                "warmup_steps": max(1, steps // 10),
            }
            for seed in range(base.train.seed, base.train.seed + seeds):
                shown = {name: setting[name] for name in ("n_layer", "n_embd", "steps")}  # the rest follows
                found.append(Member(configs.check(replaced(base, **setting, seed=seed)), shown))
    return found


def points(members: Sequence[Member], lines: Sequence[dict[str, Any]]) -> list[tuple[int, int, float]]:
    """(parameters, tokens, loss) of each finished member; the loss of one that has diverged is nan."""
    done = {
        line["member"]: math.nan if line["val_loss"] is None else line["val_loss"] for line in lines if line["done"]
    }
    configs = {i: members[i].config for i in sorted(done)}
    return [(parameters(config), tokens_seen(config), done[i]) for i, config in configs.items()]


def parameters(config: Config) -> int:
    """N of a member whose vocabulary is known: all of them, embeddings too, as Hoffmann et al. count."""
    return cost.n_params(config.model)


def tokens_seen(config: Config) -> int:
    """D of a member: the tokens that it learns from, some of them several times."""
    return config.train.steps * config.train.batch_size * config.model.block_size
