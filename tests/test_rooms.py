"""Every room can be deleted: the core and its commands work without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt.prepare.build import prepare_corpus

PACKAGE = Path(jaxgpt.__file__).parent
ROOMS = sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli", "monitor", "display"})

COMMANDS = """
import gc, os, sys
import flax.linen, jax, optax, orbax.checkpoint, rich.progress, tyro  # imported once, before the forks

gc.freeze()

def run(recipe):
    import jaxgpt
    from jaxgpt.cli import run_command

    assert jaxgpt.__file__.startswith(os.getcwd())
    steps = "--steps 2 --scan-steps 1 --eval-every 2 --eval-batches 0 --warmup-steps 1".split()
    for command in (
        ["--help"],
        ["recipes"],
        ["train", *recipe, "--corpus", sys.argv[1], "--block-size", "8", "--batch-size", "2", *steps, "--run", "one"],
        ["train", "--run", "one", "--resume", "--steps", "3"],
        ["sample", "one", "--tokens", "3"],
        ["eval", "one"],
    ):
        if code := run_command(command):
            raise SystemExit(f"{command} ended with {code}")

for room in sys.argv[2:]:
    print("without", room, file=sys.stderr, flush=True)
    if not (child := os.fork()):
        code = 1
        try:
            os.chdir(room)
            sys.path.insert(0, os.getcwd())
            run("gpt-demo --n-layer 1 --n-head 1 --n-embd 8".split() if room == "any" else ["bigram"])
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def copy_without(rooms, folder):
    """A copy of the package in `folder`, without some of its rooms and their lines in the table of commands."""
    copy = folder / "jaxgpt"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.pyc.*"))  # another process may be writing some
    table = copy / "cli" / "__init__.py"
    text = table.read_text("utf-8")
    for room in rooms:
        shutil.rmtree(copy / room)
        text = re.sub(rf'^    "[\w-]+": \(\s*"{room}\.\w+",[^)]*\),\n', "", text, flags=re.M)
        assert f'"{room}.' not in text
    table.write_text(text, "utf-8")


@pytest.mark.slow
def test_commands_of_the_core_run_without_each_room_and_without_all(verse, tmp_path):
    corpus = prepare_corpus(str(verse), data_dir=tmp_path / "data").folder
    for room in ROOMS:
        copy_without([room], tmp_path / room)
    copy_without(ROOMS, tmp_path / "any")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")
    }  # coverage does not measure copies
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, corpus, *ROOMS, "any"],
        cwd=tmp_path,
        env={name: value for name, value in kept.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (*ROOMS, "any"):
        assert (tmp_path / name / "runs" / "one").is_dir()
