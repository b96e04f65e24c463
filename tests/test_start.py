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
from jaxgpt.cli.runs import complete, corpus_of, resume, start_run
from jaxgpt.config import ConfigError, DataConfig, UsageError
from jaxgpt.corpus import CorpusError
from jaxgpt.prepare import encode
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.run import Run, RunError
from jaxgpt.start import load_checkpoint
from jaxgpt.tokenizer import UnknownCharacterError
from jaxgpt.train import fit


@pytest.fixture
def config(tiny, change, verse):
    return change(tiny, corpus=str(verse), vocab_size=0, steps=10, scan_steps=5, eval_every=5)


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "runs", tmp_path / "data"


def test_vocab_size_comes_from_the_text(config, change, folders):
    run, corpus = start_run(config, "one", *folders)
    assert run.config.model.vocab_size == corpus.tokenizer.vocab_size == 11
    padded, _ = start_run(change(config, vocab_size=64), "two", *folders)
    assert padded.config.model.vocab_size == 64
    exact, _ = start_run(change(config, vocab_size=11), "exact", *folders)
    assert exact.config.model.vocab_size == 11
    with pytest.raises(CorpusError, match="vocab_size is 5, expected at least the 11 ids"):
        start_run(change(config, vocab_size=5), "three", *folders)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"n_embd": 17}, ConfigError),
        ({"block_size": 500}, CorpusError),
        ({"corpus": "no"}, ValueError),
        ({"vocab_size": 5}, CorpusError),
    ],
)
def test_refused_config_leaves_no_files(config, change, folders, changes, kind):
    with pytest.raises(kind):
        start_run(change(config, **changes), "one", *folders)
    assert not folders[0].exists()
    assert not folders[1].exists()


def test_a_run_that_cannot_be_created_is_refused_before_its_text_is_prepared(config, folders, tmp_path):
    start_run(config, "one", *folders)
    shutil.rmtree(folders[1])
    (tmp_path / "file").touch()
    unwritable = tmp_path / "file", "cannot be written to: .*--runs-dir"
    for runs_dir, message in ((folders[0], "run 'one' exists"), unwritable):
        with pytest.raises(UsageError, match=message):
            start_run(config, "one", runs_dir, folders[1])
        assert not folders[1].exists()


def test_unknown_characters_are_skipped_only_if_the_config_says_so(config, change, folders, verse, tmp_path):
    (tmp_path / "a.txt").write_text("é" + verse.read_text())
    config = change(config, corpus=str(tmp_path / "a.txt"), tokenizer="ascii")
    with pytest.raises(UnknownCharacterError, match="é"):
        start_run(config, "one", *folders)
    assert start_run(change(config, unknown="skip"), "one", *folders)[1].meta["skipped_characters"] == 1


def test_only_a_config_without_its_vocabulary_needs_the_text(config, change, folders):
    assert complete(config, folders[1]).model.vocab_size == 11
    assert complete(change(config, corpus="nowhere", vocab_size=50), folders[1]).model.vocab_size == 50


def test_config_refused_for_its_vocabulary_leaves_no_run(config, change, folders, tmp_path):
    (tmp_path / "many.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 4097))) * 2)
    config = change(config, corpus=str(tmp_path / "many.txt"), bigram_embed=True)
    for _ in range(2):  # the second time, the text is prepared already
        with pytest.raises(ConfigError, match=r"vocab_size is 4097, expected at most 4096, or --no-bigram-embed"):
            start_run(config, "one", *folders)
    assert not folders[0].exists()
    with pytest.raises(ConfigError, match="--no-bigram-embed"):
        complete(config, folders[1])
    run, _ = start_run(change(config, bigram_embed=False), "one", *folders)
    assert run.config.model.vocab_size == 4097


def test_resume_may_change_steps_but_not_what_they_compute(config, change, folders):
    run, _ = start_run(config, "one", *folders)
    longer = change(run.config, steps=20)
    corpus = resume(longer, run, folders[1])
    assert Run.open(folders[0], "one").config.train.steps == 10, "nothing is written before the run is locked"
    assert fit(run, corpus, config=longer).step == 20
    assert Run.open(folders[0], "one").config == longer
    with pytest.raises(RunError) as caught:
        resume(change(longer, n_layer=3, seed=5, accumulate=2, steps=30), run, folders[1])
    assert "n_layer: 1 in the run, 3 asked for" in str(caught.value)
    assert "seed: 1337 in the run, 5 asked for" in str(caught.value)
    assert "accumulate: 1 in the run, 2 asked for" in str(caught.value)
    assert "steps: " not in str(caught.value)


def test_resume_may_change_how_it_evaluates_and_saves(config, change, folders):
    run, _ = start_run(config, "one", *folders)
    often = dict(scan_steps=2, eval_every=2, eval_batches=1, eval_start=False)
    assert resume(
        change(run.config, **often, keep=9, keep_every=4, max_skipped=1, on_save_error="stop"), run, folders[1]
    )


def test_rising_learning_rate_is_refused_only_for_new_runs(config, change, folders):
    """Earlier versions made such runs: their minimum was 1e-4 for any peak."""
    rising = change(config, learning_rate=1e-5, min_learning_rate=1e-4)
    with pytest.raises(ConfigError, match="try --min-learning-rate None"):
        start_run(rising, "one", *folders)
    run, _ = start_run(change(config, learning_rate=1e-5), "one", *folders)
    run = run.with_config(change(run.config, min_learning_rate=1e-4))
    assert fit(run, resume(run.config, run, folders[1])).step == 10
    assert max(line["learning_rate"] for line in run.metrics() if "learning_rate" in line) > 2e-5


def test_val_tokens_limits_training_and_eval(config, change, folders, capsys):
    config = change(config, val_tokens=30, eval_batches=0)
    run, corpus = start_run(config, "one", *folders)
    fit(run, corpus)
    assert {line["val_n_tokens"] for line in run.metrics() if "val_n_tokens" in line} == {29}
    evaluate.run(["one", "--runs-dir", str(folders[0]), "--data-dir", str(folders[1]), "--eval-batches", "0"])
    assert "29 tokens predicted" in capsys.readouterr().out
    with pytest.raises(RunError, match="val_tokens: 30 in the run, 40 asked for"):
        resume(change(run.config, val_tokens=40), run, folders[1])


def test_resume_cannot_end_before_its_checkpoint(config, change, folders):
    run, corpus = start_run(config, "one", *folders)
    fit(run, corpus)
    with pytest.raises(RunError, match="at step 10 already, beyond the 5 asked for: give at least --steps 10"):
        fit(run, corpus, config=change(run.config, steps=5))
    assert Run(run.path).config == run.config


def test_corpus_is_found_or_prepared_again_or_refused(config, change, folders, verse, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(verse.read_text())
    run, corpus = start_run(change(config, corpus=str(text)), "one", *folders)
    folder = folder_of(corpus.meta, folders[1])
    assert corpus_of(run, folders[1]).meta == corpus.meta
    for path in folder.iterdir():
        path.unlink()
    assert corpus_of(run, folders[1]).meta == corpus.meta
    for path in folder.iterdir():
        path.unlink()
    for more in ("a\n", "z\n"):  # "z" is not in the vocabulary
        text.write_text(verse.read_text() + more)
        with pytest.raises(CorpusError, match=f"{corpus.meta['sha256']}.*text.txt' now gives other tokens; put its"):
            corpus_of(run, folders[1])


def test_corpus_is_prepared_again_with_the_tokenizer_of_the_run(config, change, folders, verse, tmp_path):
    """The file that `tokenizer` names may be gone, or its relative path may belong to another folder."""
    prepared = prepare_corpus(str(verse), data_dir=tmp_path / "given").folder
    run, corpus = start_run(change(config, tokenizer=str(prepared / "tokens.json")), "one", *folders)
    shutil.rmtree(prepared)
    shutil.rmtree(folders[1])
    assert corpus_of(run, folders[1]).meta == corpus.meta


def test_pipe_is_not_read_again(config, change, folders, verse, tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as writer:
        writer.submit(pipe.write_text, verse.read_text())
        run, corpus = start_run(change(config, corpus=str(pipe)), "one", *folders)
    monkeypatch.setattr("jaxgpt.prepare.sources._pipe", None)  # reading the pipe would wait for a writer
    assert corpus_of(run, folders[1]).meta == corpus.meta
    with pytest.raises(CorpusError, match="cannot be prepared again: a pipe is read only once; put its original"):
        corpus_of(run, tmp_path / "elsewhere")
    for name in ("/dev/stdin", "/dev/fd/63"):  # no pipe now, or none of this number
        other = run.with_config(change(run.config, corpus=name))
        with pytest.raises(CorpusError, match="cannot be prepared again: a pipe is read only once; put its original"):
            corpus_of(other, tmp_path / "elsewhere")


@pytest.fixture
def mixture(config, change, verse, tmp_path):
    """(config, text): a mixture of `text` and of a corpus that was prepared in another folder."""
    text = tmp_path / "text.txt"
    text.write_text(verse.read_text() + "that hat\n" * 50)
    folder = prepare_corpus(str(verse), "ascii", data_dir=tmp_path / "elsewhere").folder
    return change(config, corpus=f"0.123456789*{text} + 2*{folder}", tokenizer="ascii"), text


def test_prepared_mixture_is_found_concurrently(mixture, folders, monkeypatch):
    config, text = mixture
    monkeypatch.setattr(encode, "PART", 40)
    monkeypatch.setattr(encode, "SHARD", 100)
    run, corpus = start_run(config, "one", *folders)
    reopened = Run.open(folders[0], "one")
    with monkeypatch.context() as patched, ThreadPoolExecutor(3) as pool:
        patched.setattr("jaxgpt.prepare.build.encode", None)  # encoding would fail
        for found in pool.map(corpus_of, [reopened] * 3, [folders[1]] * 3):
            assert found.meta == corpus.meta
            assert found.training_parts(DataConfig()) == corpus.training_parts(DataConfig())
            np.testing.assert_array_equal(np.asarray(found.tokens), np.asarray(corpus.tokens))
    folder = folders_of(corpus.meta, folders[1])[0]
    shutil.rmtree(folder)
    assert corpus_of(run, folders[1]).meta == corpus.meta
    shutil.rmtree(folder)
    text.write_text("a\n" * 500)
    with pytest.raises(CorpusError, match=f"{corpus.meta['sha256']}.* now gives .* tokens.json into {folder} and "):
        corpus_of(run, folders[1])


def test_only_process_0_hashes_the_tokens(config, folders, monkeypatch):
    run, corpus = start_run(config, "one", *folders)
    monkeypatch.setattr(files, "sha256", None)
    with pytest.raises(TypeError):
        corpus_of(run, folders[1])
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    assert corpus_of(run, folders[1]).meta == corpus.meta


def test_best_and_last_checkpoints(config, folders):
    run, corpus = start_run(config, "one", *folders)
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_checkpoint(run)
    done = fit(run, corpus)
    assert load_checkpoint(run, "last")[0] == 10
    assert load_checkpoint(run, "best")[0] == done.best.step
    for which, message in (("newest", "expected 'best', 'last' or"), (7, r"checkpoint is 7, expected .* a step: .*10")):
        with pytest.raises(RunError, match=message):
            load_checkpoint(run, which)
    (run.checkpoints / "10" / "state" / "_METADATA").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint last cannot be used: .*_METADATA is missing .*; jaxgpt train --run"
    ):
        load_checkpoint(run, "last")


def test_extended_run_equals_one_that_was_longer_from_the_start(config, change, folders):
    """The schedule still ends at the first `decay_steps`, so the learning rate does not jump."""
    config = change(config, decay_steps=0)
    run, corpus = start_run(config, "short", *folders)
    assert run.config.optimizer.decay_steps == 10
    fit(run, corpus)
    longer = change(run.config, steps=20)
    fit(run, resume(longer, run, folders[1]), config=longer)
    unbroken, corpus = start_run(change(config, steps=20, decay_steps=10), "long", *folders)
    fit(unbroken, corpus)
    assert run.metrics_file.read_bytes() == unbroken.metrics_file.read_bytes()


def test_path_of_the_text_is_saved_as_absolute(config, change, folders, verse, monkeypatch):
    monkeypatch.chdir(verse.parent)
    run, _ = start_run(change(config, corpus=verse.name), "one", *folders)
    assert run.config.data.corpus == str(verse)


def test_corpus_with_its_own_split_is_prepared_again(config, change, folders, tmp_path):
    (tmp_path / "few.txt").write_text("abcdefghij" * 2)
    config_with_split = change(config, corpus=str(tmp_path / "few.txt"), val_fraction=0.5, block_size=8)
    run, corpus = start_run(config_with_split, "one", *folders)
    shutil.rmtree(folders[1])
    assert corpus_of(run, folders[1]).meta == corpus.meta


@pytest.mark.parametrize("known", [True, False])
def test_run_that_cannot_fit_is_refused_before_it_is_created(config, change, folders, monkeypatch, known):
    """If vocab_size is known, before the text is prepared; else before the run is created."""
    config = change(config, vocab_size=500 if known else 0, batch_size=256)
    empty = memory.needed(change(config, vocab_size=0), 0).total
    monkeypatch.setattr(memory, "available", lambda: empty + 10_000)
    with pytest.raises(OutOfMemoryError, match=r"at least .* parameters .* MB are free: try --accumulate \d"):
        start_run(config, "one", *folders)
    assert not folders[0].exists()
    assert folders[1].exists() != known


def test_resume_that_no_longer_fits_is_refused(config, folders, monkeypatch, capsys):
    run, corpus = start_run(config, "one", *folders)
    fit(run, corpus)
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    before = run.metrics_file.read_bytes()
    folder_options = ["--runs-dir", str(folders[0]), "--data-dir", str(folders[1])]
    assert run_command(["train", "--run", "one", "--resume", "--steps", "20", *folder_options]) == 2
    assert "a run that has begun cannot be made smaller" in capsys.readouterr().err
    assert run.metrics_file.read_bytes() == before
