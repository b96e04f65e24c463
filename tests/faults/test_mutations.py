"""The list of planted faults is up to date."""

from pathlib import Path

from tests.faults.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


def test_each_fault_stands_once_where_it_is_planted():
    moved = [m.name for m in MUTATIONS if (ROOT / "jaxgpt" / m.file).read_text("utf-8").count(m.old) != 1]
    assert not moved
    assert all((ROOT / "tests" / name).exists() for m in MUTATIONS for name in m.tests.split())
