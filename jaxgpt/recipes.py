"""Named configurations, each with its hardware, wall time and final loss: measured, unless it says otherwise."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.config import Config, ConfigError, did_you_mean, from_tree, replaced, unresolved
from jaxgpt.files import json_object


@dataclass(frozen=True)
class Recipe:
    """A configuration and its results."""

    config: Config
    about: str
    hardware: str
    time: str
    loss: str
    """Nats per token over the whole validation split."""


MODERN: dict[str, Any] = dict(position="rope", norm="rms", mlp="relu2", qk_norm=True, zero_init=True)
MODERN |= dict(tie_weights=False, precision="auto")
"""The block of the modded-nanogpt speedruns."""
MUON: dict[str, Any] = dict(algorithm="muon", muon_steps=4, learning_rate=1e-2, min_learning_rate=0.0)
MUON |= dict(schedule="linear", warmup_steps=0, weight_decay=0.0, grad_clip=0.0)
SHORT: dict[str, Any] = dict(corpus="shakespeare", eval_every=0, eval_start=False, eval_batches=0)
"""Tiny Shakespeare, evaluated only at the end."""
TUNED: dict[str, Any] = dict(mlp="swiglu", zero_init=False, beta1=0.8, muon_momentum=0.85)
"""What learns fastest in short runs on Tiny Shakespeare."""
BABY: dict[str, Any] = dict(block_size=256, n_layer=6, n_head=6, n_embd=384, batch_size=64)
"""The size of nanoGPT's baby GPT."""
GPT2: dict[str, Any] = dict(corpus="python-stdlib", tokenizer="gpt2", vocab_size=50304, block_size=1024, beta2=0.95)
GPT2 |= dict(warmup_steps=2000, steps=600_000, sampling="random", scan_steps=10, eval_every=1000, eval_batches=0)
GPT2 |= dict(precision="auto")
"""nanoGPT's settings for GPT-2."""
CPU, GPU = "2 CPU cores", "one data-centre GPU"


def _recipe(about: str, hardware: str, time: str, loss: str, **settings: Any) -> Recipe:
    return Recipe(replaced(Config(), **settings), about, hardware, time, loss)


RECIPES: dict[str, Recipe] = {
    "bigram": _recipe(
        about="The bigram table of the lecture notes, trained to the loss of bigram counts.",
        hardware=CPU,
        time="3 s",
        loss="2.321 ± 0.039 on the docs of CPython 3.11.7, 2.487 ± 0.005 on Tiny Shakespeare",
        **dict(kind="bigram", block_size=256, batch_size=64, steps=1000, scan_steps=100, eval_every=500),
        **dict(learning_rate=0.1, min_lr_ratio=0.01, warmup_steps=0, weight_decay=0.0, grad_clip=0.0),
    ),
    "gpt-demo": _recipe(
        about="A small GPT on the documentation that ships with Python: no download.",
        hardware=CPU,
        time="1 min",
        loss="1.112 ± 0.021 on the docs of CPython 3.11.7, in bfloat16, in windows of 128",
        **MODERN | MUON | dict(weight_decay=0.1, muon_momentum=0.9, learning_rate=2e-2),
        **dict(block_size=128, smear=True, steps=800, eval_every=200, eval_batches=0),
    ),
    "shakespeare-cpu": _recipe(
        about="nanoGPT's settings for Tiny Shakespeare on a CPU, exactly.",
        hardware=CPU,
        time="1 min 45 s",
        loss="1.907, mean of 3 seeds (1.900 to 1.916)",
        **dict(corpus="shakespeare", steps=2000, sampling="random"),
    ),
    "speedrun-cpu": _recipe(
        about="The loss of nanoGPT's CPU settings in the shortest time: attention to 8 tokens, and Muon.",
        hardware=CPU,
        time="9.1 s, or 4.8 s with a warm compile cache",
        loss="1.857, mean of 5 seeds (1.836 to 1.867)",
        **MODERN | MUON | SHORT | TUNED | dict(muon_learning_rate=4e-2, muon_steps=3),
        **dict(n_layer=1, window=8, bigram_embed=True, batch_size=20, steps=110, scan_steps=55),
    ),
    "best-cpu": _recipe(
        about="The lowest loss in the time of nanoGPT's CPU settings.",
        hardware=CPU,
        time="1 min 27 s",
        loss="1.467, mean of 3 seeds (1.466 to 1.469), in bfloat16, in windows of 256",
        **MODERN | MUON | SHORT | TUNED | dict(weight_decay=0.1, muon_learning_rate=1.8e-2),
        **dict(block_size=256, window=64, n_head=2, batch_size=8, smear=True, steps=960, scan_steps=80),
    ),
    "shakespeare-gpu": _recipe(
        about="nanoGPT's settings for Tiny Shakespeare on a GPU, exactly.",
        hardware=GPU,
        time="not measured here; nanoGPT reports 3 minutes on an A100",
        loss="not measured here; nanoGPT reports 1.47, by random batches",
        **BABY,
        **dict(dropout=0.2, precision="auto", corpus="shakespeare", steps=5000, sampling="random"),
    ),
    "speedrun-gpu": _recipe(
        about="The loss of nanoGPT's GPU settings in few steps: RoPE, RMSNorm, QK-norm, and Muon.",
        hardware=GPU,
        time="not measured",
        loss="not measured on a GPU; 1.442 on a CPU (seed 1337) in bfloat16, in windows of 256",
        **MODERN | MUON | SHORT | BABY | TUNED | dict(weight_decay=0.1, muon_learning_rate=1.8e-2, batch_size=32),
        **dict(smear=True, steps=300, scan_steps=100),
    ),
    "best-gpu": _recipe(
        about="The lowest loss within the time of nanoGPT's GPU settings.",
        hardware=GPU,
        time="not measured",
        loss="not measured on a GPU; 1.412 on a CPU (seed 1337) in float32, in windows of 256",
        **MODERN | MUON | SHORT | TUNED | dict(weight_decay=0.3, muon_learning_rate=1.8e-2),
        **dict(block_size=256, window=64, n_layer=6, n_head=2, n_embd=256, batch_size=16),
        **dict(smear=True, steps=1000, scan_steps=50),
    ),
    "gpt2-124m": _recipe(
        about="GPT-2 124M with nanoGPT's settings; train it on your own text with --corpus.",
        hardware="eight data-centre GPUs",
        time="not measured here; nanoGPT reports 4 days on eight A100",
        loss="not measured here; nanoGPT reports 2.85 on OpenWebText",
        **GPT2,
        **dict(n_layer=12, n_head=12, n_embd=768, learning_rate=6e-4, batch_size=480, accumulate=40),
    ),
    "gpt2-1.5b": _recipe(
        about="The size of the largest GPT-2; train it on your own text with --corpus.",
        hardware="256 TPU v5e chips, --mesh data=64,fsdp=4",
        time="not measured; jaxgpt plan gpt2-1.5b estimates it",
        loss="not measured",
        **GPT2,
        **dict(n_layer=48, n_head=25, n_embd=1600, scan_layers=True, remat="blocks"),
        **dict(learning_rate=2e-4, batch_size=512),
    ),
}


FINETUNE = replaced(
    Config(),
    **dict(tokenizer="gpt2", learning_rate=3e-5, schedule="constant", warmup_steps=0),
    **dict(batch_size=8, scan_steps=10, eval_every=100),
)
"""The defaults of `jaxgpt import-gpt2`: nanoGPT's learning rate for fine-tuning."""


def recipe(name: str) -> Recipe:
    """The recipe called `name`, or the config in a file NAME.json.

    Raises:
      ConfigError: there is no such recipe (the message suggests a name), or the file does not hold a valid config.
    """
    if name.endswith(".json"):
        try:
            tree = json_object(Path(os.path.expanduser(name)).read_bytes(), "the config")
            tree.pop("seal", None)  # of a run's config.json
            config = unresolved(from_tree(tree))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the recipe {name} cannot be read: {getattr(error, 'strerror', error)}; expected a run's config.json "
                "or the best.json of a sweep"
            ) from error
        return Recipe(config, f"The settings in {name}.", "unknown", "unknown", "unknown")
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}{did_you_mean(name, RECIPES)} (recipes: {', '.join(RECIPES)})")
    return RECIPES[name]
