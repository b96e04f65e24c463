"""The notebooks run from their first cell to their last, at small settings."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert", reason="charts need the extra report")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXGPT_NOTEBOOK", "small")
    names = {"__name__": "__main__"}
    source = path.read_text("utf-8")
    for cell in re.finditer(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.S | re.M):
        if cell[1]:
            continue
        tree = ast.parse("\n" * source.count("\n", 0, cell.start(2)) + cell[2])
        last_expression = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(path), "exec"), names)
        if last_expression:
            value = eval(compile(ast.Expression(last_expression.value), str(path), "eval"), names)
            if draw := getattr(value, "_repr_mimebundle_", None) or getattr(value, "_repr_html_", None):
                assert draw()
    assert "nats" in capsys.readouterr().out or path.stem == "run_as_value"


def test_notebooks_match_their_python_files(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "notebooks", tmp_path], check=True)
    assert {path.stem for path in tmp_path.iterdir()} == {path.stem for path in NOTEBOOKS}
    for made in tmp_path.iterdir():
        assert json.loads(made.read_text("utf-8"))["nbformat"] == 4
        assert (ROOT / "notebooks" / made.name).read_text("utf-8") == made.read_text("utf-8"), "run scripts/notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_and_install_command_name_the_repository(path):
    url = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
    source = path.read_text("utf-8")
    name = url.removeprefix("https://github.com/")
    assert f"(https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.stem}.ipynb)" in source
    assert f"@ git+{url}" in source
    assert {*re.findall(r"github(?:\.com)?/([\w-]+/jaxgpt)\b", source)} == {name}
