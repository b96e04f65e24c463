"""Importing GPT-2 folders as runs, exporting runs, and finding or downloading folders."""

import dataclasses
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError

from jaxgpt import files, model
from jaxgpt.cli import sample
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, UsageError
from jaxgpt.corpus import CorpusError
from jaxgpt.huggingface import folders, gpt2
from jaxgpt.huggingface.cli import run_export, run_import_gpt2
from jaxgpt.huggingface.gpt2 import InteropError
from jaxgpt.monitor.facts import command
from jaxgpt.recipes import FINETUNE, RECIPES
from jaxgpt.run import Run
from jaxgpt.sample import write
from jaxgpt.start import load_checkpoint, load_model
from jaxgpt.train import fit

TINY = Path(__file__).parents[1] / "goldens" / "hf-gpt2-tiny"
IDX = jnp.arange(24).reshape(1, 24)


@pytest.fixture
def imported(tmp_path):
    """A run of the tiny GPT-2, whose 96 ids are line feed and printable ASCII, on the embedded corpus."""
    config = Config(
        DataConfig(tokenizer="ascii", unknown="skip"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        train=TrainConfig(steps=150, batch_size=32, scan_steps=50, eval_every=0, eval_batches=0),
    )
    return folders.import_run(TINY, config, "tiny", tmp_path / "runs", tmp_path / "data")


def logits(loaded):
    config, params, _ = loaded
    return np.asarray(model.forward(config, params, IDX))


def test_a_fine_tuned_model_is_exported_and_imported_again(imported, tmp_path):
    """Import, sample, fine-tune on the embedded corpus, export, import: logits survive each conversion."""
    theirs = model.forward(*gpt2.load(TINY), IDX)
    np.testing.assert_array_equal(logits(load_model(imported)), theirs)
    (text,) = ("".join(pieces) for pieces in write(*load_model(imported), "def ", 20))
    assert len(text) == 24

    from jaxgpt.cli.runs import corpus_of

    done = fit(imported, corpus_of(imported, tmp_path / "data"))
    assert done.scores[-1].evaluation.loss < 2.7 < 4.5 < done.scores[0].evaluation.loss
    assert folders.export_run(imported, tmp_path / "out") == done.step
    np.testing.assert_array_equal(logits(folders.load_export(tmp_path / "out")), logits(load_model(imported)))
    again = folders.import_run(tmp_path / "out", imported.config, "again", tmp_path / "runs", tmp_path / "data")
    np.testing.assert_array_equal(logits(load_model(again)), logits(load_model(imported)))


def test_an_import_is_a_run_at_step_0(imported):
    assert load_checkpoint(imported)[0] == 0
    assert imported.config.model.gelu == "tanh"
    assert imported.config.model.vocab_size == imported.tokenizer.vocab_size == 96
    assert json.loads((imported.path / "events.jsonl").read_text())["origin"] == str(TINY)


def test_an_export_has_all_files_and_a_model_card(imported, tmp_path):
    folders.export_run(imported, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "tokens.json"]
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (imported.corpus_meta["sha256"], "hf-gpt2-tiny", "jaxgpt train", "--tokenizer ascii", "not evaluated"):
        assert text in card
    with pytest.raises(UsageError, match="leave out --checkpoint last"):
        sample.run([str(tmp_path / "out"), "--checkpoint", "last"])
    with pytest.raises(InteropError, match="exists; give a new folder"):
        folders.export_run(imported, tmp_path / "out")


def test_the_printed_command_samples_the_export_not_a_run_of_its_name(imported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out, printed in (("tiny", "./tiny"), (str(tmp_path / "out"), str(tmp_path / "out"))):
        assert run_export(["tiny", "--out", out]) == 0
        assert capsys.readouterr().out.endswith(f"Sample from it: jaxgpt sample {printed}\n")


def test_paths_that_are_not_utf8_can_be_trained_on_and_exported_to(tmp_path, change):
    text, out = (tmp_path / os.fsdecode(name) for name in (b"bad\xff.txt", b"out\xff"))
    text.write_text("the cat sat on the mat\n" * 40)
    config = change(FINETUNE, corpus=str(text), tokenizer="ascii")
    run = folders.import_run(TINY, config, "bad", tmp_path / "runs", tmp_path / "data")
    assert Run(run.path).config.data.corpus == str(text)
    folders.export_run(run, out)
    assert folders.load_export(out)[2] == run.tokenizer
    assert "bad\\udcff.txt" in (out / "README.md").read_text("utf-8")


def test_sample_refuses_a_plain_gpt2_folder_and_suggests_import_gpt2():
    with pytest.raises(CorpusError, match=r"tokens\.json cannot be read: .*: jaxgpt import-gpt2 \S+ --run NAME"):
        sample.run([str(TINY)])


@pytest.mark.parametrize("line", ['{"step": 0, "val_loss": 1.0', '{"step": 0, "val_loss": null}'])
def test_export_ignores_damaged_metrics_and_nan_losses(imported, tmp_path, line):
    imported.metrics_file.write_text(line + "\n")
    folders.export_run(imported, tmp_path / "out")
    assert "not evaluated" in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_has_the_loss_of_the_exported_step(imported, tmp_path):
    rest = {"val_n_tokens": 9, "val_bits_per_byte": 1.5}
    lines = [{"step": step, "val_loss": loss, **rest} for step, loss in ((0, 2.0), (50, 2.5))]
    imported.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert folders.export_run(imported, tmp_path / "out") == 0
    card, meta = (tmp_path / "out" / "README.md").read_text(), imported.corpus_meta
    assert "2.0000 nats per token over the whole validation split (9 tokens, 1.5000 bits per byte)" in card
    assert f"| SHA-256 of the text | {meta['source_sha256']} |\n| SHA-256 of the tokens | {meta['sha256']} |" in card


def test_options_of_an_import_reach_the_run(tmp_path):
    options = ["--tokenizer", "ascii", "--unknown", "skip", "--block-size", "8", "--dropout", "0.25"]
    options += ["--precision", "bfloat16", "--remat", "blocks", "--deterministic"]
    where = ["--runs-dir", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data")]
    assert run_import_gpt2([str(TINY), "--run", "short", *options, *where]) == 0
    run = Run(tmp_path / "runs" / "short")
    found = run.config.model
    assert (found.block_size, found.dropout, found.precision, found.remat) == (8, 0.25, "bfloat16", "blocks")
    assert found.deterministic
    assert load_checkpoint(run)[1]["wpe"]["embedding"].shape == (8, 32)


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_chosen_checkpoint_is_exported(imported, tmp_path, monkeypatch, which):
    chosen = []
    monkeypatch.setattr(folders, "load_checkpoint", lambda run, which: chosen.append(which) or load_checkpoint(run))
    where = ["--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "runs")]
    assert run_export(["tiny", "--checkpoint", which, *where]) == 0
    assert chosen == [which]


def test_an_imported_export_keeps_its_vocabulary(imported, tmp_path):
    folders.export_run(imported, tmp_path / "out")
    (tmp_path / "text.txt").write_text("a hat on a cat\n" * 60)
    where = tmp_path / "runs", tmp_path / "data"
    data = DataConfig(corpus=str(tmp_path / "text.txt"), tokenizer="gpt2")  # the default of import-gpt2
    own = folders.import_run(tmp_path / "out", dataclasses.replace(imported.config, data=data), "own", *where)
    assert own.tokenizer.to_json() == imported.tokenizer.to_json()


@pytest.fixture
def with_vocabulary(tmp_path):
    """(folder, tokenizer): a Hugging Face GPT-2 with its own vocabulary, and the `tokenizers` object that wrote it."""
    theirs = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    theirs.train_from_iterator(["the cat sat on the mat\n"], 270, special_tokens=["<|endoftext|>"], show_progress=False)
    folder = tmp_path / "own"
    folder.mkdir()
    config = ModelConfig(vocab_size=300, block_size=8, n_layer=1, n_head=1, n_embd=8, bias=True)
    gpt2.save(folder, config, model.init_params(config, jax.random.key(0)))
    theirs.save(str(folder / "tokenizer.json"))
    return folder, theirs


def test_an_import_uses_the_vocabulary_of_its_folder(with_vocabulary, verse, tmp_path, change):
    folder, theirs = with_vocabulary
    config = change(FINETUNE, corpus=str(verse))
    where = tmp_path / "runs", tmp_path / "data"
    run = folders.import_run(folder, config, "own", *where)
    from jaxgpt.cli.runs import corpus_of

    assert corpus_of(run, tmp_path / "data").tokens.tolist() == theirs.encode(verse.read_text()).ids
    folders.export_run(run, tmp_path / "out")
    assert folders.load_export(tmp_path / "out")[2] == run.tokenizer

    (folder / "tokenizer.json").rename(folder / "vocab.txt")  # a kind of vocabulary that is not supported
    with pytest.raises(CorpusError, match=r"cannot be used: .*name a tokenizer, such as --tokenizer byte"):
        folders.import_run(folder, config, "other", *where)
    assert folders.import_run(folder, change(config, tokenizer="byte"), "bytes", *where).config.data.tokenizer == "byte"


@pytest.mark.parametrize("error", [OSError(28, "No space"), SafetensorError("I/O error: No space")])
def test_a_failed_export_leaves_nothing(imported, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(InteropError, match=r"out cannot be written: .*No space; name another folder: --out"):
        folders.export_run(imported, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_vocabulary_larger_than_the_model_is_refused(imported, tmp_path):
    folders.export_run(imported, tmp_path / "out")
    meta = files.unseal((tmp_path / "out" / "tokens.json").read_bytes())
    meta["tokenizer"]["chars"] += "é"
    (tmp_path / "out" / "tokens.json").write_text(files.seal(meta))
    with pytest.raises(InteropError, match="97 ids, expected at most the model's 96"):
        folders.load_export(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"), [("no such", "no folder 'no such'"), ("~m", "no folder '~m'"), ("../x/y/z", "no folder")]
)
def test_find_refuses_a_name_that_is_neither_a_folder_nor_a_model(name, message):
    with pytest.raises(InteropError, match=message):
        folders.find(name)


def test_without_a_network_the_error_names_the_files_to_fetch(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InteropError) as caught:
        folders.find("no-such-owner/no-such-model")
    assert (
        "model.safetensors, vocab.json and merges.txt from https://huggingface.co/no-such-owner/no-such-model"
        in str(caught.value)
    )


def test_find_downloads_only_needed_files(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra: pip install 'jaxgpt[hf]'")
    download_args = {}
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **kwargs: download_args.update(kwargs, name=name) or str(tmp_path)
    )
    assert folders.find("gpt2") == tmp_path
    assert download_args["name"] == "gpt2"

    def allowed(name):
        return any(fnmatch(name, pattern) for pattern in download_args["allow_patterns"])

    assert all(map(allowed, ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "merges.txt"]))
    assert all(map(allowed, ["model.safetensors.index.json", "vocab.json", "tokenizer.json"]))
    assert not any(map(allowed, ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"]))


def test_a_hub_error_without_a_message_is_reported(monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra: pip install 'jaxgpt[hf]'")

    def silent(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(hub, "snapshot_download", silent)
    with pytest.raises(InteropError, match="'gpt2' cannot be fetched"):
        folders.find("gpt2")


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_a_config_reproduces_it(name, change):
    from jaxgpt import cli
    from jaxgpt.cli import train

    config = change(RECIPES[name].config, dropout=0.25, bias=True, corpus="a b.txt", seed=7)
    words = command(config)
    assert words.startswith(f"jaxgpt train {name} ")
    import shlex

    given = []
    original, train._fit = train._fit, lambda args, existing: given.append(args) or 0
    try:
        cli.run_command(shlex.split(words)[1:])
    finally:
        train._fit = original
    assert given[0].config == config


def test_an_imported_run_never_starts_from_random_weights(imported, tmp_path):
    from jaxgpt.cli.runs import corpus_of
    from jaxgpt.run import RunError

    shutil.rmtree(imported.checkpoints / "0")
    with pytest.raises(RunError, match=r"step 0 was saved, but .* holds no checkpoint"):
        fit(imported, corpus_of(imported, tmp_path / "data"))


def test_a_kill_during_import_leaves_no_run(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr("jaxgpt.start.Checkpoints.save", kill)
    config = Config(DataConfig(tokenizer="ascii", unknown="skip"), train=TrainConfig(scan_steps=10, eval_every=0))
    with pytest.raises(Killed):
        folders.import_run(TINY, config, "one", tmp_path / "runs", tmp_path / "data")
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_export_to_an_unwritable_path_is_refused_with_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "open", lambda *_: pytest.fail("the run was opened before the path was checked"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file cannot be written to: Not a directory; name another folder: --out"):
        run_export(["tiny", "--out", str(tmp_path / "file" / "x")])
