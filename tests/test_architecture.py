"""The architecture: the core imports no room, rooms import the core, and starting costs little."""

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
"""Folders: optional, one capability each. The other files of the package are the core, which imports none of them."""
SHARED = {"monitor", "display", "cli"}
"""Rooms that every room may import."""
MAY_ALSO_IMPORT = {"scaling_law": {"sweep"}, "report": {"diagnostics"}, "serve": {"diagnostics"}, "plan": {"profile"}}
EXCEPT = {
    ("__main__", "cli"),
    ("cli", "prepare"),  # runs.py prepares the corpus of a config, where the room is there
    ("cli", "huggingface"),  # sample.py reads an exported folder
}
"""Imports inside functions that the rules do not allow, each of which is skipped where its room is missing."""


def part(path):
    """The room of a file, or the module of the core."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{name.name}" for name in node.names if node.module == "jaxgpt"}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


def crossings():
    """(room or module of the core, room that it imports) of all imports that the rules do not allow."""
    for path in FILES:
        own = part(path)
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("jaxgpt.")} & set(ROOMS) - {own}
        if own in ROOMS:
            rooms -= SHARED | MAY_ALSO_IMPORT.get(own, set())
        yield from ((own, room) for room in rooms)


def test_the_core_imports_no_room_and_rooms_import_the_core():
    assert set(crossings()) == EXCEPT


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("flax", {"model", "lecture", "profile", "diagnostics"}),
        ("orbax", {"checkpoint"}),
        ("rich", {"monitor", "display", "cli", *ROOMS}),
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
def test_a_library_is_known_to_one_place(library, places):
    known = {part(path) for path in FILES if any(name.split(".")[0] == library for name in imported(path))}
    assert known <= places


def test_random_keys_are_made_in_one_module():
    """Where no flag of JAX changes their stream."""
    makers = ("jax.random.key(", "PRNGKey(", "wrap_key_data(")
    known = {path.name for path in FILES if any(name in path.read_text("utf-8") for name in makers)}
    assert known == {"prng.py"}


LOADERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code", "imp"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


def of_package(argument):
    """Whether an imported name is written out, or begins with `jaxgpt.`, as that of a public noun does."""
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    return isinstance(first, ast.Constant) and (first is argument or first.value.startswith("jaxgpt."))


def dangers(tree):
    """What could run what a file holds: code, pickles, modules by a name that comes from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in RUNNERS:
            yield node.id
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in LOADERS)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in LOADERS:
                yield node.module
            yield from (name.name for name in node.names if name.asname and name.name == "import_module")
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "import_module" and not (node.args and of_package(node.args[0])):
                yield name
            yield from (each.arg for each in node.keywords if each.arg == "allow_pickle")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_is_run(path):
    assert list(dangers(ast.parse(path.read_text("utf-8")))) == []


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
def test_what_would_run_it_is_seen(code):
    assert list(dangers(ast.parse(code)))


def loaded_after(statement, *modules):
    code = f"import sys; {statement}; print([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.smoke
def test_heavy_imports_wait_for_their_use():
    heavy = ("jax", "flax", "optax", "orbax", "rich", "tyro", "numpy", "jinja2")
    heavy += ("tiktoken", "tokenizers", "pyarrow", "torch", "transformers", "vl_convert", "starlette", "uvicorn")
    assert loaded_after("import jaxgpt", *heavy) == []
    assert loaded_after("from jaxgpt.cli import run_command; run_command(['--help'])", *heavy) == []
    commands = ", ".join(f"jaxgpt.{module}" for module, _ in COMMANDS.values())
    assert "jax" not in loaded_after(f"import {commands}", *heavy), "a command's help waits for no JAX"
    assert loaded_after("import jaxgpt.corpus, jaxgpt.data", *heavy) == ["numpy"]
    assert loaded_after("import jaxgpt.display.text", "jax") == []
    assert "orbax" not in loaded_after("import jaxgpt; jaxgpt.train_steps; jaxgpt.generate", *heavy)


@pytest.mark.smoke
def test_the_public_nouns_exist():
    for name in jaxgpt.__all__:
        assert getattr(jaxgpt, name).__doc__, name
        assert name in dir(jaxgpt)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jaxgpt.nonsense


def test_doctests_of_the_core():
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
