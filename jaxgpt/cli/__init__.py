"""`jaxgpt COMMAND`. Exit codes: 0 done, 1 failed, 2 bad usage, 128 + N ended by signal N.

Each command has a module whose `run` (`run_COMMAND` if it has several) takes the arguments after the command and
returns the exit code. The module is imported only for its command, and JAX only after the arguments are parsed.
"""

import gc
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn

from jaxgpt.config import UsageError, did_you_mean

COMMANDS = {  # module and line in the overview
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
    "ledger": ("profile.cli", "Run a step in every way that JAX can: what jit costs and saves."),
    "inspect": ("profile.cli", "Show parameters, FLOPs and memory of a step, and what XLA makes of it."),
    "recipes": ("cli.train", "List the recipes."),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, by default sys.argv, and exit."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):  # replace characters that a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Commands compute in float32, and draw from one stream of random numbers; JAX is not imported yet.
    os.environ |= {"JAX_ENABLE_X64": "0", "JAX_THREEFRY_PARTITIONABLE": "1"}
    gc.set_threshold(100_000)  # 700 new objects by default; JAX creates many that live on
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        code = run_command(sys.argv[1:] if argv is None else argv)
    except SystemExit as ended:  # tyro has printed the help, or what it refused
        code = int(ended.code or 0)
    gc.freeze()  # the last collection would take half a second, for objects that end with the process
    if (error := flush_stdout()) and not isinstance(error, BrokenPipeError):
        code = code or _fail(f"the output cannot be written: {error.strerror}", 1)
    if code == 130 and not _one_of_several():
        os._exit(code)  # at once: the interpreter would wait for threads that compile
    sys.exit(code)


def flush_stdout() -> OSError | None:
    """Flush stdout. If that fails, as on a full disk, return the error and send all later output to the null device, so
    that the interpreter's own last flush succeeds."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def run_command(argv: Sequence[str]) -> int:
    """Run `jaxgpt *argv` and return its exit code. Errors that a user can fix are printed without a traceback."""
    if "--traceback" in argv:
        os.environ["JAXGPT_TRACEBACK"] = "1"  # for child processes too
        argv = [arg for arg in argv if arg != "--traceback"]
    command, args = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if command not in (*COMMANDS, "-h", "--help", "--version"):
        return _fail(f"no command {command!r}{did_you_mean(command, COMMANDS)}\n{overview()}", 2)
    try:
        if command in ("-h", "--help"):
            print(overview())
            return 0 if argv else 2
        if command == "--version":
            print(_versions())
            return 0
        module = import_module(f"jaxgpt.{COMMANDS[command][0]}")
        run = getattr(module, f"run_{command.replace('-', '_')}", None) or module.run
        return run(args)
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # the reader of the output has closed it
        return 1
    except MemoryError as error:
        said = f"out of memory {error}".rstrip()  # Python's own has no message
        return _fail(f"{said}: close other programs, or try a smaller model or batch", 1)
    except (OSError, RuntimeError) as error:
        ours = isinstance(error, OSError) or type(error).__module__.startswith("jaxgpt.")
        text = str(error) if ours else f"{type(error).__name__}: {error} (--traceback shows where)"
        if isinstance(error, OSError) and error.filename and not error.filename2:
            text = f"{error.filename}: {error.strerror}"
        if text.startswith("RuntimeError: Unable to initialize backend"):
            text = _no_device()
        return _fail("\n".join([text, *getattr(error, "__notes__", [])]), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, AssertionError) and not str(error) and "JAX_PLATFORMS" in os.environ:
            return _fail(_no_device(), 1)  # JAX gives no message
        if not _one_of_several():
            raise
        return _fail("".join(traceback.format_exception(error)), 1)


def _no_device() -> str:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugin = "tpu" if "tpu" in platforms else "cuda"
    return (
        f"JAX finds no device of JAX_PLATFORMS={platforms}: unset it to use what is there, or install the plugin: "
        f"pip install 'jaxgpt[{plugin}]'"
    )


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
    """Open closed standard streams (`jaxgpt ... >&-`) to the null device, lest the next file opened become file 1."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w", closefd=False), sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; during an import, exit at once: it would abort JAX's extensions, or be ignored in JAX's
    garbage collection callback."""
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    if frame:
        with suppress(OSError):  # the terminal is gone
            os.write(2, b"jaxgpt: interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    """Print an error, after its traceback if --traceback or JAXGPT_TRACEBACK asks for it, and return `code`."""
    with suppress(OSError):
        if sys.exc_info()[0] and os.environ.get("JAXGPT_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"jaxgpt: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if _one_of_several():
        os._exit(code)  # JAX would wait for the other processes, which wait for this one
    return code
