"""The lines of jaxgpt that `scripts/test` counts are those that run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from coverage import CoverageData

from tests.counted.notes import noted

ROOT = Path(__file__).parents[1]

SOURCE = '''"""A module."""
from __future__ import annotations
import functools

class A:
    """A class."""
    field: int = 1
    """A field."""

    @staticmethod
    @functools.cache
    def method(n):
        """A function."""
        if n:
            return n
        else:
            n = 2
        for i in range(n):
            continue
        while n < 2:
            n += 1
        else:
            n = 3
        with open("/dev/null"):
            pass
        try:
            raise KeyError(
                n
            )
        except ValueError:
            n = 4
        except KeyError:
            n = 5
        finally:
            n = 6
        match n:
            case 1:
                n = 7
            case 6:
                n = 8
        return (lambda: n)()

def never():
    return 1

assert A.method(0) == 8
'''


def test_the_lines_that_run_are_noted_and_no_others():
    seen = set()
    exec(noted(SOURCE, "text.py", "note"), {"note": seen.add, "__name__": "text"})
    no_statements = {"", "else:", "finally:", "n", ")"}
    lines = [(n, line.strip()) for n, line in enumerate(SOURCE.splitlines(), 1)]
    unseen = [line for n, line in lines if ("text.py", n) not in seen and line not in no_statements]
    assert unseen == [
        '"""A module."""',
        "from __future__ import annotations",
        '"""A class."""',
        '"""A function."""',
        "return n",
        "n += 1",
        "except ValueError:",
        "n = 4",
        "case 1:",
        "n = 7",
        "case 6:",
        "return 1",
    ]


def test_a_process_hands_in_the_lines_of_the_text_as_it_is_now(tmp_path):
    """The first process keeps its code with the calls, the second takes that, and the third must not."""
    counted, package = tmp_path / "tests" / "counted", tmp_path / "jaxgpt"
    shutil.copytree(ROOT / "tests" / "counted", counted, ignore=shutil.ignore_patterns("__pycache__"))
    package.mkdir()
    before, after = "x = 1\nif x:\n    x = 2\nelse:\n    x = 3\n", "x = 0\nif x:\n    x = 2\nelse:\n    x = 3\n"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (counted, tmp_path)))}
    seen = []
    for text in (before, before, after):
        (package / "__init__.py").write_text(text)
        subprocess.run([sys.executable, "-c", "import jaxgpt"], cwd=tmp_path, env=env, check=True)
        assert list((package / "__pycache__").glob("*noted*"))
        (handed_in,) = tmp_path.glob(".coverage.*")
        data = CoverageData(str(handed_in))
        data.read()
        seen.append(sorted(data.lines(str(package / "__init__.py"))))
        data.close()
        handed_in.unlink()
    assert seen == [[1, 2, 3], [1, 2, 3], [1, 2, 5]]
