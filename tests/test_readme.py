"""The README is run, not believed."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from jaxgpt import cli
from jaxgpt.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_two_commands_come_first():
    block = re.search(r"```sh\n(.*?)```", README, re.S).group(1)
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == ["scripts/demo", "scripts/test"]
    for command in commands:
        assert (ROOT / command).stat().st_mode & 0o111


@pytest.mark.smoke
def test_the_library_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 32
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    first, last = re.findall(r"loss ([\d.]+)", out.getvalue())
    assert float(last) < 0.5 < float(first)


def test_every_command_line_in_it_is_understood():
    """Each `jaxgpt VERB ...` in the README parses: its verb, its recipe and the names of its options are real."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    tried = 0
    for line in lines:
        words = line.split("#")[0].split()
        if words[:1] != ["jaxgpt"]:
            continue
        verb, options = words[1], [word for word in words if word.startswith("--")]
        out = io.StringIO()
        head = [words[2]] if verb == "train" and not words[2].startswith("--") else []
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as done:
            cli.run_verb([verb, *head, "--help"])
        assert done.value.code == 0, line
        known = set(re.findall(r"--[\w-]+", out.getvalue()))
        assert set(options) <= known, line
        tried += 1
    assert tried >= 6


def test_every_recipe_has_its_row():
    for name, recipe in RECIPES.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        for said in (recipe.hardware, recipe.time, recipe.loss):
            assert said in row, f"the README's row of {name} does not say {said!r}"


def test_the_architecture_page_names_every_file_of_the_core_and_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for path in (ROOT / "jaxgpt").iterdir():
        if path.suffix == ".py" and not path.stem.startswith("__"):
            assert f"`{path.name}`" in page
        if (path / "__init__.py").exists():
            assert f"`{path.name}/`" in page
    for name in re.findall(r"`(\w+\.py)`", page):
        assert list((ROOT / "jaxgpt").rglob(name)), f"there is no {name}"
