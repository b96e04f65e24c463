"""The lines of jaxgpt that `scripts/test` counts are those that run."""

from tests.counted.notes import noted

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
