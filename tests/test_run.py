import json
import multiprocessing
import os
import platform
import sys
from pathlib import Path

import pytest

from jaxgpt import files, processes
from jaxgpt.config import Config
from jaxgpt.corpus import CorpusError
from jaxgpt.monitor import facts
from jaxgpt.run import Run, RunError

META = {"format": 2, "dtype": "uint16", "count": 3, "sha256": "0", "source": "a", "origin": "b", "source_sha256": "0"}
META |= {
    "tokenizer": {"kind": "char", "chars": "ab"},
    "shards": [{"file": "tokens-00000.bin", "count": 3, "sha256": "0"}],
}


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "runs", "one", Config(), META)


def test_new_run_holds_its_config_and_tokenizer(run):
    assert run.config == Config()
    assert run.tokenizer.chars == "ab"
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["one"], "no temporary folder remains"


def test_existing_run_is_never_overwritten(run, tmp_path):
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(RunError, match="--run one --resume continues it"):
        Run.create(tmp_path / "runs", "one", Config(), META)
    with pytest.raises(RunError, match="exists"):
        Run.require_free(tmp_path / "runs", "one")
    assert (run.path / "config.json").read_bytes() == before


def test_create_reports_an_existing_folder_and_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    with pytest.raises(RunError, match="exists but is not a run directory: rename it"):
        Run.create(tmp_path, "x", Config(), META)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="y cannot be created: No space left on device"):
        Run.create(tmp_path, "y", Config(), META)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/x", ".hidden", "a b", "-x", "a\n", "x" * 101, "é"])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(RunError, match="expected letters"):
        Run.create(tmp_path, name, Config(), META)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow these paths")
@pytest.mark.parametrize("folder", [b"a[b]", b"a\\b", b"\xff"])
def test_paths_whose_checkpoints_could_not_be_read_are_refused(run, tmp_path, folder):
    folder = tmp_path / os.fsdecode(folder)
    with pytest.raises(RunError, match="could not be read; use another folder"):
        Run.require_free(folder, "one")
    folder.mkdir()
    moved = Run(run.path.rename(folder / "one"))
    with pytest.raises(RunError, match="could not be read; use another folder"), moved.lock():
        pass


def test_open_by_name_or_path_and_its_errors(run, tmp_path):
    assert Run.open(tmp_path / "runs", "one") == run
    assert Run.open(tmp_path, str(run.path)) == run
    (tmp_path / "runs" / ".two.1234.part").mkdir()  # a killed process leaves such a folder
    (tmp_path / "runs" / ".two.1234.part" / "config.json").touch()
    with pytest.raises(RunError, match=r"; there are one$"):
        Run.open(tmp_path / "runs", "two")
    with pytest.raises(RunError, match="jaxgpt train gpt-demo makes one"):
        Run.open(tmp_path / "empty", "two")
    with pytest.raises(RunError, match=r"no run in .*runs/two: no such folder"):
        Run.open(tmp_path / "runs", str(tmp_path / "runs" / "two"))
    with pytest.raises(RunError, match="no run in ~nosuch/two: no such folder"):
        Run.open(tmp_path / "runs", "~nosuch/two")
    with pytest.raises(RunError, match="no run in two: no such folder"):
        Run.open(tmp_path / "runs", "./two")
    with pytest.raises(RunError, match=r"no run in .*runs: it has no config\.json"):
        Run.open(tmp_path / "runs", str(tmp_path / "runs"))
    (run.path / "model.safetensors").touch()
    with pytest.raises(RunError, match=r"is an export, not a run directory: jaxgpt sample .* samples from it"):
        Run.open(tmp_path, str(run.path))


def test_damaged_config_is_reported(run):
    whole = (run.path / "config.json").read_bytes()
    edited = whole.replace(b'"n_layer": 4', b'"n_layer": 5')
    assert edited != whole
    for data, message in ((b"{", "it has no seal"), (b"\xff{}", "it has no seal"), (edited, "does not match its seal")):
        (run.path / "config.json").write_bytes(data)
        with pytest.raises(RunError, match=rf"config\.json: .*{message}"):
            _ = Run(run.path).config


def test_damaged_tokenizer_error_does_not_advise_prepare(run):
    (run.path / "tokens.json").write_bytes(b"{")
    with pytest.raises(CorpusError, match=r"it has no seal.*; restore a copy; the folder of its corpus has one$"):
        _ = Run(run.path).tokenizer


def test_events_are_json_lines_with_a_time(run):
    run.event("start", step=3)
    run.event("end")
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "end"]
    assert lines[0]["step"] == 3
    assert lines[0]["time"].endswith("Z")


def test_only_process_0_records_events(run, monkeypatch):
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    run.event("start", step=3)
    assert run.events() == []


def test_incomplete_event_line_is_ignored(run):
    run.event("start", step=3)
    with run.events_file.open("ab") as file:
        file.write(b'{"time": "2026')
    run.event("end")
    assert [event["event"] for event in run.events()] == ["start", "end"]


def test_damaged_metrics_line_is_reported(run):
    run.metrics_file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert run.metrics() == [{"step": 1, "loss": 2.0}], "an incomplete last line is still being written"
    for line in ('{"step": 1, "loss', "2", '{"loss": 2.0}', ""):
        run.metrics_file.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: it is damaged; .*jaxgpt train --run one --resume"):
            run.metrics()


def test_validation_losses_are_read_past_damaged_lines(run):
    assert run.val_losses() == {}
    run.metrics_file.write_text('{"step": 0, "val_loss": 3.0}\n{"step": 5, "val_lo\n{"step": 5, "val_loss": null}\n')
    assert run.val_losses() == {0: 3.0}


def test_resume_command_is_quoted_for_a_shell(tmp_path):
    assert Run(Path("runs/one")).resume_command == "jaxgpt train --run one --resume"
    folder = tmp_path / "my runs"
    assert Run(folder / "one").resume_command == f"jaxgpt train --run one --resume --runs-dir '{folder}'"


def test_symlink_out_of_the_runs_folder_is_refused(run, tmp_path):
    elsewhere = Run.create(tmp_path / "elsewhere", "two", Config(), META)
    (tmp_path / "runs" / "two").symlink_to(elsewhere.path)
    (tmp_path / "runs" / "dangling").symlink_to(tmp_path / "nowhere")
    for find in (Run.open, Run.named):
        with pytest.raises(RunError, match=r"is a link to .*elsewhere/two: name that folder itself"):
            find(tmp_path / "runs", "two")
    for name in ("two", "dangling"):
        with pytest.raises(RunError, match="exists"):
            Run.create(tmp_path / "runs", name, Config(), META)
    assert Run.open(tmp_path / "runs", str(elsewhere.path)) == elsewhere


def test_paths_are_not_names(run, tmp_path):
    for name in ("../runs/one", str(run.path), ".."):
        with pytest.raises(RunError, match=r"expected letters.*: --run NAME --runs-dir FOLDER$"):
            Run.named(tmp_path / "runs", name)


def test_run_of_a_killed_process_is_cut_off(run):
    assert not run.cut_off
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(run.path, held, release))
    holder.start()
    assert held.wait(30)
    assert not run.cut_off
    holder.kill()
    holder.join(30)
    assert run.cut_off
    assert not facts.gather(run).running
    with pytest.raises(RunError, match="refused"), run.lock():
        raise RunError("refused")
    assert run.cut_off, "the refused resume changed nothing"
    with run.lock():
        run.event("start", step=0, process=os.getpid(), host=platform.node())
        assert not run.cut_off
    run.event("start", step=0, process=holder.pid, host="another")
    assert not run.cut_off, "processes of another host cannot be checked"
    run.event("start", step=0, process=holder.pid, host=platform.node())
    assert run.cut_off
    run.event("broken-off", step=5)
    assert not run.cut_off


def _hold(path, held, release):
    run = Run(path)
    with run.lock():
        run.event("start", step=0, process=os.getpid(), host=platform.node())
        held.set()
        release.wait(30)


def test_only_one_process_holds_a_run(run):
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(run.path, held, release))
    holder.start()
    assert held.wait(30)
    with pytest.raises(RunError, match=rf"in use by process {holder.pid} on .* since 20"), run.lock():
        pass
    release.set()
    holder.join(30)
    with run.lock():
        pass


def test_a_run_that_cannot_be_written_to_says_how_to_resume_it(run):
    (run.path / ".lock").mkdir()  # blocks the lock even for root, who may write anywhere
    with pytest.raises(RunError, match=r"written to: .*; a copy of it can be resumed: --runs-dir"), run.lock():
        pass


def test_new_run_is_synced_with_its_folder(tmp_path, monkeypatch):
    synced, sync = [], files.sync
    monkeypatch.setattr("jaxgpt.files.sync", lambda path: synced.append(path) or sync(path))
    Run.create(tmp_path, "one", Config(), META)
    assert synced[-1] == tmp_path


def test_name_that_another_process_takes_meanwhile_is_reported(tmp_path):
    with pytest.raises(RunError, match="--run one --resume continues it"):
        Run.create(tmp_path, "one", Config(), META, lambda _: Run.create(tmp_path, "one", Config(), META))


def test_command_names_the_runs_folder_unless_it_is_runs(run, tmp_path):
    assert run.resume_command == f"jaxgpt train --run one --resume --runs-dir {tmp_path}/runs"
    assert Run(Path("runs/one")).resume_command == "jaxgpt train --run one --resume"


def test_process_of_another_user_is_alive(run, monkeypatch):
    def refuse(*_):
        raise PermissionError

    run.event("start", process="1", host=platform.node())
    assert not run.cut_off
    monkeypatch.setattr("os.kill", refuse)
    run.event("start", process=1, host=platform.node())
    assert not run.cut_off


def test_name_is_that_of_the_runs_folder_before_a_folder_here(run, tmp_path, monkeypatch):
    Run.create(tmp_path / "here", "one", Config(), META)
    monkeypatch.chdir(tmp_path / "here")
    assert Run.open(tmp_path / "runs", "one") == run
    monkeypatch.chdir("one")
    assert Run.open(tmp_path / "runs", "./").path.name == "one"
    monkeypatch.chdir("checkpoints")
    assert Run.open(tmp_path / "runs", "..").path.name == "one"


def test_a_dead_process_is_not_named_as_the_one_that_uses_a_run(run, monkeypatch):
    def gone(*_):
        raise ProcessLookupError

    with run.lock():
        run.event("start", process=os.getpid(), host=platform.node())
        with pytest.raises(RunError, match=f"in use by process {os.getpid()} on"), Run(run.path).lock():
            pass
        monkeypatch.setattr("os.kill", gone)
        with pytest.raises(RunError, match=r"in use by another process$"), Run(run.path).lock():
            pass


def test_a_config_that_cannot_be_written_is_reported(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"config\.json cannot be written: No space left on device; make room$"):
        run.with_config(Config())
