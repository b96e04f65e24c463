"""Python that notes which of its lines run."""

import ast
from types import CodeType


def noted(source: str | bytes, path: str, name: str) -> CodeType:
    """The code of a module, with a call `name((path, line))` before each statement but docstrings and __future__."""
    return compile(_Noting(path, name).visit(ast.parse(source)), path, "exec", dont_inherit=True)


class _Noting(ast.NodeTransformer):
    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):  # that of a lambda is an expression
                setattr(node, field, self.with_calls(node, block))
        return node

    def with_calls(self, node: ast.AST, block: list[ast.stmt]) -> list[ast.stmt]:
        told = []
        for i, statement in enumerate(block):
            is_docstring = i == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not is_docstring and getattr(statement, "module", None) != "__future__":
                lines = {statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", ()))}
                if isinstance(node, ast.ExceptHandler):
                    lines.add(node.lineno)
                told += [self.call(statement, line) for line in sorted(lines)]
            told.append(statement)
        return told

    def call(self, statement: ast.stmt, line: int) -> ast.stmt:
        seen = ast.Expr(ast.Call(ast.Name(self.name, ast.Load()), [ast.Constant((self.path, line))], []))
        return ast.fix_missing_locations(ast.copy_location(seen, statement))
