from scripts.benchmarks import machine


def test_facts_name_the_machine():
    found = machine.facts("cpu")
    assert found["cores"] >= 1
    assert {"cpu", "python", "jax", "cpu flags"} <= set(found)
    assert found["jax"][0].isdigit()


def test_a_machine_that_waits_for_a_disk_is_not_busy(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text("cpu  400 100 300 5000 1000 0 200 0 0 0\ncpu0 ...\n")  # idle 5000, waiting 1000
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / "stat")
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    assert machine.machine_seconds() == (10.0, 70.0)
    (tmp_path / "stat").unlink()
    assert machine.others(machine.machine_seconds(), 0.0) is None, "unknown"


def test_the_load_of_other_programs_is_reported(monkeypatch):
    readings = iter([(4.0, 10.0), (108.0, 210.0)])
    monkeypatch.setattr(machine, "machine_seconds", lambda: next(readings))
    assert machine.others((0.0, 0.0), 4.5) == 0.0
    assert machine.others((100.0, 200.0), 6.0) == 0.2
    assert machine.disturbance([0.01, None, 0.02, 0.03]) == "other programs took 2% of the machine (3% at most)"
    assert machine.disturbance([0.01, 0.3, 0.02]).startswith(
        "NOT QUIET: other programs took 2% of the machine (30% at most)"
    )
    assert "unknown" in machine.disturbance([None])
