"""The list of planted faults matches the package."""

from pathlib import Path

from tests.faults.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


def test_the_text_that_each_fault_replaces_occurs_once():
    moved = [m.name for m in MUTATIONS if (ROOT / "jaxgpt" / m.file).read_text("utf-8").count(m.old) != 1]
    assert not moved
    assert all((ROOT / "tests" / name).exists() for m in MUTATIONS for name in m.tests.split())
