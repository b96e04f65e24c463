"""`jaxgpt prepare`: tokenize a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli.options import DataDir, parse


@dataclass(frozen=True)
class Prepare:
    corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """python-docs, python-stdlib, shakespeare, fineweb, fineweb-edu, openwebtext; or a file or folder of UTF-8, JSON
    Lines or Parquet, local or at a URL such as gs://bucket/texts or hf://datasets/ORG/NAME/FOLDER; or a pipe such as
    /dev/stdin; or a weighted mixture: "0.7*a.txt + 0.3*b.txt"."""
    tokenizer: str = "char"
    """char, ascii, byte, gpt2, bpe:SIZE (learned from the text, such as bpe:4096), a tokens.json whose vocabulary to
    reuse, or a Hugging Face folder with a byte-level BPE."""
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters outside the vocabulary."""
    column: str = "text"
    """The column of JSON Lines (.jsonl) or .parquet that holds the text; meta.text is the field `text` of `meta`."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    given = parse(Prepare, args, "prepare")
    from rich.console import Console
    from rich.progress import Progress

    from jaxgpt.display.text import count
    from jaxgpt.prepare.build import prepare_corpus

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        done = prepare_corpus(
            given.corpus,
            given.tokenizer,
            unknown=given.unknown,
            data_dir=given.data_dir,
            column=given.column,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    print(done.corpus.summary)
    for note in done.corpus.meta.get("notes", []):
        print(f"  {note}")
    if skipped := done.corpus.meta.get("skipped_characters"):
        print(f"  skipped {count(skipped, 'character')} outside the vocabulary")
    print(f"{'found in' if done.reused else 'written to'} {done.folder}")
    return 0
