import io
import json

import pytest

from jaxgpt.monitor.terminal import RunConsole
from jaxgpt.profile import report

REPORT = {
    "mode": "train",
    "facts": {"device": "cpu", "cores": 2, "cpu flags": ["avx2", "amx_bf16"], "torch": None},
    "notes": ["one", "two"],
    "failed": {"tiny, torch tf32": "exit code 1"},
    "tables": [
        {
            "title": "Ratios",
            "rows": [
                {"jaxgpt": "float32", "/ torch": {"median": 1.5, "low": 1.25, "high": 2.0, "n": 3}, "fits": True},
                {"jaxgpt": "bfloat16", "/ torch": {"median": 12.34, "low": 12.34, "high": 12.34, "n": 1}, "more": 1e6},
            ],
        },
        {"title": "Empty", "rows": []},
    ],
}
MARKDOWN = """\
## train

**Ratios**

| jaxgpt | / torch | fits | more |
| --- | --- | --- | --- |
| float32 | 1.50 (1.25 to 2.00) | yes | - |
| bfloat16 | 12.3 | - | 1,000,000 |

tiny, torch tf32 was not measured: exit code 1

- one
- two

device cpu; cores 2; cpu flags avx2, amx_bf16
"""


def test_the_json_is_enough_for_the_markdown(tmp_path, capsys):
    assert report.markdown(REPORT) == MARKDOWN
    report.save(REPORT, tmp_path / "bench.json")
    report.show(json.loads((tmp_path / "bench.json").read_text()), as_markdown=True)
    assert capsys.readouterr().out.strip() == MARKDOWN.strip()


@pytest.mark.parametrize("width", [30, 80, 300])
def test_numbers_stay_whole_on_any_terminal(width):
    shares = {f"share number {i}": 12345.6 + i for i in range(8)}
    rows = [
        {"part": "attention", "bound by": "memory", **shares},
        {"part": "a block", "bound by": "a long tale of words that may be folded", "the last of all": 1.5},
    ]
    console = RunConsole(file=io.StringIO(), width=width)
    for part in report.renderables(REPORT | {"tables": [{"title": "Parts", "rows": rows}, REPORT["tables"][1]]}, width):
        console.print(part)
    printed = console.file.getvalue()
    (attention,) = (line for line in printed.splitlines() if line.startswith(" attention"))
    assert attention.split() == ["attention", "memory", *(f"12,3{46 + i}" for i in range(8)), "-"]
    for word in ("share", "number", "last", "folded"):
        assert word in printed
    assert "Empty" not in printed
    assert " ".join(printed.split()).endswith("tiny, torch tf32 was not measured: exit code 1 - one - two")


def test_facts_name_the_machine():
    found = report.facts("cpu")
    assert found["cores"] >= 1
    assert {"cpu", "python", "jax", "torch", "cpu flags"} <= set(found)
