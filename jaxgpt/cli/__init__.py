"""`jaxgpt COMMAND`: parses, calls, prints. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.

Each command is a module whose `run` (or `run_COMMAND`, of several) takes the arguments after the command and returns
the exit code. Slow imports wait: the module until its command is named, JAX until the arguments are parsed.
"""

import difflib
import gc
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn, cast

from jaxgpt.config import UsageError

COMMANDS = {  # its module, and its line in the overview
    "prepare": ("prepare.cli", "Turn a text into shards of tokens and tokens.json."),
    "train": ("cli.train", "Train a recipe, or resume a run."),
    "sample": ("cli.sample", "Write text with a trained run."),
    "serve": ("serve.cli", "Open a playground in the browser: samples, alternatives, attention."),
    "eval": ("cli.evaluate", "Score a run on a whole split."),
    "report": ("report.cli", "Write an HTML report of runs: curves, samples, losses by token, attention."),
    "diagnose": ("diagnostics.cli", "Diagnose a run: gradient noise, curvature, influence, attention, logit lens."),
    "verify-resume": ("verify.cli", "Prove that a killed and resumed run keeps every bit."),
    "import-gpt2": ("huggingface.cli", "Make a run from a Hugging Face GPT-2, to sample, evaluate and fine-tune."),
    "sweep": ("sweep.cli", "Train seeds and settings of a recipe together, and find the best."),
    "scaling-fit": ("scaling_law.cli", "Train models of several sizes and fit a scaling law."),
    "plan": ("plan.cli", "Compile a recipe for chips that are not attached: memory, communication, speed."),
    "export": ("huggingface.cli", "Write a run as a folder that transformers loads."),
    "lecture": ("lecture.cli", "Train and score the lecture's models, from a uniform guess to the transformer."),
    "ledger": ("profile.ledger_cli", "Run a step in every way that JAX can: what jit costs and saves."),
    "inspect": ("profile.inspect_cli", "Show parameters, FLOPs and memory of a step, and what XLA makes of it."),
    "recipes": ("cli.list_recipes", "List the recipes."),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `argv` (that of the process by default) and exit."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ["JAX_ENABLE_X64"] = "0"  # float32 is part of what a command computes; JAX is not imported yet
    gc.set_threshold(100_000)  # by default 700 new objects; what JAX imports and traces is not garbage
    code = run_command(sys.argv[1:] if argv is None else argv)
    gc.freeze()  # the interpreter would look half a second for garbage among all that ends with the process
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or a reader that has gone: let the interpreter's own last flush find no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run_command(argv: Sequence[str]) -> int:
    """The exit code of `jaxgpt *argv`; errors that a person can mend are printed without a traceback."""
    if "--traceback" in argv:
        os.environ["JAXGPT_TRACEBACK"] = "1"  # processes that this one starts print theirs too
        argv = [arg for arg in argv if arg != "--traceback"]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(_versions())
        return 0
    command, args = argv[0], list(argv[1:])
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return _fail(f"no command {command!r}{hint}\n{overview()}", 2)
    try:
        module = import_module(f"jaxgpt.{COMMANDS[command][0]}")
        run = getattr(module, f"run_{command.replace('-', '_')}", None) or module.run
        return cast(int, run(args))
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # whoever read the output has gone
        return 1
    except MemoryError as error:
        return _fail(f"out of memory {error}: close other programs, or try a smaller model or --batch-size", 1)
    except (OSError, RuntimeError) as error:
        ours = isinstance(error, OSError) or type(error).__module__.startswith("jaxgpt.")
        text = str(error) if ours else f"{type(error).__name__}: {error} (--traceback shows where)"
        return _fail("\n".join([text, *getattr(error, "__notes__", [])]), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if isinstance(error, AssertionError) and not str(error) and platforms:  # all that JAX raises
            hint = "unset it to use what is there, or install the plugin, as pip install 'jaxgpt[cuda]' does for CUDA"
            return _fail(f"JAX finds no device of JAX_PLATFORMS={platforms}: {hint}", 1)
        if not _one_of_several():
            raise
        return _fail("".join(traceback.format_exception(error)), 1)


def _one_of_several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def overview() -> str:
    """What `jaxgpt --help` prints."""
    lines = [f"  {command:<15}{line}" for command, (_, line) in COMMANDS.items()]
    rest = "  --version      Print versions.\n  --traceback    With any command: show where an error was raised."
    return (
        "usage: jaxgpt COMMAND ...\n\n" + "\n".join([*lines, "", rest]) + "\n\n"
        "jaxgpt COMMAND --help lists the options of a command."
    )


def _versions() -> str:
    from importlib.metadata import version

    from jaxgpt import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    return f"jaxgpt {__version__} (jax {version('jax')}, jaxlib {version('jaxlib')}, Python {python})"


def _open_standard_streams() -> None:
    """Let output that was closed (`jaxgpt ... >&-`) go nowhere; else the next file opened would be file 1."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w", closefd=False), sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _fail(message: str, code: int) -> int:
    """Print what went wrong, and where if --traceback or JAXGPT_TRACEBACK asks; `code`."""
    with suppress(OSError):
        if sys.exc_info()[0] and os.environ.get("JAXGPT_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"jaxgpt: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if _one_of_several():
        os._exit(code)  # JAX would wait for the other processes, which wait for this one
    return code
