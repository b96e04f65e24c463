"""Import Hugging Face folders as runs, and export runs as folders."""

import os
import re
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt.cli.places import local_path
from jaxgpt.cli.runs import start_run
from jaxgpt.config import Config, MissingExtraError, ModelConfig, replaced
from jaxgpt.corpus import read_meta
from jaxgpt.huggingface import gpt2
from jaxgpt.huggingface.gpt2 import InteropError
from jaxgpt.model import Params
from jaxgpt.monitor.facts import command
from jaxgpt.run import Run, RunError
from jaxgpt.start import load_checkpoint
from jaxgpt.tokenizer import Tokenizer, from_json

VOCABULARIES = ["tokens.json", "tokenizer.json", "merges.txt", "vocab.json"]
VOCABULARIES += ["vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"]  # not supported
FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
FILES += ["tokenizer_config.json", "added_tokens.json", *VOCABULARIES]
"""The files of a model to download."""
TRAINING_SETTINGS = ["dropout", "precision", "remat", "deterministic"]
"""How to train a model, whatever its weights: settings that no Hugging Face folder holds."""


def find(name: str) -> Path:
    """A local folder, or a model of the Hugging Face hub, downloaded into the hub's cache.

    Raises:
      InteropError: there is no such folder, and no such model on the hub, or the hub is unreachable.
    """
    folder = local_path(name)
    if folder.is_dir():
        return folder
    if folder.is_file() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise InteropError(f"no folder {name!r}: {gpt2.advice(folder.parent)}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(f"no folder {name!r}, and fetching it by name", "huggingface_hub", "hf") from error
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).partition("\n")[0]
        raise InteropError(
            f"{name!r} cannot be fetched ({reason}); fetch config.json, model.safetensors, vocab.json and merges.txt "
            f"from https://huggingface.co/{name} into a folder, and give its path: jaxgpt import-gpt2 FOLDER"
        ) from error


def import_run(source: Path, config: Config, name: str, runs_dir: Path, data_dir: Path, block_size: int = 0) -> Run:
    """A run at step 0 with the weights of a GPT-2.

    Args:
      config: settings for fine-tuning; of those of the model, only TRAINING_SETTINGS are used. The tokenizer "gpt2",
        the default, means the folder's own if it has one; any other replaces it.
      block_size: as `gpt2.load`.

    Raises:
      UsageError: as `gpt2.load` and `start`.
    """
    model, params = gpt2.load(source, block_size)
    if config.data.tokenizer == "gpt2" and any((source / each).is_file() for each in VOCABULARIES):
        config = replaced(config, tokenizer=str(source.resolve()))
    config = replaced(config, **(vars(model) | {name: getattr(config.model, name) for name in TRAINING_SETTINGS}))
    params = jax.tree.map(jnp.asarray, params)
    return start_run(config, name, runs_dir, data_dir, params, origin=str(source.resolve()))[0]


def export_run(run: Run, folder: Path, which: str = "best") -> int:
    """Write a checkpoint with its config, vocabulary and model card into a new folder, atomically. Returns its step.

    Raises:
      InteropError: the folder exists or cannot be written, or the model is not a GPT-2.
      RunError: there is no checkpoint yet.
    """
    if folder.exists():
        raise InteropError(f"{folder} exists; give a new folder: --out OTHER-FOLDER")
    from safetensors import SafetensorError

    step, params = load_checkpoint(run, which)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        gpt2.save(partial, run.config.model, jax.device_get(params))
        shutil.copyfile(run.path / "tokens.json", partial / "tokens.json")
        # the bytes of a path that is not UTF-8 are surrogates, which the card shows as escapes
        (partial / "README.md").write_text(card(run, step), "utf-8", errors="backslashreplace")
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InteropError(
            f"{folder} cannot be written: {getattr(error, 'strerror', error)}; name another folder: --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return step


def load_export(folder: Path) -> tuple[ModelConfig, Params, Tokenizer]:
    """The model config, weights and tokenizer of a folder that `export_run` wrote.

    Raises:
      InteropError, CorpusError: a file is missing or damaged, or the vocabulary is larger than the model's.
    """
    config, params = gpt2.load(folder)
    to_import = shlex.join(["jaxgpt", "import-gpt2", str(folder), "--run", "NAME"])
    hint = f"only an export has one; to make a run of another GPT-2: {to_import}"
    tokenizer = from_json(read_meta(folder / "tokens.json", hint)["tokenizer"])
    if tokenizer.vocab_size > config.vocab_size:
        raise InteropError(
            f"{folder / 'tokens.json'} has {tokenizer.vocab_size} ids, expected at most the model's {config.vocab_size}"
        )
    return config, params, tokenizer


def card(run: Run, step: int) -> str:
    """The model card: sizes, loss, training text, and the command that reproduces the run."""
    meta, config, loss = run.corpus_meta, run.config, "not evaluated at this step"
    with suppress(RunError):  # an export works without metrics
        for line in run.metrics():
            if line["step"] == step and line.get("val_loss") is not None:
                loss = (
                    f"{line['val_loss']:.4f} nats per token over the whole validation split "
                    f"({line['val_n_tokens']:,} tokens, {line['val_bits_per_byte']:.4f} bits per byte)"
                )
    model, made_by, started_from = config.model, f"`{command(config)}`", "random weights"
    for event in run.events():
        if event["event"] == "import":
            started_from = Path(event["origin"]).name
            made_by = f"`jaxgpt import-gpt2 {started_from}`, with the settings of {made_by}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {run.path.name}

A GPT of {model.n_layer} layers, {model.n_head} heads and {model.n_embd} channels, with a context of
{model.block_size} tokens and a vocabulary of {model.vocab_size}, in the format of GPT-2. Trained with jaxgpt.

| | |
| --- | --- |
| steps | {step:,} |
| loss | {loss} |
| text | {meta["source"]}: {meta["count"]:,} tokens, from {meta["origin"]} |
| SHA-256 of the text | {meta["source_sha256"]} |
| SHA-256 of the tokens | {meta["sha256"]} |
| started from | {started_from} |
| command | {made_by} |

`tokens.json` holds the vocabulary. Sample with `jaxgpt sample FOLDER`, or load the weights with
`transformers.GPT2LMHeadModel.from_pretrained(FOLDER)`.
"""
