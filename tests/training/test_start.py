import pytest

from jaxgpt.config import ConfigError
from jaxgpt.text import corpus as corpora
from jaxgpt.text.corpus import CorpusError
from jaxgpt.training.checkpoint import CheckpointError
from jaxgpt.training.loop import fit
from jaxgpt.training.run import Run, RunError
from jaxgpt.training.start import corpus_of, load_checkpoint, resume, start


@pytest.fixture
def config(tiny, change, verse):
    return change(tiny, corpus=str(verse), vocab_size=0, steps=10, scan_steps=5, eval_every=5)


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "runs", tmp_path / "data"


def test_the_vocabulary_comes_from_the_text(config, change, folders):
    run, corpus = start(config, "one", *folders)
    assert run.config.model.vocab_size == corpus.tokenizer.vocab_size == 11
    padded, _ = start(change(config, vocab_size=64), "two", *folders)
    assert padded.config.model.vocab_size == 64
    with pytest.raises(CorpusError, match="vocab_size is 5, expected at least the 11 ids"):
        start(change(config, vocab_size=5), "three", *folders)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"n_embd": 17}, ConfigError), ({"block_size": 500}, CorpusError), ({"corpus": "no"}, ValueError)],
)
def test_what_cannot_run_leaves_nothing_behind(config, change, folders, changes, kind):
    with pytest.raises(kind):
        start(change(config, **changes), "one", *folders)
    assert not folders[0].exists()
    assert not folders[1].exists()


def test_a_resume_may_change_how_long_but_not_what(config, change, folders):
    run, _ = start(config, "one", *folders)
    longer, _ = resume(change(run.config, steps=20), run, folders[1])
    assert Run.open(folders[0], "one").config.train.steps == 20
    assert longer.config.train.steps == 20
    with pytest.raises(RunError) as caught:
        resume(change(longer.config, n_layer=3, seed=5, steps=30), longer, folders[1])
    assert "n_layer: 2 in the run, 3 asked for" in str(caught.value)
    assert "seed: 1337 in the run, 5 asked for" in str(caught.value)
    assert "steps: " not in str(caught.value)


def test_a_resume_cannot_end_before_it_begins(config, change, folders):
    run, corpus = start(config, "one", *folders)
    fit(run, corpus)
    with pytest.raises(RunError, match="at step 10 already, beyond the 5 asked for"):
        resume(change(run.config, steps=5), run, folders[1])


def test_the_tokens_of_a_run_are_found_or_made_again_or_refused(config, folders, verse):
    run, corpus = start(config, "one", *folders)
    folder = corpora.folder_of(corpus.meta, folders[1])
    assert corpus_of(run, folders[1]).meta == corpus.meta
    for path in folder.iterdir():
        path.unlink()
    assert corpus_of(run, folders[1]).meta == corpus.meta
    for path in folder.iterdir():
        path.unlink()
    verse.write_text(verse.read_text() + "a\n")
    with pytest.raises(CorpusError, match=corpus.meta["sha256"]):
        corpus_of(run, folders[1])


def test_best_and_last_checkpoints(config, folders):
    run, corpus = start(config, "one", *folders)
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_checkpoint(run)
    done = fit(run, corpus)
    assert load_checkpoint(run, "last")[0] == 10
    assert load_checkpoint(run, "best")[0] == done.best.step
    (run.checkpoints / "10" / "state" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="step 10"):
        load_checkpoint(run, "last")
