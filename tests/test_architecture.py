"""Allowed imports, lazy imports, public names, and no code that executes data."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt.cli import COMMANDS

PACKAGE = Path(jaxgpt.__file__).parent
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
"""Folders of the package. The files beside them are the core, which imports no room."""
SHARED = {"monitor", "display", "cli"}
"""Rooms that every room may import."""
MAY_ALSO_IMPORT = {"scaling_law": {"sweep"}, "report": {"diagnostics"}, "serve": {"diagnostics"}, "plan": {"profile"}}
EXCEPTIONS = {
    ("__main__", "cli"),
    ("cli", "prepare"),  # runs.py prepares the corpus of a config
    ("cli", "huggingface"),  # sample.py reads an exported folder
}
"""Imports against these rules. Each is inside a function, and is skipped if its room is missing."""


def component(path):
    """The room of a file, or its module of the core."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imported_names(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{name.name}" for name in node.names if node.module == "jaxgpt"}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


def forbidden_imports():
    """(room or core module, imported room) of each import against the rules, exceptions included."""
    for path in FILES:
        own = component(path)
        rooms = {name.split(".")[1] for name in imported_names(path) if name.startswith("jaxgpt.")} & set(ROOMS) - {own}
        if own in ROOMS:
            rooms -= SHARED | MAY_ALSO_IMPORT.get(own, set())
        yield from ((own, room) for room in rooms)


def test_rooms_are_imported_only_where_allowed():
    assert set(forbidden_imports()) == EXCEPTIONS


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("flax", {"model", "lecture", "profile", "diagnostics"}),
        ("orbax", {"checkpoint"}),
        ("rich", set(ROOMS)),
        ("tyro", set(ROOMS)),
        ("vl_convert", {"display"}),
        ("jinja2", {"report"}),
        *((library, {"monitor"}) for library in ("tensorboard", "wandb", "trackio")),
        ("starlette", {"serve"}),
        ("uvicorn", {"serve"}),
        ("torch", set()),
        ("transformers", set()),
        ("tiktoken", {"tokenizer", "prepare"}),
        ("tokenizers", {"prepare"}),
        ("pyarrow", {"prepare"}),
    ],
)
def test_library_is_imported_only_where_allowed(library, allowed):
    importers = {component(path) for path in FILES if library in {name.split(".")[0] for name in imported_names(path)}}
    assert importers <= allowed


def test_only_prng_makes_random_keys():
    """prng.py makes them in such a way that no flag of JAX changes their stream."""
    makers = ("jax.random.key(", "PRNGKey(", "wrap_key_data(")
    found = {path.name for path in FILES if any(name in path.read_text("utf-8") for name in makers)}
    assert found == {"prng.py"}


UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code", "imp"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}


def is_fixed_name(argument):
    """Whether an imported name is a literal, or an f-string that begins with `jaxgpt.`."""
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    return isinstance(first, ast.Constant) and (first is argument or first.value.startswith("jaxgpt."))


def unsafe_names(tree):
    """Names that could execute data: eval and the like, pickle and the like, imports by a computed name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in UNSAFE_BUILTINS:
            yield node.id
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNSAFE_MODULES:
                yield node.module
            yield from (name.name for name in node.names if name.asname and name.name == "import_module")
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "import_module" and not (node.args and is_fixed_name(node.args[0])):
                yield name
            yield from (each.arg for each in node.keywords if each.arg == "allow_pickle")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_executes_data(path):
    assert list(unsafe_names(ast.parse(path.read_text("utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import yaml as y",
        "from dill.settings import x",
        "eval('1')",
        "run = exec",
        "__import__(name)",
        "import_module(name)",
        "importlib.import_module(f'{name}.jaxgpt.')",
        "from importlib import import_module as load",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_detected(code):
    assert list(unsafe_names(ast.parse(code)))


def loaded_after(statement, *modules):
    """Those of `modules` that a new process has imported after `statement`."""
    code = f"import sys; {statement}; print([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.smoke
def test_heavy_libraries_are_imported_lazily():
    heavy = ("jax", "flax", "optax", "orbax", "rich", "tyro", "numpy", "jinja2")
    heavy += ("tiktoken", "tokenizers", "pyarrow", "torch", "transformers", "vl_convert", "starlette", "uvicorn")
    assert loaded_after("import jaxgpt", *heavy) == []
    assert loaded_after("from jaxgpt.cli import run_command; run_command(['--help'])", *heavy) == []
    commands = ", ".join(f"jaxgpt.{module}" for module, _ in COMMANDS.values())
    assert "jax" not in loaded_after(f"import {commands}", *heavy), "the help of a command must not import JAX"
    assert loaded_after("import jaxgpt.corpus, jaxgpt.data", *heavy) == ["numpy"]
    assert loaded_after("import jaxgpt.display.text", "jax") == []
    assert "orbax" not in loaded_after("import jaxgpt; jaxgpt.train_steps; jaxgpt.generate", *heavy)


@pytest.mark.smoke
def test_public_names_exist_and_have_docstrings():
    for name in jaxgpt.__all__:
        assert getattr(jaxgpt, name).__doc__, name
        assert name in dir(jaxgpt)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jaxgpt.nonsense


def test_doctests_pass():
    import doctest
    from importlib import import_module

    tried = 0
    for path in FILES:
        if ">>>" in path.read_text("utf-8"):
            name = ".".join(["jaxgpt", *path.relative_to(PACKAGE).with_suffix("").parts])
            result = doctest.testmod(import_module(name))
            assert result.failed == 0, name
            tried += result.attempted
    assert tried >= 5
