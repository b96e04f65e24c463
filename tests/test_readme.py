"""The commands and the code of the README run; its links and results are correct."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from jaxgpt.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_two_commands_come_first():
    block = re.search(r"```sh\n(.*?)```", README, re.S).group(1)
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == ["scripts/demo", "scripts/test"]
    for command in commands:
        assert (ROOT / command).stat().st_mode & 0o111


@pytest.mark.smoke
def test_library_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 32
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    first, last = re.findall(r"loss ([\d.]+)", out.getvalue())
    assert float(last) < 0.5 < float(first)


def test_readme_is_short():
    assert len(README.encode()) <= 7000


def test_table_of_recipes_has_exactly_the_measured_results():
    measured = {name: recipe for name, recipe in RECIPES.items() if "not measured" not in recipe.loss}
    assert re.findall(r"^\| `([\w.-]+)` \|", README, re.MULTILINE) == list(measured)
    for name, recipe in measured.items():
        assert f"| `{name}` | {recipe.time} | {recipe.loss} |" in README.splitlines()
        assert recipe.hardware == "2 CPU cores", "the README states this above the table"


def test_relative_links_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_architecture_page_names_every_file_of_the_core_and_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for path in (ROOT / "jaxgpt").iterdir():
        if path.suffix == ".py" and not path.stem.startswith("__"):
            assert f"`{path.name}`" in page
        if (path / "__init__.py").exists():
            assert f"`{path.name}/`" in page
    for name in re.findall(r"`(\w+\.py)`", page):
        assert list((ROOT / "jaxgpt").rglob(name)), f"there is no {name}"
