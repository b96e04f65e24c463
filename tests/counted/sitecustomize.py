"""Count the lines of jaxgpt that run in this process and in those that it starts: PYTHONPATH=tests/counted python ...

Before Python 3.12 coverage.py has to trace every line of every library, and tests take half as long again. Here each
statement of jaxgpt notes its own line first. As the process ends, the lines become a data file of coverage.py, for
`coverage combine` and `coverage report`; a process that is killed leaves none.
"""

import atexit
import builtins
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType

from notes import noted  # beside this file

ROOT = Path(__file__).resolve().parents[2]
SEEN: set[tuple[str, int]] = set()
"""(file, line)"""


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return noted(self.get_data(path), path, "__seen__")


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
    """Write .coverage.HOST.PID.RANDOM into the root of the repository, under another name until it is whole."""
    if SEEN:
        from coverage import CoverageData

        lines = defaultdict(set)
        for path, line in SEEN:
            lines[path].add(line)
        data = CoverageData(str(ROOT / ".coverage-part"), suffix=True)
        data.add_lines(lines)
        data.touch_files(map(str, (ROOT / "jaxgpt").rglob("*.py")))  # what nobody imports counts as well
        data.write()
        data.close()
        os.rename(data.data_filename(), data.data_filename().replace("-part", ""))


builtins.__seen__ = SEEN.add  # type: ignore[attr-defined]
sys.meta_path.insert(0, Finder)
atexit.register(hand_in)
