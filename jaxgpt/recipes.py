"""Named runs. Each states its hardware, its wall time and the loss to expect, measured unless it says otherwise."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.config import Config, ConfigError, from_json, replaced


@dataclass(frozen=True)
class Recipe:
    """A configuration with what is known of it."""

    config: Config
    about: str
    hardware: str
    time: str
    loss: str
    """Nats per token over the whole validation split."""


MODERN: dict[str, Any] = dict(
    position="rope", norm="rms", mlp="relu2", qk_norm=True, zero_init=True, tie_weights=False, precision="auto"
)
"""The block of the modded-nanogpt speedruns."""
MUON: dict[str, Any] = dict(
    algorithm="muon", muon_steps=4, learning_rate=1e-2, min_learning_rate=0.0, schedule="linear", warmup_steps=0
)
MUON |= dict(weight_decay=0.0, grad_clip=0.0)
SHORT: dict[str, Any] = dict(corpus="shakespeare", eval_every=0, eval_start=False, eval_batches=0)
"""Tiny Shakespeare, evaluated at the end alone."""
LOCAL: dict[str, Any] = dict(mlp="swiglu", zero_init=False, beta1=0.8, muon_momentum=0.85)
"""What suits a small model that attends to few tokens, beside `window`."""
GPT2: dict[str, Any] = dict(corpus="python-stdlib", tokenizer="gpt2", vocab_size=50304, block_size=1024, beta2=0.95)
GPT2 |= dict(warmup_steps=2000, steps=600_000, sampling="random", scan_steps=10, eval_every=1000, eval_batches=0)
GPT2 |= dict(precision="auto")
"""nanoGPT's settings for GPT-2."""
CPU = "2 CPU cores"

RECIPES: dict[str, Recipe] = {
    "bigram": Recipe(
        replaced(
            Config(),
            **dict(kind="bigram", block_size=256, batch_size=64, steps=1000, scan_steps=100, eval_every=500),
            **dict(learning_rate=0.1, min_lr_ratio=0.01, warmup_steps=0, weight_decay=0.0, grad_clip=0.0),
        ),
        about="The bigram table of the notes, trained down to what counting gives.",
        hardware=CPU,
        time="3 s",
        loss="2.321 ± 0.039 (CPython 3.11.7), 2.492 ± 0.005 on Tiny Shakespeare",
    ),
    "gpt-demo": Recipe(
        replaced(
            Config(),
            **MODERN | MUON | dict(weight_decay=0.1, muon_momentum=0.9, learning_rate=2e-2),
            **dict(block_size=128, smear=True, steps=800, eval_every=200, eval_batches=0),
        ),
        about="A small GPT on the Python documentation that every Python carries: no download.",
        hardware=CPU,
        time="1 min",
        loss="1.112 ± 0.021 (CPython 3.11.7) in bfloat16, in windows of 128",
    ),
    "shakespeare-cpu": Recipe(
        replaced(Config(), corpus="shakespeare", steps=2000, sampling="random"),
        about="nanoGPT's settings for Tiny Shakespeare on a CPU, exactly.",
        hardware=CPU,
        time="1 min 45 s",
        loss="1.907, the mean of seeds 1337, 1338, 1339 (1.916, 1.906, 1.900)",
    ),
    "speedrun-cpu": Recipe(
        replaced(
            Config(),
            **MODERN | MUON | SHORT | LOCAL | dict(muon_learning_rate=4e-2, muon_steps=3),
            **dict(n_layer=1, window=8, bigram_embed=True, batch_size=20, steps=110, scan_steps=55),
        ),
        about="To the loss of nanoGPT's CPU settings in the shortest time: a modern block, a window of 8, and Muon.",
        hardware=CPU,
        time="9.1 s with an empty compile cache, 4.8 s with a warm one",
        loss="1.857, the mean of seeds 1337 to 1341 (1.836 to 1.867)",
    ),
    "best-cpu": Recipe(
        replaced(
            Config(),
            **MODERN | MUON | SHORT | LOCAL | dict(weight_decay=0.1, muon_learning_rate=1.8e-2),
            **dict(block_size=256, window=64, n_head=2, batch_size=8, smear=True, steps=850, scan_steps=85),
        ),
        about="The lowest loss within the time of nanoGPT's CPU settings.",
        hardware=CPU,
        time="1 min 44 s",
        loss="1.479, the mean of seeds 1337, 1338, 1339 (1.474, 1.481, 1.481) in bfloat16, in windows of 256",
    ),
    "shakespeare-gpu": Recipe(
        replaced(
            Config(),
            **dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, precision="auto"),
            **dict(corpus="shakespeare", steps=5000, batch_size=64, sampling="random"),
        ),
        about="nanoGPT's settings for Tiny Shakespeare on a GPU, exactly.",
        hardware="one data-centre GPU",
        time="not measured here; nanoGPT reports 3 minutes on an A100",
        loss="not measured here; nanoGPT reports 1.47, by random batches",
    ),
    "speedrun-gpu": Recipe(
        replaced(
            Config(),
            **MODERN | MUON | SHORT | dict(weight_decay=0.1, muon_momentum=0.9),
            **dict(block_size=256, n_layer=6, n_head=6, n_embd=384, batch_size=64),
            **dict(smear=True, steps=300, scan_steps=100),
        ),
        about="To the loss of nanoGPT's GPU settings in few steps: a modern block, and Muon.",
        hardware="one data-centre GPU",
        time="not measured",
        loss="not measured; meant to reach 1.4697, in windows of 256",
    ),
    "best-gpu": Recipe(
        replaced(
            Config(),
            **MODERN | MUON | SHORT | dict(weight_decay=0.1, muon_momentum=0.9, eval_every=250),
            **dict(block_size=256, n_layer=6, n_head=6, n_embd=384, batch_size=64, dropout=0.4),
            **dict(smear=True, steps=1500, scan_steps=50),
        ),
        about="The lowest loss within the time of nanoGPT's GPU settings.",
        hardware="one data-centre GPU",
        time="not measured",
        loss="not measured; meant to reach 1.43, in windows of 256",
    ),
    "gpt2-124m": Recipe(
        replaced(
            Config(), **GPT2, n_layer=12, n_head=12, n_embd=768, learning_rate=6e-4, batch_size=480, accumulate=40
        ),
        about="GPT-2's shape with nanoGPT's settings; give it a text of your own with --corpus.",
        hardware="eight data-centre GPUs",
        time="not measured here; nanoGPT reports 4 days on eight A100",
        loss="not measured here; nanoGPT reports 2.85 on OpenWebText",
    ),
    "gpt2-1.5b": Recipe(
        replaced(
            Config(),
            **GPT2,
            **dict(n_layer=48, n_head=25, n_embd=1600, scan_layers=True, remat="blocks"),
            **dict(learning_rate=2e-4, batch_size=512),
        ),
        about="The shape of the largest GPT-2; give it a text of your own with --corpus.",
        hardware="256 TPU v5e chips, --mesh data=64,fsdp=4",
        time="not measured; jaxgpt plan gpt2-1.5b estimates it",
        loss="not measured",
    ),
}


FINETUNE = replaced(
    Config(),
    **dict(tokenizer="gpt2", learning_rate=3e-5, schedule="constant", warmup_steps=0),
    **dict(batch_size=8, scan_steps=10, eval_every=100),
)
"""Where `jaxgpt import-gpt2` starts from: nanoGPT's learning rate for fine-tuning."""


def recipe(name: str) -> Recipe:
    """The recipe of that name, or of a file NAME.json that holds a config.

    Raises:
      ConfigError: there is none; the nearest name is suggested. Or the file cannot be read, or holds no config.
    """
    if name.endswith(".json"):
        return _from_file(Path(name))
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no recipe {name!r}; {hint}recipes are {', '.join(RECIPES)}")
    return RECIPES[name]


def _from_file(path: Path) -> Recipe:
    try:
        config = from_json(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the recipe {path} cannot be read: {why}; jaxgpt sweep writes such files") from error
    return Recipe(config, f"The settings in {path}.", "unknown", "unknown", "unknown")
