"""`jaxgpt <verb>`: each verb parses, calls, prints. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.

Each verb is a module whose `run` takes the words after the verb and gives the exit code. What is slow to import waits:
the module until its verb is named, JAX until the words are understood.
"""

import difflib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from jaxgpt.config import UsageError

VERBS = {  # its module, and its line in the overview
    "prepare": ("prepare", "Turn a text into shards of tokens and tokens.json."),
    "train": ("train", "Train a recipe, or resume a run."),
    "sample": ("sample", "Write text with a trained run."),
    "serve": ("serve", "Play with runs in a browser: watch them write, look inside."),
    "eval": ("evaluate", "Score a run on a whole split."),
    "report": ("report", "Make a page of runs: curves, texts, what surprised them, where they look."),
    "diagnose": ("diagnose", "Derivatives of a run's loss: noise, curvature, influence; and a look inside."),
    "verify-resume": ("verify_resume", "Show that a run which is killed and resumed keeps every bit."),
    "import-gpt2": ("import_gpt2", "Make a run from a Hugging Face GPT-2, to sample, evaluate and fine-tune."),
    "launch": ("launch", "Train in several processes on this machine."),
    "sweep": ("sweep", "Train seeds and settings of a recipe together, and find the best."),
    "scaling-fit": ("scaling_fit", "Train a family of sizes and fit how the loss falls with size and text."),
    "plan": ("plan", "Compile a recipe for chips that are not attached: does it fit, how fast might it be."),
    "export": ("export", "Write a run as a folder that transformers loads."),
    "lecture": ("lecture", "Climb the lecture's ladder, from a uniform guess to the transformer."),
    "ledger": ("ledger", "One step every way JAX can run it: what jit costs and saves, beside PyTorch."),
    "inspect": ("inspect", "What a recipe or a run is made of, and what the compiler makes of it."),
    "recipes": ("list_recipes", "List the recipes."),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `argv` (that of the process by default) and exit."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code, ended = _attempt(sys.argv[1:] if argv is None else argv)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or a reader that has gone: let the interpreter's own last flush find no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not ended and _one_of_several():
        os._exit(code)  # JAX would wait for the other processes, which wait for this one
    sys.exit(code)


def run_verb(argv: Sequence[str]) -> int:
    """The exit code of `jaxgpt *argv`; errors that a person can mend are printed without a traceback."""
    return _attempt(argv)[0]


def _attempt(argv: Sequence[str]) -> tuple[int, bool]:
    """The exit code of `jaxgpt *argv`, and whether the verb came to an end of its own: no error ended it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return (0 if argv else 2), True
    verb, args = argv[0], list(argv[1:])
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return _complain(f"no verb {verb!r}{hint}\n{overview()}", 2), False
    module, _ = VERBS[verb]
    try:
        return import_module(f"jaxgpt.cli.{module}").run(args), True
    except UsageError as error:
        return _complain(str(error), 2), False
    except BrokenPipeError:  # whoever read the output has gone; let the interpreter's last flush find no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, False
    except MemoryError as error:
        said = f"out of memory: {error}" if str(error) else "out of memory"
        hint = "try a smaller --batch-size or a smaller model"
        if verb == "prepare":
            hint = "it holds parts of the text for each core: close other programs, or allow it more, by ulimit -d"
        return _complain(f"{said}; {hint}", 1), False
    except (OSError, RuntimeError) as error:
        return _complain("\n".join([str(error), *getattr(error, "__notes__", [])]), 1), False
    except KeyboardInterrupt:
        return _complain("interrupted", 130), False
    except Exception:
        if not _one_of_several():
            raise
        with suppress(OSError):
            traceback.print_exc()
        return 1, False


def _one_of_several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def overview() -> str:
    """What `jaxgpt --help` prints."""
    lines = [f"  {verb:<15}{line}" for verb, (_, line) in VERBS.items()]
    return "usage: jaxgpt VERB ...\n\n" + "\n".join(lines) + "\n\njaxgpt VERB --help tells the options of a verb."


def _complain(message: str, code: int) -> int:
    with suppress(OSError):
        print(f"jaxgpt: {message}", file=sys.stderr)
    return code
