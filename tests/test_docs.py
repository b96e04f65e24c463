"""The documentation: Python blocks run in order and print what the page shows, and pages match the package."""

import contextlib
import io
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt import cli, recipes
from jaxgpt.monitor.chips import CHIPS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FUNCTIONAL = DOCS / "howto" / "functional.md"


def page_id(path):
    return str(path.relative_to(DOCS))


BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.S | re.M)


@pytest.mark.smoke
@pytest.mark.parametrize("path", [path for path in PAGES if path != FUNCTIONAL], ids=page_id)
def test_python_blocks_print_what_the_page_shows(path):
    page, names = path.read_text("utf-8"), {}
    for block in BLOCK.finditer(page):
        code, expected = block.groups()
        line = page.count("\n", 0, block.start()) + 1
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, path.name, "exec"), names)  # so that tracebacks show the line of the page
        assert expected is None or out.getvalue() == expected, f"{path.name}, line {line}"


@pytest.mark.slow
@pytest.mark.smoke
def test_functional_page_has_eleven_standalone_blocks_with_an_assertion():
    page = FUNCTIONAL.read_text("utf-8")
    first, *blocks = BLOCK.finditer(page)
    common = {}
    exec(compile(first[1], FUNCTIONAL.name, "exec"), common)
    assert len(blocks) == 11
    for block in blocks:
        code, line = block[1], page.count("\n", 0, block.start()) + 1
        assert len(code.splitlines()) <= 15, f"line {line}"
        assert "assert" in code, f"line {line}"
        exec(compile("\n" * line + code, FUNCTIONAL.name, "exec"), dict(common))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_exist(path):
    for target in re.findall(
        r"\]\((?!https?:|#)([^)#]+)", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    ):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_page_has_no_placeholders(path):
    assert not re.search(r"^[A-Z_]{3,}$|TODO", path.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_step_counts_are_those_of_the_named_recipes(path):
    prose = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    for paragraph in re.split(r"\n\s*\n|\n(?=[|-])", prose):
        named = {f"{each.config.train.steps:,}" for name, each in recipes.RECIPES.items() if f"`{name}`" in paragraph}
        stated = set(re.findall(r"([\d,]+) steps", paragraph))
        assert not named or stated <= named, paragraph


def test_some_page_has_a_python_block():
    assert any(BLOCK.findall(page.read_text("utf-8")) for page in PAGES)


def test_test_modules_named_in_reliability_exist():
    page = (DOCS / "explain" / "reliability.md").read_text("utf-8")
    named = set(re.findall(r"`(?:tests/)?(?:\w+/)*(test_\w+\.py)`", page))
    assert len(named) > 8
    assert named <= {path.name for path in (ROOT / "tests").rglob("*.py")}


def test_generated_pages_are_up_to_date(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "reference", tmp_path], check=True, cwd=ROOT)
    for page in tmp_path.iterdir():
        assert (DOCS / "reference" / page.name).read_text("utf-8") == page.read_text("utf-8"), "run scripts/reference"


def test_the_help_of_plan_names_every_chip():
    assert f"Kind of chip for --chips: {', '.join(CHIPS)}." in (DOCS / "reference" / "commands.md").read_text("utf-8")


def test_api_page_lists_exactly_the_public_names():
    page = (DOCS / "reference" / "api.md").read_text("utf-8")
    found = re.findall(r"^::: (jaxgpt\.\S+)$", page, re.MULTILINE)
    assert sorted(found) == sorted(f"jaxgpt.{home}.{name}" for name, home in jaxgpt._MODULES.items())
    assert sorted(jaxgpt.__all__) == sorted(name.rpartition(".")[2] for name in found)


def test_the_errors_page_lists_the_exceptions_of_the_package():
    """Those that a user may see: errors derived from a Python exception, UsageError or CheckpointError."""
    page = (DOCS / "reference" / "errors.md").read_text("utf-8")
    listed = re.findall(r"`(?:jaxgpt\.)?((?:\w+\.)+\w+Error)`", page)
    package, defined = ROOT / "jaxgpt", set[str]()
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        bases = r"^class (\w+Error)\((?:UsageError|RuntimeError|ValueError|CheckpointError)\):"
        defined |= {f"{module}.{name}" for name in re.findall(bases, path.read_text("utf-8"), re.MULTILINE)}
    assert sorted(listed) == sorted(defined)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_a_page_is_short_enough_to_read(path):
    assert len(path.read_text("utf-8").splitlines()) <= 250 or path.parent == DOCS / "reference"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


def test_repository_url_is_the_same_everywhere():
    url = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
    for path in [*PAGES, ROOT / "mkdocs.yml", ROOT / "README.md"]:
        for found in re.findall(r"https://github\.com/[\w-]+/jaxgpt\b", path.read_text("utf-8")):
            assert found == url, path


@cache
def options(command, *name):
    """The options that the help of a command shows; of `train`, with the recipe `name`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as done:
        cli.run_command([command, *name, "--help"])
    assert done.value.code == 0, command
    return set(re.findall(r"--[\w-]+", out.getvalue()))


def command_lines(path):
    """(command, words after it) of each call of jaxgpt in a shell block, also in a pipe or after `!`."""
    for block in re.findall(r"```sh\n(.*?)```", path.read_text("utf-8"), re.S):
        for call in re.split(r"\n| [|] ", block.replace("\\\n", " ")):
            words = call.strip().removeprefix("!").split(" #")[0].split()
            if words[:1] == ["jaxgpt"] and len(words) > 1:
                yield words[1], words[2:]


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_command_lines_use_real_commands_recipes_and_options(path):
    """Names only: the values of options are not parsed."""
    for command, words in command_lines(path):
        if command.startswith("--") or "--help" in words:
            continue
        named = words[:1] if command == "train" and not re.search(r"^--|\.json$", words[0]) else []
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options(command, *named), (command, *words)


def test_every_command_is_shown():
    assert len(list(command_lines(ROOT / "README.md"))) >= 6
    shown = {command for path in [*PAGES, ROOT / "README.md"] for command, _ in command_lines(path)}
    assert shown >= set(cli.COMMANDS)
