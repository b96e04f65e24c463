"""The effect of each option of the model and the optimizer on the loss: the same short run with it and without."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.config import Config, UsageError, check, replaced
from jaxgpt.corpus import Corpus
from jaxgpt.data import loader
from jaxgpt.evaluation import evaluate
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.profile.report import Report
from jaxgpt.recipes import MODERN, MUON
from jaxgpt.sharding import one_device
from jaxgpt.step import jit_train_steps, sharded_init
from scripts.benchmarks.contest import log
from scripts.benchmarks.machine import facts

Fields = dict[str, Any]
"""Of the model and the optimizer."""

PLAIN: Fields = {"tie_weights": False, "schedule": "linear", "min_learning_rate": 0.0, "learning_rate": 4e-3}
"""GPT-2's block with an untied head, and AdamW with a learning rate for a short run."""
ADDED: dict[str, Fields] = {
    "bfloat16": {"precision": "bfloat16"},
    "rope": {"position": "rope"},
    "rms norm": {"norm": "rms"},
    "qk norm": {"qk_norm": True},
    "relu²": {"mlp": "relu2"},
    "swiglu": {"mlp": "swiglu"},
    "zero init": {"zero_init": True},
    "softcap 15": {"softcap": 15.0},
    "2 kv heads": {"n_kv_head": 2},
    "window 16": {"window": 16},
    "smear": {"smear": True},
    "bigram embed": {"bigram_embed": True},
    "muon": MUON,
}
ALL: Fields = MODERN | MUON | {"smear": True, "bigram_embed": True, "muon_momentum": 0.85}
LEFT_OUT = ("bfloat16", "rope", "rms norm", "qk norm", "relu²", "zero init", "smear", "bigram embed", "muon")
"""The options of ALL. Without one, its fields are those of PLAIN."""


def ablate(corpus: str = "shakespeare", seeds: int = 3, steps: int = 300) -> Report:
    """The effect of each option of the model and the optimizer: validation losses of short runs on a CPU.

    Each option is added to a plain GPT, then left out of a modern one. Takes some ten minutes on two cores.

    Args:
      corpus: a corpus or a text file
      seeds: runs of each option
      steps: of each run
    """
    if seeds < 1 or steps < 3:
        raise UsageError(f"seeds is {seeds} and steps {steps}, expected 1 or more and 3 or more")
    machine = facts("cpu")
    use_compile_cache()
    prepared, tables = prepare_corpus(corpus).corpus, []
    plain = short_run(PLAIN, steps)
    before = vars(plain.model) | vars(plain.optimizer)
    removed = {name: {field: before[field] for field in ADDED[name]} for name in LEFT_OUT}
    for title, base, changes in [
        ("Added to the plain block, AdamW", PLAIN, ADDED),
        ("Left out of the modern block, Muon", ALL, removed),
    ]:
        log(title)
        baseline = trained(prepared, base, seeds, steps)
        rows = [row("(nothing)", baseline, baseline)]
        for name, change in changes.items():
            rows.append(row(name, trained(prepared, base | change, seeds, steps), baseline))
            log(str(rows[-1]))
        tables.append({"title": title, "rows": rows})
    notes = [
        f"2 layers, 4 heads, 128 channels, context 64, {steps} steps of 12 sequences, {seeds} seeds: mean validation "
        "loss over the whole split with its standard error, in nats per token",
        "change: the mean over seeds of the difference from the first row, with its standard error; below zero is "
        "better. Nothing else was tuned again, which favours the first row",
    ]
    return {"mode": "ablate", "facts": machine, "notes": notes, "failed": {}, "tables": tables}


def short_run(fields: Fields, steps: int) -> Config:
    """A config of two layers, otherwise with our defaults."""
    defaults = dict(n_layer=2, warmup_steps=min(100, steps // 3), scan_steps=steps, eval_every=0)
    return replaced(Config(), **defaults | {"steps": steps} | fields)


def trained(corpus: Corpus, fields: Fields, seeds: int, steps: int) -> list[float]:
    """The validation loss of each seed."""
    losses = [one(corpus, replaced(short_run(fields, steps), seed=1337 + i)) for i in range(seeds)]
    jax.clear_caches()  # the programs of thirty configs would take gigabytes
    return losses


def one(corpus: Corpus, config: Config) -> float:
    """The loss on the whole validation split after training."""
    config = check(replaced(config, vocab_size=corpus.tokenizer.vocab_size))
    train_tokens, val_tokens = corpus.split(config.data)
    windows = loader(config, train_tokens, one_device())(0, config.train.steps)
    program = replaced(config, seed=0)  # no dropout: one program for all seeds
    state, _ = jit_train_steps(program, one_device())(sharded_init(config, one_device()), *windows)
    return evaluate(config.model, state.params, val_tokens, corpus.tokenizer).loss


def row(name: str, losses: list[float], baseline: list[float]) -> dict[str, Any]:
    """A row of the table from the loss of each seed, beside those of the first row."""
    changes = [loss - other for loss, other in zip(losses, baseline, strict=True)]
    return {
        "option": name,
        "loss": f"{statistics.mean(losses):.4f} ± {standard_error(losses):.4f}",
        "change": "" if losses is baseline else f"{statistics.mean(changes):+.4f} ± {standard_error(changes):.4f}",
    }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of `values`; NaN for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
