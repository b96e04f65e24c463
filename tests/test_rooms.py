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
import sys
from jaxgpt.cli import run_command

corpus = sys.argv[1]
model = "--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2".split()
steps = "--steps 2 --scan-steps 1 --eval-every 2 --eval-batches 0 --warmup-steps 1".split()
for command in (
    ["--help"],
    ["recipes"],
    ["train", "gpt-demo", "--corpus", corpus, *model, *steps, "--run", "one"],
    ["train", "--run", "one", "--resume", "--steps", "3"],
    ["sample", "one", "--tokens", "3"],
    ["eval", "one"],
):
    if code := run_command(command):
        sys.exit(f"{command} ended with {code}")
"""


@pytest.fixture(scope="module")
def corpus(verse, tmp_path_factory):
    """The folder of a prepared corpus."""
    return prepare_corpus(str(verse), data_dir=tmp_path_factory.mktemp("data")).folder


@pytest.mark.parametrize("room", ROOMS)
def test_the_commands_of_the_core_run_without_a_room(room, corpus, tmp_path):
    copy = tmp_path / "package" / "jaxgpt"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copy / room)
    table = copy / "cli" / "__init__.py"
    entries = re.compile(rf'^    "[\w-]+": \(\s*"{room}\.\w+",[^)]*\),\n', re.M)
    table.write_text(entries.sub("", table.read_text("utf-8")), "utf-8")
    assert f'"{room}.' not in table.read_text("utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}  # a copy has no lines
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, corpus],
        cwd=tmp_path,
        env=kept | {"PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one" in {path.name for path in (tmp_path / "runs").iterdir()}
