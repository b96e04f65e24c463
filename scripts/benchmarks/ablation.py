"""The effect of each option of the model and the optimizer on the loss: the same short run with it and without."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, UsageError, check
from jaxgpt.corpus import Corpus
from jaxgpt.data import chunks, loader
from jaxgpt.evaluation import evaluate
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.profile.report import Report
from jaxgpt.recipes import MODERN, MUON
from jaxgpt.sharding import one_device
from jaxgpt.step import jit_train_steps, sharded_init
from scripts.benchmarks.machine import facts

Change = tuple[dict[str, Any], dict[str, Any]]
"""Fields of the model, and of the optimizer."""

PLAIN: Change = ({"tie_weights": False}, {"schedule": "linear", "min_learning_rate": 0.0, "learning_rate": 4e-3})
"""GPT-2's block with an untied head, and AdamW with a learning rate for a short run."""
ALL: Change = ({**MODERN, "smear": True, "bigram_embed": True}, {**MUON, "muon_momentum": 0.85})
ADDED: dict[str, Change] = {
    "bfloat16": ({"precision": "bfloat16"}, {}),
    "rope": ({"position": "rope"}, {}),
    "rms norm": ({"norm": "rms"}, {}),
    "qk norm": ({"qk_norm": True}, {}),
    "relu²": ({"mlp": "relu2"}, {}),
    "swiglu": ({"mlp": "swiglu"}, {}),
    "zero init": ({"zero_init": True}, {}),
    "softcap 15": ({"softcap": 15.0}, {}),
    "2 kv heads": ({"n_kv_head": 2}, {}),
    "window 16": ({"window": 16}, {}),
    "smear": ({"smear": True}, {}),
    "bigram embed": ({"bigram_embed": True}, {}),
    "muon": ({}, MUON),
}
REMOVED: dict[str, Change] = {
    "bfloat16": ({"precision": "float32"}, {}),
    "rope": ({"position": "learned"}, {}),
    "rms norm": ({"norm": "layer"}, {}),
    "qk norm": ({"qk_norm": False}, {}),
    "relu²": ({"mlp": "gelu"}, {}),
    "zero init": ({"zero_init": False}, {}),
    "smear": ({"smear": False}, {}),
    "bigram embed": ({"bigram_embed": False}, {}),
    "muon": ({}, {**PLAIN[1], "algorithm": "adamw", "warmup_steps": 100}),
    "muon_momentum 0.85": ({}, {"muon_momentum": 0.95}),
}


def ablate(
    corpus: str = "shakespeare", seeds: int = 3, steps: int = 300, layers: int = 2, data_dir: Path = Path("data")
) -> Report:
    """The effect of each option of the model and the optimizer: validation losses of short runs on a CPU.

    Each option is added to a plain GPT, then left out of a modern one. Takes some ten minutes on two cores.

    Args:
      corpus: a corpus or a text file
      seeds: runs of each option
      steps: of each run
      layers: of the model
      data_dir: folder of all prepared corpora
    """
    if seeds < 1 or steps < 3:
        raise UsageError(f"seeds is {seeds} and steps {steps}, expected 1 or more and 3 or more")
    machine = facts("cpu")
    use_compile_cache()
    prepared, tables = prepare_corpus(corpus, data_dir=data_dir).corpus, []
    for title, base, changes in [
        ("Added to the plain block, AdamW", PLAIN, ADDED),
        ("Left out of the modern block, Muon", ALL, REMOVED),
    ]:
        print(title)
        baseline = trained(prepared, base, seeds, steps, layers)
        rows = [row("(nothing)", baseline, baseline)]
        for name, (model, optimizer) in changes.items():
            results = trained(prepared, ({**base[0], **model}, {**base[1], **optimizer}), seeds, steps, layers)
            rows.append(row(name, results, baseline))
            print(rows[-1], flush=True)
        tables.append({"title": title, "rows": rows})
    notes = [
        f"{layers} layers, 4 heads, 128 channels, context 64, {steps} steps of 12 sequences, {seeds} seeds: mean "
        "validation loss over the whole split with its standard error, in nats per token",
        "change: the mean over seeds of the difference from the first row, with its standard error; below zero is "
        "better. Nothing else was tuned again, which favours the first row",
    ]
    return {"mode": "ablation", "facts": machine, "notes": notes, "failed": {}, "tables": tables}


def trained(corpus: Corpus, change: Change, seeds: int, steps: int, n_layer: int) -> list[tuple[float, float]]:
    """(validation loss, seconds per step after the first chunk) of each seed."""
    results = [one(corpus, change, 1337 + i, steps, n_layer) for i in range(seeds)]
    jax.clear_caches()  # the programs of thirty configs would take gigabytes
    return results


def one(corpus: Corpus, change: Change, seed: int, steps: int, n_layer: int) -> tuple[float, float]:
    model, optimizer = change
    config = check(
        Config(
            data=DataConfig(),
            model=replace(ModelConfig(vocab_size=corpus.tokenizer.vocab_size, n_layer=n_layer), **model),
            optimizer=replace(OptimizerConfig(warmup_steps=min(100, steps // 3)), **optimizer),
            train=TrainConfig(seed=seed, steps=steps, scan_steps=max(1, steps // 3), eval_every=0),
        )
    )
    train_tokens, val_tokens = corpus.split(config.data)
    feed, state, times = loader(config, train_tokens, one_device()), sharded_init(config, one_device()), []
    program = replace(config, train=replace(config.train, seed=0))  # no dropout: one program for all seeds
    for begin, end in chunks(config, 0):
        began = time.perf_counter()
        state, _ = jit_train_steps(program, one_device())(state, *feed(begin, end))
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) / (end - begin))
    loss = evaluate(config.model, state.params, val_tokens, corpus.tokenizer).loss
    return loss, min(times[1:], default=math.nan)


def row(name: str, results: list[tuple[float, float]], baseline: list[tuple[float, float]]) -> dict[str, Any]:
    """A row of the table from (loss, seconds) of each seed, beside those of the first row."""
    losses = [loss for loss, _ in results]
    changes = [loss - other for loss, (other, _) in zip(losses, baseline, strict=True)]
    return {
        "option": name,
        "loss": f"{statistics.mean(losses):.4f} ± {standard_error(losses):.4f}",
        "change": "" if results is baseline else f"{statistics.mean(changes):+.4f} ± {standard_error(changes):.4f}",
        "ms/step": round(1000 * float(np.median([seconds for _, seconds in results])), 1),
    }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of `values`; NaN for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
