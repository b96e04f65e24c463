"""`jaxgpt sample`: a run to text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Checkpoint, RunName, RunsDir, parse, typed
from jaxgpt.config import UsageError


@dataclass(frozen=True)
class Sample:
    run: RunName
    prompt: str | None = None
    """What to continue; of a long one the last block_size tokens are seen. CRLF becomes LF, as in the training text.
    None: a line feed."""
    tokens: int = 500
    """How many tokens to write."""
    temperature: float = 0.8
    """Below 1 sharper, above 1 flatter, 0 always the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest of the most likely tokens that reach this probability together; 1 from all."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the most likely one; 0 from all."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be given several times."""
    seed: int = 1337
    """The same seed writes the same text."""
    samples: int = 1
    """How many texts to write."""
    checkpoint: Checkpoint = "best"
    unknown: Literal["error", "skip"] = "error"
    """What to do with a character of the prompt outside the vocabulary."""
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
        None if given.prompt is None else typed(given.prompt),
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
    """(model config, params, tokenizer) of a run or of an exported folder."""
    from jaxgpt.run import Run
    from jaxgpt.start import load_model

    if Run.exists(runs_dir, name) or not (Path(name) / "model.safetensors").is_file():
        return load_model(Run.open(runs_dir, name), checkpoint)
    from jaxgpt.huggingface.folders import load_export

    if checkpoint != "best":
        raise UsageError(f"{name} is an export, with one set of weights: leave out --checkpoint {checkpoint}")
    return load_export(Path(name))
