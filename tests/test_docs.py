"""The pages are run, not believed: every Python block in order, and what it prints where the page shows it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from jaxgpt import recipes

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
RECIPES = Path(__file__).parents[1] / "docs" / "functional.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.S | re.M)


@pytest.mark.smoke
@pytest.mark.parametrize("path", [path for path in PAGES if path != RECIPES], ids=lambda path: path.name)
def test_a_page_does_what_it_says(path):
    page, names = path.read_text("utf-8"), {}
    for block in BLOCK.finditer(page):
        code, expected = block.groups()
        line = page.count("\n", 0, block.start()) + 1
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, path.name, "exec"), names)  # a traceback then shows the page's own line
        assert expected is None or out.getvalue() == expected, f"{path.name}, line {line}"


@pytest.mark.smoke
def test_ten_recipes_each_of_which_stands_alone_and_keeps_a_law():
    page = RECIPES.read_text("utf-8")
    first, *recipes = BLOCK.finditer(page)
    common = {}
    exec(compile(first[1], RECIPES.name, "exec"), common)
    assert len(recipes) == 10
    for block in recipes:
        code, line = block[1], page.count("\n", 0, block.start()) + 1
        assert len(code.splitlines()) <= 15, f"line {line}"
        assert "assert" in code, f"line {line}"
        exec(compile("\n" * line + code, RECIPES.name, "exec"), dict(common))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_exists(path):
    for target in re.findall(
        r"\]\((?!https?:|#)([^)#]+)", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    ):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_nothing_on_a_page_is_still_to_be_filled_in(path):
    assert not re.search(r"^[A-Z_]{3,}$|TODO", path.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_steps_of_a_recipe_are_those_that_it_has(path):
    prose = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    for paragraph in re.split(r"\n\s*\n|\n(?=[|-])", prose):
        named = {f"{each.config.train.steps:,}" for name, each in recipes.RECIPES.items() if f"`{name}`" in paragraph}
        said = set(re.findall(r"([\d,]+) steps", paragraph))
        assert not named or said <= named, paragraph


def test_there_is_a_page_to_try():
    assert any(BLOCK.findall(page.read_text("utf-8")) for page in PAGES)


def test_the_tests_that_are_said_to_hold_a_promise_exist():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "reliability.md").read_text("utf-8")
    named = set(re.findall(r"`(?:tests/)?(?:\w+/)*(test_\w+\.py)`", page))
    assert len(named) > 8
    assert named <= {path.name for path in (root / "tests").rglob("*.py")}
