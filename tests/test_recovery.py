"""Resuming after damage: from the newest valid checkpoint, with a warning; never from scratch."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import corpus as corpora
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.cli.runs import resume, start_run
from jaxgpt.config import replaced
from jaxgpt.metrics_log import Evaluated, Notice
from jaxgpt.run import Run, RunError
from jaxgpt.sharding import Sizes, make_mesh
from jaxgpt.start import load_checkpoint
from jaxgpt.train import fit


@pytest.fixture(scope="module")
def config(tiny_config, verse):
    return replaced(tiny_config, corpus=str(verse), vocab_size=20, steps=15, scan_steps=5, eval_every=5)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run, corpus = start_run(config, "one", folder / "runs", folder / "data")
    fit(run, corpus)
    assert Checkpoints(run.checkpoints).steps[-2:] == [10, 15]
    return run, corpus


@pytest.fixture
def done(trained, tmp_path):
    """A finished run of three saves, and its corpus."""
    run, corpus = trained
    return Run(Path(shutil.copytree(run.path, tmp_path / "runs" / "one"))), corpus


def corrupt(run, step):
    """Flip a bit in the array data of a checkpoint; returns the path of the file."""
    data = next((run.checkpoints / str(step) / "state" / "d").iterdir())
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    data.write_bytes(damaged)
    return data


def content(run):
    """All files of a run, by path."""
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.smoke
def test_damaged_newest_checkpoint_is_set_aside_and_trained_again(done):
    run, corpus = done
    before = run.metrics_file.read_bytes()
    params = load_checkpoint(run, "last")[1]
    bad, events = corrupt(run, 15), []
    fit(run, corpus, events.append)
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert str(bad) in notice.text
    assert "another SHA-256" in notice.text
    assert "set aside as" in notice.text
    assert notice.text.endswith("resuming from step 10")
    assert (run.checkpoints / "15.damaged").is_dir()
    assert run.metrics_file.read_bytes() == before
    again = load_checkpoint(run, "last")
    assert again[0] == 15
    np.testing.assert_array_equal(again[1]["wte"]["embedding"], params["wte"]["embedding"])


def test_without_a_valid_checkpoint_nothing_is_written(done):
    run, corpus = done
    bad = [corrupt(run, step) for step in Checkpoints(run.checkpoints).steps]
    before = content(run)
    with pytest.raises(RunError, match=r"has no valid checkpoint, and is not started over") as caught:
        fit(run, corpus)
    assert all(str(path) in str(caught.value) for path in bad)
    assert content(run) == before


def test_refused_resume_sets_nothing_aside(done, change):
    run, corpus = done
    corrupt(run, 15)
    before = content(run)
    with pytest.raises(RunError, match="at step 10 already, beyond the 5 asked for: give at least --steps 10"):
        fit(run, corpus, config=change(run.config, steps=5))
    assert content(run) == before


def test_run_without_its_checkpoints_does_not_start_over(done, tmp_path):
    run, _ = done
    shutil.rmtree(run.checkpoints)
    before = run.metrics_file.read_bytes()
    with pytest.raises(RunError, match=r"step 15 was saved, but .* holds no checkpoint"):
        fit(run, resume(run.config, run, tmp_path / "data"))
    assert run.metrics_file.read_bytes() == before
    with pytest.raises(RunError, match=r"has no checkpoint: restore a copy$"):  # a resume would be refused
        load_checkpoint(run)


def test_imported_run_without_its_checkpoint_does_not_start_over(done, config, tmp_path):
    params = load_checkpoint(done[0])[1]
    run, corpus = start_run(config, "two", tmp_path / "runs", tmp_path / "data", params, "elsewhere")
    assert run.last_event("import")["origin"] == "elsewhere"
    shutil.rmtree(run.checkpoints)
    with pytest.raises(RunError, match=r"step 0 was saved, but .* holds no checkpoint"):
        fit(run, corpus)
    with pytest.raises(RunError, match=r"has no checkpoint: restore a copy$"):
        load_checkpoint(run)


def test_checkpoint_that_is_pruned_while_it_is_read_is_replaced(done, monkeypatch):
    def restore(checkpoints, step, like, real=Checkpoints.restore_params):
        if step == 15:
            shutil.rmtree(run.checkpoints / "15")
        return real(checkpoints, step, like)

    run, _ = done
    monkeypatch.setattr(Checkpoints, "restore_params", restore)
    assert load_checkpoint(run, "last")[0] == 10


def test_file_in_place_of_a_checkpoint_is_a_damaged_checkpoint(done):
    run, corpus = done
    shutil.rmtree(run.checkpoints / "15")
    (run.checkpoints / "15").touch()
    events = []
    fit(run, corpus, events.append)
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert "manifest.json: Not a directory; step 15 was set aside" in notice.text
    assert (run.checkpoints / "15.damaged").is_file()
    assert load_checkpoint(run, "last")[0] == 15


def test_save_event_without_a_step_counts(config, tmp_path):
    run, corpus = start_run(config, "one", tmp_path / "runs", tmp_path / "data")
    run.events_file.write_text('{"event": "save"}\n')
    with pytest.raises(RunError, match=r"step None was saved, but .* holds no checkpoint"):
        fit(run, corpus)


def test_run_killed_before_its_first_save_starts_over(config, tmp_path):
    run, corpus = start_run(config, "one", tmp_path / "runs", tmp_path / "data")
    run.event("start", step=0)
    run.metrics_file.write_text('{"step": 0, "torn')
    assert fit(run, corpus).step == 15


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_metrics_that_differ_from_the_saved_ones_are_refused(done, damage):
    run, corpus = done
    whole = run.metrics_file.read_bytes()
    match damage:
        case "flipped":
            run.metrics_file.write_bytes(whole.replace(b"1", b"2", 1))
        case "short":
            run.metrics_file.write_bytes(whole[:40])
        case "missing":
            run.metrics_file.unlink()
    before = content(run)
    with pytest.raises(RunError, match=r"bytes of .*metrics.jsonl are not those that were saved"):
        fit(run, corpus)
    assert content(run) == before


def test_damaged_last_metrics_resume_from_the_checkpoint_before(done):
    run, corpus = done
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole[: whole.rindex(b'{"step": 15, "val_loss"') - 10])
    events = []
    fit(run, corpus, events.append)
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert "metrics.jsonl are not those that were saved" in notice.text
    assert "resuming from step 10" in notice.text
    assert (run.checkpoints / "15.damaged").is_dir()
    assert run.metrics_file.read_bytes() == whole
    assert Checkpoints(run.checkpoints).latest == 15


def test_edited_config_is_refused(done, change):
    run, corpus = done
    edited = run.with_config(change(run.config, dropout=0.3, steps=20))
    with pytest.raises(RunError, match=r"dropout: 0.1 in the run, 0.3 asked for"):
        fit(edited, corpus)


def test_tokens_and_tokenizer_must_be_those_of_the_checkpoint(done):
    run, corpus = done
    other = corpora.Corpus(corpus.tokens, corpus.tokenizer, {**corpus.meta, "sha256": "0" * 64})
    with pytest.raises(RunError, match=f"tokens of SHA-256 {corpus.meta['sha256']}, found text, 0000"):
        fit(run, other)
    letters = {"kind": "char", "chars": "\n abcdefgh"}
    other = corpora.Corpus(corpus.tokens, corpus.tokenizer, {**corpus.meta, "tokenizer": letters})
    with pytest.raises(RunError, match="or another tokenizer"):
        fit(run, other)


def test_other_version_of_jax_is_reported(done):
    run, corpus = done
    run.event("start", step=15, jax="0.0.1", backend="cpu", device="cpu")
    events = []
    fit(run, corpus, events.append)
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert "was 0.0.1: bits may differ from here" in notice.text


@pytest.mark.parametrize("name", ["backend", "device"])
def test_other_device_is_reported(done, name):
    run, corpus = done
    run.event("start", step=15, **{name: "another"})
    events = []
    fit(run, corpus, events.append)
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert notice.text == f"{name} is cpu and was another: bits may differ from here on"


def test_other_mesh_is_reported(done):
    run, corpus = done
    events = []
    fit(run, corpus, events.append, mesh=make_mesh(Sizes(data=2)))
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert notice.text == "mesh is data=2 and was data=1: bits may differ from here on"


def test_checkpoints_saved_after_damage_to_the_metrics_are_kept(config, change, tmp_path):
    """Checkpoints whose metrics are lost neither block later saves nor count for `keep`."""
    run, corpus = start_run(change(config, steps=30, keep=3), "one", tmp_path / "runs", tmp_path / "data")
    fit(run, corpus)
    whole = run.metrics_file.read_bytes()
    assert Checkpoints(run.checkpoints).steps[-3:] == [20, 25, 30]
    run.metrics_file.write_bytes(whole[: whole.index(b'{"step": 23,')])

    class Stop(Exception):
        pass

    def stop_in_30(event):
        if isinstance(event, Evaluated) and event.step == 30:
            raise Stop

    with pytest.raises(Stop):
        fit(run, corpus, stop_in_30)
    assert Checkpoints(run.checkpoints).steps[-3:] == [20, 25, 30]
    assert [event["event"] for event in run.events()][-2:] == ["save", "broken-off"]
    fit(run, corpus)
    assert run.metrics_file.read_bytes() == whole
    assert Checkpoints(run.checkpoints).latest == 30


def test_checkpoint_of_another_run_is_not_loaded(done, config, change, tmp_path):
    run, _ = done
    (tmp_path / "other.txt").write_text(("some other text of quite other letters\n" * 30)[:840])
    other = start_run(change(config, corpus=str(tmp_path / "other.txt")), "other", tmp_path / "runs", tmp_path / "data")
    fit(*other)
    shutil.rmtree(run.checkpoints)
    shutil.copytree(other[0].checkpoints, run.checkpoints)
    with pytest.raises(RunError, match="tokens of step"):
        load_checkpoint(run, "last")
