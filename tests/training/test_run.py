import json
import multiprocessing

import pytest

from jaxgpt.config import Config
from jaxgpt.training.run import Run, RunError

META = {"format": 1, "dtype": "uint16", "count": 3, "sha256": "0", "source": "a", "origin": "b", "source_sha256": "0"}
META |= {"tokenizer": {"kind": "char", "chars": "ab"}}


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "runs", "one", Config(), META)


def test_a_new_run_holds_its_config_and_vocabulary(run):
    assert run.config == Config()
    assert run.tokenizer.chars == "ab"
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["one"], "no temporary folder is left"


def test_an_existing_run_is_never_overwritten(run, tmp_path):
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(RunError, match="--run one --resume continues it"):
        Run.create(tmp_path / "runs", "one", Config(), META)
    with pytest.raises(RunError, match="exists"):
        Run.require_free(tmp_path / "runs", "one")
    assert (run.path / "config.json").read_bytes() == before


def test_a_folder_that_is_no_run_and_a_full_disk_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    with pytest.raises(RunError, match="exists and is no run: remove it"):
        Run.create(tmp_path, "x", Config(), META)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        Run.create(tmp_path, "y", Config(), META)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/x", ".hidden", "a b", "-x", "a\n", "x" * 101, "é"])
def test_names_are_plain(tmp_path, name):
    with pytest.raises(RunError, match="expected letters"):
        Run.create(tmp_path, name, Config(), META)
    assert list(tmp_path.iterdir()) == []


def test_open_by_name_or_path_and_what_there_is_otherwise(run, tmp_path):
    assert Run.open(tmp_path / "runs", "one") == run
    assert Run.open(tmp_path, str(run.path)) == run
    with pytest.raises(RunError, match="there are one"):
        Run.open(tmp_path / "runs", "two")
    with pytest.raises(RunError, match="jaxgpt train gpt-demo makes one"):
        Run.open(tmp_path / "empty", "two")


def test_a_damaged_config_is_named(run):
    for data, said in ((b"{", "the config is not JSON"), (b"\xff{}", "can't decode byte 0xff")):
        (run.path / "config.json").write_bytes(data)
        with pytest.raises(RunError, match=rf"config\.json: .*{said}"):
            _ = Run(run.path).config


def test_events_are_lines_with_a_time(run):
    run.event("start", step=3)
    run.event("end")
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "end"]
    assert lines[0]["step"] == 3
    assert lines[0]["time"].endswith("Z")


def _hold(path, held, release):
    with Run(path).exclusive():
        held.set()
        release.wait(30)


def test_one_process_holds_a_run(run):
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(run.path, held, release))
    holder.start()
    assert held.wait(30)
    with pytest.raises(RunError, match="in use by another process"), run.exclusive():
        pass
    release.set()
    holder.join(30)
    with run.exclusive():
        pass
