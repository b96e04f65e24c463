from scripts.benchmarks import load


def test_a_machine_that_waits_for_a_disk_is_not_busy(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text("cpu  400 100 300 5000 1000 0 200 0 0 0\ncpu0 ...\n")  # idle 5000, waiting 1000
    monkeypatch.setattr(load, "Path", lambda name: tmp_path / "stat")
    monkeypatch.setattr(load.os, "sysconf", lambda name: 100)
    assert load.machine_seconds() == (10.0, 70.0)


def test_the_load_of_other_programs_is_reported():
    assert load.others((0.0, 0.0), (4.0, 10.0), 4.5) == 0.0
    assert load.others((100.0, 200.0), (108.0, 210.0), 6.0) == 0.2
    assert load.disturbance([0.01, 0.02, 0.03]) == "other programs took 2% of the machine (3% at most)"
    assert load.disturbance([0.01, 0.3, 0.02]).startswith(
        "NOT QUIET: other programs took 2% of the machine (30% at most)"
    )
    assert "unknown" in load.disturbance([])
