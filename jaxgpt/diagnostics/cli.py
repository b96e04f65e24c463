"""`jaxgpt diagnose`: derivatives of a run's loss, and a look inside its model."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxgpt.cli import places
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Checkpoint, Folders, RunName, parse
from jaxgpt.config import UsageError

Name = Literal["noise", "curvature", "landscape", "influence", "lens", "attention", "tokens"]


@dataclass(frozen=True)
class Effort:
    """How much a diagnosis computes."""

    windows: int = 256
    """Number of windows of training text for noise and influence."""
    batch: int = 32
    """Number of windows in the batch for curvature and landscape."""
    steps: int = 20
    """Lanczos steps of curvature; each takes a Hessian-vector product, and memory for a copy of the parameters."""
    seed: int = 0
    """Seed of the windows and the random directions."""


@dataclass(frozen=True)
class Diagnose:
    run: RunName
    only: tuple[Name, ...] = ()
    """Diagnoses to make; default: all that apply to the model."""
    text: str | None = None
    """Text for lens, attention, tokens and influence; None: the start of the validation split."""
    effort: Effort = field(default_factory=Effort)
    plots: Path | None = None
    """Folder for PNGs of curvature, landscape, lens and attention; None draws nothing."""
    json: Path | None = None
    """JSON file for all numbers; None writes none."""
    checkpoint: Checkpoint = "best"
    folders: Folders = field(default_factory=Folders)


def run(args: list[str]) -> int:
    given = parse(Diagnose, args, "diagnose")
    import jax

    from jaxgpt import files
    from jaxgpt.cli.runs import corpus_of
    from jaxgpt.diagnostics import view
    from jaxgpt.diagnostics.diagnose import DIAGNOSES, Subject, require
    from jaxgpt.display import charts
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.run import Run
    from jaxgpt.start import load_checkpoint
    from jaxgpt.tokenizer import UnknownCharacterError, normalize_line_ends

    use_compile_cache()
    run = Run.open(given.folders.runs_dir, given.run)
    config = run.config
    places.require_file(given.json, "--json")
    if given.plots:
        charts.require()
        places.require_writable(given.plots, "--plots")
    corpus = corpus_of(run, given.folders.data_dir)
    train, val = corpus.split(config.data)
    text = val[: max(config.model.block_size, 384) + 1]
    if given.text is not None:
        if re.search("[\ud800-\udfff]", given.text):  # Python decodes other bytes to surrogates
            raise UsageError(f"--text is {given.text!r}, expected UTF-8")
        try:
            text = corpus.tokenizer.encode(normalize_line_ends(corpus.tokenizer, given.text))
        except UnknownCharacterError as error:
            where = f"character {error.character!r} at position {error.position} of --text"
            raise UsageError(f"{where} is not among the {error.known}") from error
    has_attention = config.model.kind == "gpt"
    names: Sequence[str] = given.only or [name for name in DIAGNOSES if name != "attention" or has_attention]
    require(config, given.effort, names, text)
    step, params = load_checkpoint(run, given.checkpoint)

    token_bytes, parts = corpus.tokenizer.token_bytes, corpus.training_parts(config.data)
    subject = Subject(config, params, train, text, token_bytes, parts, given.effort)
    console, found = RunConsole(), dict[str, Any]()
    console.print(f"{run.path.name}, step {step:,}, without dropout, in float32")
    for name in names:
        found[name] = jax.device_get(DIAGNOSES[name](subject))
        for line in view.lines(name, found[name], subject):
            console.print(line)
        if given.plots and name in view.CHARTS:
            given.plots.mkdir(parents=True, exist_ok=True)
            charts.save(view.CHARTS[name](found[name], subject), given.plots / f"{name}.png")
    if given.json:
        tree = {"run": run.path.name, "step": step, "effort": asdict(given.effort), **view.plain(found)}
        files.write_atomically(given.json, json.dumps(tree, allow_nan=False).encode() + b"\n")
    return 0
