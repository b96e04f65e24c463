"""Count the lines of jaxgpt that run in this process and in those that it starts: PYTHONPATH=tests/counted python ...

Before Python 3.12 coverage.py has to trace every line of every library, and tests take half as long again. Here each
statement of jaxgpt notes its own line first. As the process ends, the lines become a data file of coverage.py, for
`coverage combine` and `coverage report`; a process that is killed leaves none.
"""

import atexit
import builtins
import marshal
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from pathlib import Path
from types import CodeType

from notes import noted  # beside this file

ROOT = Path(__file__).resolve().parents[2]
NOTES = Path(__file__).with_name("notes.py").read_bytes()
SEEN: set[tuple[str, int]] = set()
"""(file, line)"""


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """The code of the module with its calls, kept beside Python's own: to make it for all modules takes 0.4 s of
        each process that trains."""
        path = self.get_filename(fullname)
        source = self.get_data(path)
        kept = cache_from_source(path, optimization="noted")
        key = source_hash(MAGIC_NUMBER + NOTES + path.encode() + source)
        with suppress(OSError):
            data = self.get_data(kept)
            if data.startswith(key):
                return marshal.loads(data[len(key) :])
        code = noted(source, path, "__seen__")
        self.set_data(kept, key + marshal.dumps(code))  # whole or not at all, and where it cannot, it does not
        return code


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
