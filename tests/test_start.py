import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxgpt import files, processes
from jaxgpt.checkpoint import CheckpointError
from jaxgpt.cli import evaluate, memory, run_command
from jaxgpt.cli.corpora import folder_of, folders_of
from jaxgpt.cli.memory import OutOfMemoryError
from jaxgpt.cli.runs import complete, corpus_of, resume, start
from jaxgpt.config import ConfigError, DataConfig
from jaxgpt.corpus import CorpusError
from jaxgpt.prepare import encode
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.run import Run, RunError
from jaxgpt.start import load_checkpoint
from jaxgpt.train import fit


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
    [
        ({"n_embd": 17}, ConfigError),
        ({"block_size": 500}, CorpusError),
        ({"corpus": "no"}, ValueError),
        ({"vocab_size": 5}, CorpusError),
    ],
)
def test_what_cannot_run_leaves_nothing_behind(config, change, folders, changes, kind):
    with pytest.raises(kind):
        start(change(config, **changes), "one", *folders)
    assert not folders[0].exists()
    assert not folders[1].exists()


def test_what_cannot_run_with_the_vocabulary_of_its_text_leaves_no_run_behind(config, change, folders, tmp_path):
    (tmp_path / "many.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 4097))) * 2)
    config = change(config, corpus=str(tmp_path / "many.txt"), bigram_embed=True)
    for _ in range(2):  # the second time the text is prepared, and nothing else is there
        with pytest.raises(ConfigError, match=r"vocab_size is 4097, expected at most 4096, or --no-bigram-embed"):
            start(config, "one", *folders)
    assert not folders[0].exists()
    with pytest.raises(ConfigError, match="--no-bigram-embed"):
        complete(config, folders[1])
    run, _ = start(change(config, bigram_embed=False), "one", *folders)
    assert run.config.model.vocab_size == 4097


def test_a_resume_may_change_how_long_but_not_what(config, change, folders):
    run, _ = start(config, "one", *folders)
    longer = change(run.config, steps=20)
    corpus = resume(longer, run, folders[1])
    assert Run.open(folders[0], "one").config.train.steps == 10, "nothing is written before the run is held"
    assert fit(run, corpus, config=longer).step == 20
    assert Run.open(folders[0], "one").config == longer
    with pytest.raises(RunError) as caught:
        resume(change(longer, n_layer=3, seed=5, accumulate=2, steps=30), run, folders[1])
    assert "n_layer: 1 in the run, 3 asked for" in str(caught.value)
    assert "seed: 1337 in the run, 5 asked for" in str(caught.value)
    assert "accumulate: 1 in the run, 2 asked for" in str(caught.value)
    assert "steps: " not in str(caught.value)


def test_a_saved_run_whose_rate_rises_is_resumed_and_a_new_one_is_refused(config, change, folders):
    """Earlier versions had a minimum of 1e-4 whatever the peak, and made such runs."""
    rising = change(config, learning_rate=1e-5, min_learning_rate=1e-4)
    with pytest.raises(ConfigError, match="try --min-learning-rate None"):
        start(rising, "one", *folders)
    run, _ = start(change(config, learning_rate=1e-5), "one", *folders)
    run = run.with_config(change(run.config, min_learning_rate=1e-4))
    assert fit(run, resume(run.config, run, folders[1])).step == 10
    assert max(line["learning_rate"] for line in run.metrics() if "learning_rate" in line) > 2e-5


def test_the_limit_of_the_validation_split_holds_in_training_and_in_eval(config, change, folders, capsys):
    config = change(config, val_tokens=30, eval_batches=0)
    run, corpus = start(config, "one", *folders)
    fit(run, corpus)
    assert {line["val_n_tokens"] for line in run.metrics() if "val_n_tokens" in line} == {29}
    evaluate.run(["one", "--runs-dir", str(folders[0]), "--data-dir", str(folders[1]), "--eval-batches", "0"])
    assert "29 tokens predicted" in capsys.readouterr().out
    with pytest.raises(RunError, match="val_tokens: 30 in the run, 40 asked for"):
        resume(change(run.config, val_tokens=40), run, folders[1])


def test_a_resume_cannot_end_before_it_begins(config, change, folders):
    run, corpus = start(config, "one", *folders)
    fit(run, corpus)
    with pytest.raises(RunError, match="at step 10 already, beyond the 5 asked for"):
        fit(run, corpus, config=change(run.config, steps=5))
    assert Run(run.path).config == run.config


def test_the_tokens_of_a_run_are_found_or_made_again_or_refused(config, change, folders, verse, tmp_path):
    mine = tmp_path / "text.txt"
    mine.write_text(verse.read_text())
    run, corpus = start(change(config, corpus=str(mine)), "one", *folders)
    folder = folder_of(corpus.meta, folders[1])
    assert corpus_of(run, folders[1]).meta == corpus.meta
    for path in folder.iterdir():
        path.unlink()
    assert corpus_of(run, folders[1]).meta == corpus.meta
    for path in folder.iterdir():
        path.unlink()
    for more in ("a\n", "z\n"):  # also with an unknown character
        mine.write_text(verse.read_text() + more)
        with pytest.raises(CorpusError, match=f"{corpus.meta['sha256']}.*text.txt' now gives other tokens; put its"):
            corpus_of(run, folders[1])


def test_the_tokens_are_made_again_with_the_tokenizer_of_the_run(config, change, folders, verse, tmp_path):
    """Its file may be gone, or its relative path be of another folder."""
    given = prepare_corpus(str(verse), data_dir=tmp_path / "given").folder
    run, corpus = start(change(config, tokenizer=str(given / "tokens.json")), "one", *folders)
    shutil.rmtree(given)
    shutil.rmtree(folders[1])
    assert corpus_of(run, folders[1]).meta == corpus.meta


def test_a_pipe_is_not_read_again(config, change, folders, verse, tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as writer:
        writer.submit(pipe.write_text, verse.read_text())
        run, corpus = start(change(config, corpus=str(pipe)), "one", *folders)
    monkeypatch.setattr("jaxgpt.prepare.sources._pipe", None)  # it would wait for a writer
    assert corpus_of(run, folders[1]).meta == corpus.meta
    with pytest.raises(CorpusError, match="cannot be prepared again: a pipe is read only once; put its original"):
        corpus_of(run, tmp_path / "elsewhere")


@pytest.fixture
def mixture(config, change, verse, tmp_path):
    """A config with the mixture of a text and a prepared folder, which lies elsewhere; and the text."""
    mine = tmp_path / "text.txt"
    mine.write_text(verse.read_text() + "that hat\n" * 50)
    folder = prepare_corpus(str(verse), "ascii", data_dir=tmp_path / "elsewhere").folder
    return change(config, corpus=f"0.123456789*{mine} + 2*{folder}", tokenizer="ascii"), mine


def test_a_mixture_is_found_as_it_was_prepared_by_many_at_once(mixture, folders, monkeypatch):
    config, mine = mixture
    monkeypatch.setattr(encode, "PART", 40)
    monkeypatch.setattr(encode, "SHARD", 100)
    run, corpus = start(config, "one", *folders)
    again = Run.open(folders[0], "one")
    with monkeypatch.context() as patched, ThreadPoolExecutor(3) as pool:
        patched.setattr("jaxgpt.prepare.build.encode", None)  # nothing is encoded
        for found in pool.map(corpus_of, [again] * 3, [folders[1]] * 3):
            assert found.meta == corpus.meta
            assert found.training_parts(DataConfig()) == corpus.training_parts(DataConfig())
            np.testing.assert_array_equal(np.asarray(found.tokens), np.asarray(corpus.tokens))
    folder = folders_of(corpus.meta, folders[1])[0]
    shutil.rmtree(folder)
    assert corpus_of(run, folders[1]).meta == corpus.meta
    shutil.rmtree(folder)
    mine.write_text("a\n" * 500)
    with pytest.raises(CorpusError, match=f"{corpus.meta['sha256']}.* now gives .* tokens.json into {folder} and "):
        corpus_of(run, folders[1])


def test_process_0_checks_the_tokens_for_all(config, folders, monkeypatch):
    run, corpus = start(config, "one", *folders)
    monkeypatch.setattr(files, "sha256", None)
    with pytest.raises(TypeError):
        corpus_of(run, folders[1])
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    assert corpus_of(run, folders[1]).meta == corpus.meta


def test_best_and_last_checkpoints(config, folders):
    run, corpus = start(config, "one", *folders)
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_checkpoint(run)
    done = fit(run, corpus)
    assert load_checkpoint(run, "last")[0] == 10
    assert load_checkpoint(run, "best")[0] == done.best.step
    for which, said in (("newest", "expected 'best', 'last' or"), (7, r"checkpoint is 7, expected .* a step: .*10")):
        with pytest.raises(RunError, match=said):
            load_checkpoint(run, which)
    (run.checkpoints / "10" / "state" / "_METADATA").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint last cannot be used: .*_METADATA is missing .*; jaxgpt train --run"
    ):
        load_checkpoint(run, "last")


def test_a_run_made_longer_equals_one_that_was_longer_from_the_start(config, change, folders):
    """The schedule ends where it was first said to end, so the learning rate does not jump."""
    config = change(config, decay_steps=0)
    run, corpus = start(config, "short", *folders)
    assert run.config.optimizer.decay_steps == 10
    fit(run, corpus)
    longer = change(run.config, steps=20)
    fit(run, resume(longer, run, folders[1]), config=longer)
    unbroken, corpus = start(change(config, steps=20, decay_steps=10), "long", *folders)
    fit(unbroken, corpus)
    assert run.metrics_file.read_bytes() == unbroken.metrics_file.read_bytes()


def test_the_texts_path_is_kept_whole(config, change, folders, verse, monkeypatch, tmp_path):
    monkeypatch.chdir(verse.parent)
    run, _ = start(change(config, corpus=verse.name), "one", *folders)
    assert run.config.data.corpus == str(verse)


def test_a_padded_vocabulary_and_a_split_of_ones_own_are_found_again(config, change, folders, tmp_path):
    (tmp_path / "few.txt").write_text("abcdefghij" * 2)
    own = change(config, corpus=str(tmp_path / "few.txt"), val_fraction=0.5, block_size=8)
    run, corpus = start(own, "one", *folders)
    shutil.rmtree(folders[1])
    assert corpus_of(run, folders[1]).meta == corpus.meta


@pytest.mark.parametrize("known", [True, False])
def test_what_cannot_fit_is_refused_before_anything_is_made(config, change, folders, monkeypatch, known):
    """With a vocabulary that is given, before the text is looked at; else before there is a run."""
    config = change(config, vocab_size=500 if known else 0, batch_size=256)
    empty = memory.needed(change(config, vocab_size=0), 0).total
    monkeypatch.setattr(memory, "available", lambda: empty + 10_000)
    with pytest.raises(OutOfMemoryError, match=r"at least .* parameters .* MB are free: try --accumulate \d"):
        start(config, "one", *folders)
    assert not folders[0].exists()
    assert folders[1].exists() != known


def test_a_run_that_no_longer_fits_is_refused_as_it_is(config, folders, monkeypatch, capsys):
    run, corpus = start(config, "one", *folders)
    fit(run, corpus)
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    before = run.metrics_file.read_bytes()
    places = ["--runs-dir", str(folders[0]), "--data-dir", str(folders[1])]
    assert run_command(["train", "--run", "one", "--resume", "--steps", "20", *places]) == 2
    assert "a run that has begun cannot be made smaller" in capsys.readouterr().err
    assert run.metrics_file.read_bytes() == before
