"""Every room can be deleted: the core and its commands work without it.

test_architecture.py lists the rooms that the core uses where they are there. Without any other room the core works with
them, and it works without any: so it works without each."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxgpt
from jaxgpt.prepare.build import prepare_corpus
from tests.test_architecture import EXCEPT

PACKAGE = Path(jaxgpt.__file__).parent
ROOMS = sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli", "monitor", "display"})
MISSING = {"any": ROOMS, "others": sorted({*ROOMS} - {room for _, room in EXCEPT})}
"""Rooms that are deleted together."""

COMMANDS = """
import os, sys
import flax.linen, jax, optax, orbax.checkpoint  # once, for all that is forked from here

def run(recipe, corpus):
    import jaxgpt
    from jaxgpt.cli import run_command

    assert jaxgpt.__file__.startswith(os.getcwd())
    steps = "--steps 2 --scan-steps 1 --eval-every 2 --eval-batches 0 --warmup-steps 1".split()
    for command in (
        ["--help"],
        ["recipes"],
        ["train", *recipe, "--corpus", corpus, "--block-size", "8", "--batch-size", "2", *steps, "--run", "one"],
        ["train", "--run", "one", "--resume", "--steps", "3"],
        ["sample", "one", "--tokens", "3"],
        ["eval", "one"],
    ):
        if code := run_command(command):
            raise SystemExit(f"{command} ended with {code}")

for rooms in ("any", "others"):
    print("without", rooms, file=sys.stderr, flush=True)
    if not (child := os.fork()):
        code = 1
        try:
            os.chdir(rooms)
            sys.path.insert(0, os.getcwd())
            if rooms == "any":  # only a prepared corpus can be read
                run("gpt-demo --n-layer 1 --n-head 1 --n-embd 8".split(), sys.argv[1])
            else:
                run(["bigram"], sys.argv[2])
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
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "cli" / "__init__.py"
    text = table.read_text("utf-8")
    for room in rooms:
        shutil.rmtree(copy / room)
        text = re.sub(rf'^    "[\w-]+": \(\s*"{room}\.\w+",[^)]*\),\n', "", text, flags=re.M)
        assert f'"{room}.' not in text
    table.write_text(text, "utf-8")


def test_the_commands_of_the_core_run_without_any_room_and_with_those_alone_that_they_use(verse, tmp_path):
    corpus = prepare_corpus(str(verse), data_dir=tmp_path / "data").folder
    assert 0 < len(MISSING["others"]) < len(ROOMS)
    for name, rooms in MISSING.items():
        copy_without(rooms, tmp_path / name)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}  # a copy has no lines
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, corpus, verse],
        cwd=tmp_path,
        env={name: value for name, value in kept.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in MISSING:
        assert (tmp_path / name / "runs" / "one").is_dir()
