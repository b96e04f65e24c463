"""`jaxgpt sample`: write text with a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Checkpoint, RunName, RunsDir, parse
from jaxgpt.cli.places import local_path
from jaxgpt.config import UsageError


@dataclass(frozen=True)
class Sample:
    run: RunName
    prompt: str | None = None
    """Text to continue; only its last block_size tokens are used, and CRLF becomes LF. None: a line feed."""
    tokens: int = 500
    """Number of tokens to write."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample only from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities add up to this; 1: from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the highest probability; 0: from all."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop before this text; may be repeated."""
    seed: int = 1337
    """The same seed writes the same text."""
    samples: int = 1
    """Number of texts to write."""
    checkpoint: Checkpoint = "best"
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters of the prompt that are outside the vocabulary."""
    runs_dir: RunsDir = Path("runs")


def run(args: list[str]) -> int:
    given = parse(Sample, args, "sample")
    from jaxgpt.sample import SamplingParams, write

    use_compile_cache()
    config, params, tokenizer = _load_model(given.run, given.runs_dir, given.checkpoint)
    texts = write(
        config,
        params,
        tokenizer,
        given.prompt,
        given.tokens,
        SamplingParams(given.temperature, given.top_k, given.top_p, given.min_p),
        stop=given.stop,
        seed=given.seed,
        samples=given.samples,
        unknown=given.unknown,
    )
    for i, pieces in enumerate(texts):
        if i:
            print("-" * 40)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


def _load_model(name: str, runs_dir: Path, checkpoint: str) -> Any:
    """(model config, params, tokenizer) of a run or an exported folder."""
    from jaxgpt.run import Run
    from jaxgpt.start import load_model

    if Run.exists(runs_dir, name) or not (local_path(name) / "model.safetensors").is_file():
        return load_model(Run.open(runs_dir, name), checkpoint)
    from jaxgpt.huggingface.folders import load_export

    if checkpoint != "best":
        raise UsageError(f"{name} is an export, with one set of weights: leave out --checkpoint {checkpoint}")
    return load_export(local_path(name))
