"""Count the lines of jaxgpt that run in this process and in those that it starts: PYTHONPATH=tests/counted python ...

Before Python 3.12 coverage.py has to trace every line of every library, and tests take half as long again. Here each
statement of jaxgpt notes its own line first. As the process ends, the lines become a data file of coverage.py, for
`coverage combine` and `coverage report`; a process that is killed leaves none.
"""

import ast
import atexit
import builtins
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
SEEN: set[tuple[str, int]] = set()
"""(file, line)"""


class Noting(ast.NodeTransformer):
    """Before each statement, except for docstrings, a statement that adds its line to SEEN."""

    def __init__(self, path: str) -> None:
        self.path = path

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):  # that of a lambda is an expression
                setattr(node, name, self.noted(node, block))
        return node

    def noted(self, node: ast.AST, block: list[ast.stmt]) -> list[ast.stmt]:
        told = []
        for i, statement in enumerate(block):
            is_text = i == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not is_text and getattr(statement, "module", None) != "__future__":
                lines = {statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", ()))}
                if isinstance(node, ast.ExceptHandler):
                    lines.add(node.lineno)
                told += [self.note(statement, line) for line in sorted(lines)]
            told.append(statement)
        return told

    def note(self, statement: ast.stmt, line: int) -> ast.stmt:
        seen = ast.Expr(ast.Call(ast.Name("__seen__", ast.Load()), [ast.Constant((self.path, line))], []))
        return ast.fix_missing_locations(ast.copy_location(seen, statement))


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return compile(Noting(path).visit(ast.parse(self.get_data(path))), path, "exec", dont_inherit=True)


class Finder:
    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "jaxgpt":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec and isinstance(spec.loader, SourceFileLoader) and Path(spec.loader.path).is_relative_to(ROOT):
            spec.loader = Loader(fullname, spec.loader.path)
        return spec


def hand_in() -> None:
    """Write .coverage.HOST.PID.RANDOM into the root of the repository."""
    if SEEN:
        from coverage import CoverageData

        lines = defaultdict(set)
        for path, line in SEEN:
            lines[path].add(line)
        data = CoverageData(str(ROOT / ".coverage"), suffix=True)
        data.add_lines(lines)
        data.touch_files(map(str, (ROOT / "jaxgpt").rglob("*.py")))  # what nobody imports counts as well
        data.write()


builtins.__seen__ = SEEN.add  # type: ignore[attr-defined]
sys.meta_path.insert(0, Finder)
atexit.register(hand_in)
