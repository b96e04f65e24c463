import json

from jaxgpt import start
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
                {"jaxgpt": "[bold]", "/ torch": {"median": 12.34, "low": 12.34, "high": 12.34, "n": 1}, "more": 1e6},
            ],
        },
        {"title": "Empty", "rows": []},
    ],
}
MARKDOWN = """\
## train

**Ratios**

| jaxgpt  |             / torch | fits |      more |
|---------|---------------------|------|-----------|
| float32 | 1.50 (1.25 to 2.00) |  yes |         - |
| [bold]  |                12.3 |    - | 1,000,000 |

tiny, torch tf32 was not measured: exit code 1

- one
- two

device cpu; cores 2; cpu flags avx2, amx_bf16
"""


def test_markdown_of_a_report_survives_a_json_round_trip(tmp_path):
    assert report.markdown(REPORT) == MARKDOWN
    report.save(REPORT, tmp_path / "bench.json")
    assert report.markdown(json.loads((tmp_path / "bench.json").read_text())) == MARKDOWN


def test_facts_are_those_that_a_run_records_without_its_process(load):
    found, recorded = report.facts(), start.environment()
    assert found.pop("load average before") == 0.5
    assert found == {name: recorded[name] for name in found}
    assert {"device", "cpu", "cores", "python", "jax"} <= set(found)
    assert not {"host", "process", "command"} & set(found)
