"""The command line: in this process where possible, in a child process where the exit matters."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import jax
import pytest

import jaxgpt
from jaxgpt import cli
from jaxgpt.checkpoint import CheckpointError, Checkpoints
from jaxgpt.cli import memory
from jaxgpt.cli.evaluate import Eval
from jaxgpt.cli.options import parse, take_name
from jaxgpt.cli.runs import start_run
from jaxgpt.cli.sample import Sample
from jaxgpt.cli.train import Train, _from_file, _print_summary, resume_command
from jaxgpt.config import Config
from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import Evaluated, Progress
from jaxgpt.monitor import loggers
from jaxgpt.monitor.terminal import RunConsole
from jaxgpt.recipes import RECIPES
from jaxgpt.run import Run
from jaxgpt.sample import SamplingParams
from jaxgpt.serve.library import Library
from jaxgpt.train import Summary

SMALL = ("--block-size", 8, "--n-layer", 1, "--n-embd", 16, "--steps", 20, "--scan-steps", 5, "--eval-every", 10)
SMALL += ("--batch-size", 4, "--warmup-steps", 2, "--eval-batches", 2)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command in tmp_path: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        try:
            code = cli.run_command([str(arg) for arg in args])
        except SystemExit as done:  # tyro exits by itself
            code = done.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(("steps", "shown"), [([0, 10, 20], True), ([10, 20], False), ([0], False)])
def test_summary_shows_the_loss_before_training_only_with_step_0(steps, shown, capsys):
    scores = [Evaluated(step, Evaluation(3.0, 0.1, 4.0, 4.0, 100)) for step in steps]
    _print_summary(RunConsole(), Summary(Run(Path("runs/one")), 20, 20, scores, 1.0, None, 0))
    assert ("  before  loss 3.0000" in capsys.readouterr().out) == shown


@pytest.mark.parametrize(("speed", "shown"), [(12345.6, "step 20 in 1s, 12,346 tokens/s"), (None, "step 20 in 1s")])
def test_summary_shows_the_speed_if_it_is_known(speed, shown, capsys):
    scores = [Evaluated(20, Evaluation(3.0, 0.1, 4.0, 4.0, 100))]
    _print_summary(RunConsole(), Summary(Run(Path("runs/one")), 20, 20, scores, 1.0, speed, 0))
    out = capsys.readouterr().out
    assert f"runs/one: {shown}\n" in out
    assert "  best  " not in out, "it is the last"


def test_prepare_train_sample_eval(call, verse, monkeypatch):
    code, out, _ = call("prepare", verse)
    assert code == 0
    assert "840 tokens, vocabulary of 11 (char)" in out
    assert "written to data/text-char-" in out
    assert "found in" in call("prepare", verse)[1]

    code, out, _ = call("train", "gpt-demo", "--corpus", verse, "--run", "one", *SMALL)
    assert code == 0, out
    assert "step      0  validation loss" in out
    before, after = (next(line for line in out.splitlines() if line.startswith(f"  {w}")) for w in ("before", "after"))
    assert float(after.split()[2]) < float(before.split()[2])
    assert "jaxgpt sample one" in out
    assert re.search(r"^loss \S+  \d\.\d\d to \d\.\d\d  best ", out, re.MULTILINE)

    code, out, _ = call("sample", "one", "--prompt", "the ", "--tokens", 50, "--seed", 3)
    assert code == 0
    assert out.startswith("the ")
    assert len(out) == 4 + 50 + 1
    assert call("sample", "one", "--prompt", "the ", "--tokens", 50, "--seed", 3)[1] == out
    assert call("sample", "one", "--tokens", 5, "--samples", 2)[1].count("-" * 40) == 1
    stops = ("--stop", out[14:16], "--stop", out[19:22])
    assert out.startswith(call("sample", "one", "--prompt", "the ", "--tokens", 50, "--seed", 3, *stops)[1][:-1])
    assert len(call("sample", "one", "--prompt", "the ", "--tokens", 50, "--seed", 3, *stops)[1]) <= 14 + 1
    code, _, err = call("sample", "one", "--top-p", 1.5)
    assert (code, err) == (2, "jaxgpt: top_p is 1.5, expected a number above 0, up to 1 (all)\n")
    assert call("sample", "one", "--tokens", 5, "--top-p", 0.9, "--min-p", 0.1)[0] == 0
    assert call("sample", "one", "--tokens", 5, "--prompt", "the Zoo", "--unknown", "skip")[1].startswith("the oo")

    code, out, _ = call("eval", "one")
    assert code == 0
    assert after.split()[2] in out, "eval prints the loss that training ended with"
    assert "estimate by 200 random batches" in out
    assert "val split, 83 tokens predicted" in out
    assert "train split, 755 tokens predicted" in call("eval", "one", "--split", "train", "--eval-batches", 0)[1]
    monkeypatch.setattr("jaxgpt.evaluation.estimate", lambda config, *given: float(config.train.eval_batches))
    assert "estimate by 3 random batches: 3.0000" in call("eval", "one", "--eval-batches", 3)[1]
    assert "estimate by 1 random batch: 1.0000" in call("eval", "one", "--eval-batches", 1)[1]


def test_sample_writes_with_every_option_that_it_is_given(call, monkeypatch):
    asked = []
    monkeypatch.setattr("jaxgpt.cli.sample._load_model", lambda *given: given)
    monkeypatch.setattr("jaxgpt.sample.write", lambda *given, **more: asked.append((given, more)) or [])
    filters = ("--temperature", 0.5, "--top-k", 3, "--top-p", 0.9, "--min-p", 0.1)
    texts = ("--prompt", "the", "--tokens", 7, "--seed", 4, "--samples", 2, "--stop", "x", "--unknown", "skip")
    assert call("sample", "one", *filters, *texts, "--checkpoint", "last", "--runs-dir", "there")[0] == 0
    given = ("one", Path("there"), "last", "the", 7, SamplingParams(0.5, 3, 0.9, 0.1))
    assert asked == [(given, {"stop": ("x",), "seed": 4, "samples": 2, "unknown": "skip"})]


def test_a_run_is_never_overwritten_and_resumes_with_its_own_settings(call, verse, tmp_path):
    assert call("train", "gpt-demo", "--corpus", verse, "--run", "one", *SMALL)[0] == 0
    metrics = (tmp_path / "runs/one/metrics.jsonl").read_bytes()
    code, _, err = call("train", "gpt-demo", "--corpus", verse, "--run", "one", *SMALL)
    assert code == 2
    assert "--run one --resume continues it" in err
    code, _, err = call("train", "--run", "one", "--resume", "--n-layer", 2)
    assert code == 2
    assert "n_layer: 1 in the run, 2 asked for" in err
    assert (tmp_path / "runs/one/metrics.jsonl").read_bytes() == metrics
    code, out, _ = call("train", "--run", "one", "--resume", "--steps", 30)
    assert code == 0
    assert "the learning rate stays at 0 from step 20 on" in out
    assert "step 30" in out
    assert (tmp_path / "runs/one/metrics.jsonl").read_bytes().startswith(metrics)
    for steps, code in ((30, 0), (25, 2)):  # nothing is left to train
        found, out, _ = call("train", "--run", "one", "--resume", "--steps", steps)
        assert found == code
        assert "the learning rate stays" not in out


def test_resume_finds_the_named_run_in_runs_dir(call, verse, tmp_path):
    """With any spelling of --runs-dir; the commands that it prints can be pasted."""
    for folder in ("runs", "else where"):
        assert call("train", "gpt-demo", "--corpus", verse, "--run", "a", "--runs-dir", folder, *SMALL)[0] == 0
    before = (tmp_path / "runs/a/config.json").read_bytes()
    for spelling in (["--runs_dir", "else where"], ["--runs_dir=else where"], ["--runs-dir", "else where"]):
        steps = ["--steps", str(30)]
        code, out, _ = call("train", "--run", "a", "--resume", *steps, *spelling)
        assert code == 0
        finished = "--runs_dir" not in spelling
        assert ("the run is at its last step, 30: --steps N trains longer" in out) == finished
        assert "jaxgpt sample a --runs-dir 'else where'" in out
    assert (tmp_path / "runs/a/config.json").read_bytes() == before
    assert call("sample", "a", "--runs-dir", "else where", "--tokens", 3)[0] == 0
    for name in ("bigram", "a"):
        code, _, err = call("train", name, "--run", "a", "--resume")
        assert (code, f"leave out '{name}', and name the run with --run" in err) == (2, True)


def test_a_run_in_use_is_refused_before_its_loggers_start(call, verse, tmp_path, monkeypatch):
    assert call("train", "gpt-demo", "--corpus", verse, "--run", "one", *SMALL)[0] == 0
    monkeypatch.setattr(loggers, "require", lambda names: None)
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda run: pytest.fail("the logger was started"))
    with Run(tmp_path / "runs/one").lock():
        code, _, err = call("train", "--run", "one", "--resume", "--steps", 30, "--log", "tensorboard")
    assert (code, "run 'one' is in use by another process" in err) == (2, True)


def test_resume_command_keeps_mesh_and_loggers():
    given = Train("one", Config(), mesh="data=2", log=("tensorboard", "wandb"))
    assert resume_command(given, Run(Path("runs/one"))) == (
        "jaxgpt train --run one --resume --mesh data=2 --log tensorboard --log wandb"
    )
    started = Train("one", Config(), distributed=True)
    assert resume_command(started, Run(Path("runs/one"))) == "jaxgpt train --run one --resume --distributed"
    joined = Train("one", Config(), coordinator="10.0.0.1:1234", num_processes=4, process_id=3)
    assert resume_command(joined, Run(Path("runs/one"))) == (
        "jaxgpt train --run one --resume --coordinator 10.0.0.1:1234 --num-processes 4 --process-id 0, 1, ..."
    )


def test_failed_save_prints_the_resume_command(call, verse, monkeypatch):
    def fail(*args):
        raise CheckpointError("no room")

    monkeypatch.setattr(Checkpoints, "save", fail)
    code, _, err = call("train", "gpt-demo", "--corpus", verse, "--run", "one", "--data-dir", "d", *SMALL)
    assert code == 1
    assert err.endswith("then resume it\nResume with: jaxgpt train --run one --resume --data-dir d\n")


def test_run_takes_precedence_over_a_folder_of_its_name(call, verse, tmp_path):
    assert call("train", "shakespeare-cpu", "--corpus", verse, "--run", "one", *SMALL)[0] == 0
    assert call("export", "one", "--out", "exported")[0] == 0
    shutil.copytree("exported", "one")
    text = call("sample", "one", "--tokens", 5)[1]
    assert call("sample", "exported", "--tokens", 5)[1] == call("sample", "./one", "--tokens", 5)[1] == text
    (tmp_path / "one/config.json").write_text("{}")
    assert call("sample", "one", "--tokens", 5)[1] == text
    assert call("sample", "./one", "--tokens", 5)[0] == 2

    shutil.rmtree("one")
    shutil.copytree("runs", "one")
    assert Library.at("one", tmp_path / "runs").folder == tmp_path / "runs"
    assert Library.at("./one", tmp_path / "runs").folder == Path("one")


def test_a_path_may_look_like_markup(call, tmp_path):
    (tmp_path / "my[draft]").mkdir()
    (tmp_path / "my[draft]" / "a[").write_text("the cat sat on the mat\n" * 30)
    code, out, _ = call("train", "bigram", "--corpus", "my[draft]/a[", "--run", "one", *SMALL)
    assert code == 0
    assert "my[draft]/a[" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: jaxgpt COMMAND"),
        (["trian"], "did you mean 'train'?"),
        (["train", "gpt-dmo"], "did you mean 'gpt-demo'?"),
        (["train", "gpt-demo", "--n-embd", "65"], "try --n-embd 64"),
        (["train", "gpt-demo", "--n-embed", "64"], "n-embed"),
        (["train", "gpt-demo", "--steps", "many"], "--steps"),
        (["train", "gpt-demo", "--run", "../x"], "expected letters"),
        (["train", "gpt-demo", "--run"], "--run"),
        (["train", "gpt-demo", "--corpus", "nowhere"], "no corpus, file or folder 'nowhere'"),
        (["train", "gpt-demo", "--num-processes", "2"], "need the address of process 0: --coordinator HOST:PORT"),
        (["train", "gpt-demo", "--process-id", "1"], "need the address of process 0: --coordinator HOST:PORT"),
        (["train", "--run", "nothing", "--resume"], "no run 'nothing'"),
        (["sample", "nothing"], "no run 'nothing'"),
        (["eval", "nothing"], "no run 'nothing'"),
        (["eval", "nothing", "--eval-batches", "-1"], "eval_batches is -1"),
        (["train", "gpt-demo", "--batch-size", "2000000000"], "expected less than 2**31 tokens"),
        (["prepare", ""], "has no name"),
        (["prepare", "nowhere"], "'nowhere' (named corpora: python-docs, "),
        (["prepare", "shakespear"], "did you mean 'shakespeare'?"),
        (["prepare", "0.7*a.txt+0.3*b.txt"], "a mixture is written '0.7*a.txt + 0.3*b.txt', with spaces"),
        (["prepare"], "CORPUS"),
        (["prepare", "python-docs", "--tokenizer", "bpe:12"], "a BPE vocabulary of 12, expected 256 to"),
    ],
)
def test_bad_usage_exits_with_2_and_writes_nothing(call, tmp_path, args, message):
    code, out, err = call(*args)
    assert code == 2
    assert message in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(call, command):
    assert command in call("--help")[1]
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"usage: jaxgpt {command}" in out


def test_help_says_which_recipe_its_defaults_are_those_of(call, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    for args in (["train", "gpt-demo"], ["train", "bigram"], ["plan", "gpt2-1.5b"], ["train", "mine.json"]):
        out = call(*args, "--help")[1]
        assert f"usage: jaxgpt {args[0]} RECIPE" in out
        assert f"the defaults shown here are those of {args[1]}." in " ".join(out.split())
        assert "unknown:" not in out, "a file says nothing of its time and loss"
    assert "those of gpt2-1.5b." in " ".join(call("plan", "--help")[1].split())


@pytest.mark.parametrize("command", ["train", "prepare", "sweep"])
def test_help_is_wrapped_to_the_width_of_the_terminal(call, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    out = call(command, "--help")[1].splitlines()
    lines = [line.rstrip() for line in out if line.startswith(10 * " ") and line.strip()]  # wrapped lines
    assert len(lines) > 4
    for line, following in pairwise(lines):
        if not line.endswith(")"):  # the default ends the help of an option
            assert len(f"{line} {following.split()[0]}") >= 80


def test_help_of_prepare_names_every_kind_of_corpus(call):
    text = " ".join(call("prepare", "--help")[1].replace("│", " ").split())
    for corpus in ("python-docs", ".parquet", "gs://bucket/texts", '"0.7*a.txt + 0.3*b.txt"'):
        assert corpus in text


def test_help_of_a_recipe_shows_its_defaults(call):
    code, out, _ = call("train", "shakespeare-gpu", "--help")
    assert code == 0
    assert "(default: 384)" in out
    assert "H, number of attention heads" in out


def test_recipes_are_listed(call):
    _, out, _ = call("recipes")
    for name in RECIPES:
        assert f"jaxgpt train {name}\n" in out


def test_skipped_characters_and_normalized_line_ends_are_reported(call, verse, tmp_path):
    call("prepare", verse)
    (tmp_path / "other.txt").write_bytes(b"the zebra\r\nsat on a mat\r\n" * 9)
    (tokens,) = (tmp_path / "data").glob("*/tokens.json")
    code, out, _ = call("prepare", "other.txt", "--tokenizer", tokens, "--unknown", "skip")
    assert code == 0
    assert "skipped 27 characters" in out
    assert "18 CR or CRLF" in out
    assert call("prepare", "other.txt", "--tokenizer", tokens)[0] == 2


def test_json_lines_with_a_learned_bpe(call, verse, tmp_path):
    lines = verse.read_text().splitlines()
    (tmp_path / "verse.jsonl").write_text("".join(json.dumps({"line": line}) + "\n" for line in lines))
    code, _, err = call("prepare", "verse.jsonl")
    assert code == 2
    assert "has no column 'text'; it has line" in err
    documents = ("verse.jsonl", "--column", "line", "--tokenizer", "bpe:260")
    code, out, err = call("prepare", *documents)
    assert code == 0
    assert "vocabulary of 260 (bpe)" in out
    assert err == "", "progress bars are for terminals"
    code, out, _ = call("train", "bigram", "--run", "one", *SMALL, "--corpus", *documents)
    assert code == 0, out
    code, out, _ = call("sample", "one", "--prompt", "the ", "--tokens", 20)
    assert code == 0
    assert out.startswith("the ")
    shutil.rmtree(tmp_path / "data")
    assert call("eval", "one", "--eval-batches", 0)[0] == 0, "eval prepares the same tokens again"


def test_damaged_checkpoint_exits_with_1(call, verse, tmp_path):
    assert call("train", "gpt-demo", "--corpus", verse, "--run", "one", *SMALL)[0] == 0
    (tmp_path / "runs/one/checkpoints/20/state/_METADATA").unlink()
    for command in ("sample", "eval", "diagnose"):
        code, _, err = call(command, "one", "--checkpoint", "last")
        assert code == 1
        assert "checkpoint last cannot be used: runs/one/checkpoints/20/state/_METADATA is missing" in err


@pytest.mark.parametrize(("error", "message"), [(MemoryError("12 TiB"), " 12 TiB"), (MemoryError(), "")])
def test_out_of_memory_is_reported(call, monkeypatch, error, message):
    def exhaust(args):
        raise error

    monkeypatch.setattr("jaxgpt.cli.train.run_recipes", exhaust)
    code, _, err = call("recipes")
    assert code == 1
    assert f"out of memory{message}: close other programs" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "jaxgpt: interrupted\n"),
        (BrokenPipeError(), 1, ""),
        (OSError(28, "No space left on device", "a.png"), 1, "jaxgpt: a.png: No space left on device\n"),
        (OSError(39, "Directory not empty", "a", None, "b"), 1, "jaxgpt: [Errno 39] Directory not empty: 'a' -> 'b'\n"),
        (CheckpointError("it is torn"), 1, "jaxgpt: it is torn\n"),
    ],
)
def test_error_of_a_command_has_its_exit_code_and_message(call, monkeypatch, error, code, message):
    def fail(args):
        raise error

    monkeypatch.setattr("jaxgpt.cli.train.run_recipes", fail)
    assert call("recipes") == (code, "", message)


def test_an_assertion_that_fails_is_not_taken_for_a_missing_device(call, monkeypatch):
    def fail(args):
        raise AssertionError("a mistake of ours")

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr("jaxgpt.cli.train.run_recipes", fail)
    with pytest.raises(AssertionError, match="a mistake of ours"):
        call("recipes")


INTERRUPT_WHILE_JAX_IS_IMPORTED = """
import gc, os, signal, sys
from jaxgpt import cli

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "jax.version":
            gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))  # gc ignores exceptions of callbacks
            gc.collect()

sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main(["sample", "none"])
"""


def test_interrupt_while_jax_is_imported():
    done = subprocess.run([sys.executable, "-c", INTERRUPT_WHILE_JAX_IS_IMPORTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "jaxgpt: interrupted\n")


def test_versions(call):
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith(f"jaxgpt {jaxgpt.__version__} (jax {jax.__version__}, jaxlib ")
    assert out.endswith(f", Python {'.'.join(map(str, sys.version_info[:3]))})\n")


@pytest.mark.parametrize("ask", ["flag before", "flag after", "variable"])
def test_traceback_is_printed_on_request(call, monkeypatch, ask):
    def fail(args):
        assert args == ["--x"]
        raise RuntimeError("INTERNAL: of a library")

    monkeypatch.setattr("jaxgpt.cli.train.run_recipes", fail)
    monkeypatch.setenv("JAXGPT_TRACEBACK", "0")
    code, _, err = call("recipes", "--x")
    assert (code, err) == (1, "jaxgpt: RuntimeError: INTERNAL: of a library (--traceback shows where)\n")
    args = ["recipes", "--x"]
    if ask == "variable":
        monkeypatch.setenv("JAXGPT_TRACEBACK", "1")
    else:
        args.insert(0 if ask == "flag before" else 1, "--traceback")
    code, _, err = call(*args)
    assert code == 1
    assert err.startswith("Traceback (most recent call last)")
    assert 'raise RuntimeError("INTERNAL: of a library")' in err
    assert err.endswith("\njaxgpt: RuntimeError: INTERNAL: of a library (--traceback shows where)\n")


def test_traceback_is_printed_for_bad_usage_too(call, monkeypatch):
    monkeypatch.setenv("JAXGPT_TRACEBACK", "0")
    code, _, err = call("train", "gpt-dmo", "--traceback")
    assert code == 2
    assert "Traceback" in err
    assert "did you mean 'gpt-demo'?" in err


@pytest.mark.parametrize(
    "command", ["sample one", "train gpt-demo --corpus TEXT --run two", "export one --out x", "serve one"]
)
def test_a_platform_without_devices_is_named(call, tiny, verse, tmp_path, monkeypatch, command):
    """As JAX_PLATFORMS=cuda without a GPU: JAX raises an AssertionError without a message."""
    from jax._src import xla_bridge

    call("prepare", verse)
    meta = json.loads(next((tmp_path / "data").glob("*/tokens.json")).read_text())
    meta.pop("seal")
    Run.create(tmp_path / "runs", "one", tiny, meta)

    def no_device(*_):
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(xla_bridge, "backends", no_device)
    monkeypatch.setattr(xla_bridge, "default_backend", no_device)
    monkeypatch.setattr(jax, "devices", no_device)
    monkeypatch.setattr(jax, "process_index", no_device)
    monkeypatch.setattr(jax, "process_count", no_device)
    monkeypatch.setattr("jaxgpt.serve.server.serve", lambda *_: None)
    code, _, err = call(*command.replace("TEXT", str(verse)).split())
    assert code == 1
    assert "JAX finds no device of JAX_PLATFORMS=cpu: unset it" in err
    assert "Traceback" not in err


def test_a_tpu_that_cannot_be_initialized_is_reported(call, monkeypatch):
    def fail(*_):
        raise RuntimeError("Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so")

    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setattr("jaxgpt.cli.train.run_recipes", fail)
    code, _, err = call("recipes")
    assert code == 1
    assert err.endswith("of JAX_PLATFORMS=tpu,cpu: unset it to use what is there, or install the plugin: pip install "
                        "'jaxgpt[tpu]'\n")  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train gpt-demo --bias True", "--bias takes no value: write --bias or --no-bias"),
        ("train gpt-demo --tie_weights=false", "--tie-weights takes no value: write --tie-weights or --no-tie-weights"),
        ("inspect gpt-demo --no-measure true", "--measure takes no value: write --measure or --no-measure"),
        ("report one --watch True", "--watch takes no value: write --watch or --no-watch"),
        ("sample one --prompt -x", "a value that begins with '-' is written with '=': --prompt=-x"),
        ("sample one --prompt '-x y'", "a value that begins with '-' is written with '=': --prompt='-x y'"),
        ("sample one --stop --", "a value that begins with '-' is written with '=': --stop=--"),
        ("prepare 1*a.txt + 1*b.txt", "a mixture is one argument, in quotes: '0.7*a.txt + 0.3*b.txt'"),
        ("diagnose one --text --help-me", "a value that begins with '-' is written with '=': --text=--help-me"),
    ],
)
def test_refused_options_come_with_a_hint(call, args, message):
    code, _, err = call(*shlex.split(args))
    assert code == 2
    assert err.endswith(f"\njaxgpt: {message}\n")


@pytest.mark.parametrize(
    "args",
    [
        "sample one --prompt --tokens 3",
        "sample one --prompt",
        "sample one --tokens x",
        "sample one --prompt + --tokens x",
        "sample one --top-k -5 --tokens x",
    ],
)
def test_no_hint_where_none_helps(call, args):
    code, _, err = call(*args.split())
    assert code == 2
    assert "jaxgpt: " not in err


@pytest.mark.parametrize(
    "args",
    [
        ["--n-embd", "65", "gpt-demo"],
        ["--n-embd=65", "gpt-demo", "--steps", "3"],
        ["--resume", "--no-resume", "--n-embd", "65", "gpt-demo"],
        ["--n-embd", "65", "--log", "wandb", "gpt-demo"],
        ["--n-embd", "65", "--debug_nans", "gpt-demo"],
    ],
)
def test_a_recipe_may_follow_the_options(args):
    name, rest = take_name(Train, args)
    assert name == "gpt-demo"
    assert "gpt-demo" not in rest
    assert len(rest) == len(args) - 1
    in_file = [arg.replace("gpt-demo", "mine.json") for arg in args]
    assert take_name(Train, in_file) == ("mine.json", rest)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --n-embd 65 gpt-demo", "try --n-embd 64"),
        ("train --run gpt-demo --n-embd 65", "try --n-embd 64"),
        ("train --n-layre 3 gpt-demo", "--n-layer"),
        ("plan --topology nowhere:2 gpt2-1.5b", "nowhere"),
        ("plan --chips 0 1 gpt2-124m", "--chips 0: expected 1 or more"),
        ("ledger --rounds 0 gpt-demo", "rounds is 0"),
        ("sweep --seeds 2 --at-once -1 gpt-demo", "--at-once is -1"),
        ("inspect --jaxpr step --n-embd 65 gpt-demo", "try --n-embd 64"),
        ("verify-resume --kills -1 gpt-demo", "kills is -1"),
        ("sweep --seeds 2", "which recipe?"),
        ("plan --chips 1 8", "which recipe?"),
        ("verify-resume --kills 3", "which recipe?"),
    ],
)
def test_every_command_takes_its_recipe_after_the_options(call, command, message):
    code, out, err = call(*command.split())
    assert code == 2
    assert message in out + err


@pytest.mark.smoke
@pytest.mark.parametrize("columns", ["1", "5"])
def test_help_in_a_narrow_terminal(columns):
    """With fewer than 6 columns, tyro would wrap the help forever, in ever more memory."""
    command = f"ulimit -v 4000000; COLUMNS={columns} PYTHONUTF8=1 exec '{sys.executable}' -m jaxgpt sample --help"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--temperature FLOAT" in done.stdout


@pytest.mark.smoke
@pytest.mark.parametrize("closed", [">&-", "<&- >&-", ">&- 2>&-"])
def test_closed_output_is_not_an_error(tmp_path, closed):
    command = f"'{sys.executable}' -m jaxgpt recipes {closed}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("args", ["recipes", "--help", "--version", "sample --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_an_error(args, unbuffered):
    with open("/dev/full", "w") as full:
        command, env = [sys.executable, "-m", "jaxgpt", *args.split()], os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=env)
    assert done.returncode == 1
    assert re.fullmatch(r"jaxgpt: .*No space left on device\n", done.stderr)


@pytest.mark.smoke
def test_installed_command_ignores_a_closed_pipe(tmp_path):
    command = os.path.join(os.path.dirname(sys.executable), "jaxgpt")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    piped = subprocess.run(
        f"'{command}' train --help | head -1", shell=True, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert piped.stdout.startswith("usage: jaxgpt train")
    assert piped.stderr == ""


def test_exit_skips_the_last_garbage_collection():
    """It would take half a second, because JAX creates many objects."""
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count())); "
    code += "from jaxgpt.cli import main; main(['recipes'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert int(done.stdout.split()[-1]) > 10_000


def test_main_exits_with_the_code_and_overrides_jax_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxgpt", "nonsense"])
    flags = {"JAX_ENABLE_X64": "0", "JAX_THREEFRY_PARTITIONABLE": "1"}
    for name in flags:
        monkeypatch.setenv(name, "7")
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert {name: os.environ[name] for name in flags} == flags, "flags of JAX must not change what a command computes"


def test_resume_accepts_the_corpus_of_the_run_as_a_relative_path(call, verse, tiny, change, tmp_path, monkeypatch):
    run, _ = start_run(change(tiny, corpus=str(verse), vocab_size=0), "one", tmp_path / "runs", tmp_path / "data")
    given = []
    monkeypatch.setattr(
        "jaxgpt.train.fit", lambda run, *args: given.append(args[2:4]) or Summary(run, 0, 1, [], 0, None, 2)
    )
    for options, debug_nans in (((), False), (("--debug-nans",), True)):
        assert call("train", "--run", "one", "--resume", "--corpus", os.path.relpath(verse), *options)[0] == 130
        assert given.pop() == (run.config, debug_nans)
    code, _, err = call("train", "--run", "one", "--resume", "--corpus", "other.txt")
    assert (code, "'other.txt' asked for" in err) == (2, True)


def test_train_watches_for_spikes_on_its_mesh(call, verse, tiny, change, tmp_path, monkeypatch):
    run, _ = start_run(change(tiny, corpus=str(verse), vocab_size=0), "one", tmp_path / "runs", tmp_path / "data")
    rooms, meshes = [], []

    def fit(run, corpus, on_event, config, debug_nans, mesh, sample):
        meshes.append(mesh.shape["data"])
        on_event(Progress(20, 20, 9.0, None, None, losses=(2.0,) * 60 + (9.0,)))
        return Summary(run, 0, 1, [], 0, None, 2)

    monkeypatch.setattr("jaxgpt.train.fit", fit)
    monkeypatch.setattr(memory, "require", lambda config, n_tokens, sizes, new: rooms.append((new, sizes.data)))
    code, out, _ = call("train", "--run", "one", "--resume", "--mesh", "data=2")
    assert (code, meshes, rooms) == (130, [2], [(False, 2)])
    assert "1 warning: see runs/one/events.jsonl" in out
    assert run.last_event("spike")["step"] == 20


def test_only_process_0_sends_metrics_to_loggers(call, verse, tiny, change, tmp_path, monkeypatch):
    start_run(change(tiny, corpus=str(verse), vocab_size=0), "one", tmp_path / "runs", tmp_path / "data")
    monkeypatch.setattr("jaxgpt.train.fit", lambda run, *args: Summary(run, 0, 1, [], 0, None, 2))
    monkeypatch.setattr(loggers, "require", lambda names: None)
    opened = []
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda run: opened.append(run) or (None, lambda: None))
    for primary in (False, True):
        monkeypatch.setattr("jaxgpt.processes.is_primary", lambda primary=primary: primary)
        assert call("train", "--run", "one", "--resume", "--log", "tensorboard")[0] == 130
        assert len(opened) == primary


def test_config_of_a_run_is_a_recipe_whose_vocabulary_follows_the_text(call, verse, tiny, change, tmp_path):
    """A vocab_size that is not the tokenizer's was chosen, as 50304 of gpt2-124m, and is kept."""
    for name, size in (("one", 0), ("padded", 300)):
        start_run(change(tiny, corpus=str(verse), vocab_size=size), name, tmp_path / "runs", tmp_path / "data")
    code, _, err = call("train", "runs/one/config.json", *SMALL)
    assert (code, "run 'one' exists in runs: --run one --resume" in err) == (2, True)
    for name, size in (("one", 256), ("padded", 300)):
        args = "--run", f"{name}-2", "--tokenizer", "byte", "--steps", 3, "--eval-every", 0, "--no-eval-start"
        code, _, err = call("train", f"runs/{name}/config.json", *args)
        assert code == 0, err
        assert Run.named(tmp_path / "runs", f"{name}-2").config.model.vocab_size == size


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", True), ("constant", False)])
def test_a_run_longer_than_its_schedule_names_its_last_learning_rate(
    call, verse, tiny, change, tmp_path, monkeypatch, schedule, expected
):
    config = change(tiny, corpus=str(verse), vocab_size=0, steps=30, decay_steps=20, schedule=schedule)
    start_run(config, "one", tmp_path / "runs", tmp_path / "data")
    monkeypatch.setattr("jaxgpt.train.fit", lambda run, *args: Summary(run, 0, 1, [], 0, None, 2))
    assert ("the learning rate stays at" in call("train", "--run", "one", "--resume")[1]) == expected


@pytest.mark.parametrize("name", ["best", "config"])
def test_a_run_is_named_after_the_file_of_its_recipe(tmp_path, name):
    """A config.json of no run too."""
    (tmp_path / f"{name}.json").write_text("{}")
    assert _from_file(str(tmp_path / f"{name}.json"), Config()) == Train(name, Config())


def test_a_command_that_fails_keeps_its_code_if_its_output_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_command", lambda argv: 2)
    monkeypatch.setattr(cli, "flush_stdout", lambda: OSError(28, "No space left on device"))
    with pytest.raises(SystemExit) as done:
        cli.main([])
    assert done.value.code == 2


@pytest.mark.parametrize(
    ("args", "expected"),
    [(["--runs-dir=~/runs"], "/home/me/runs"), (["--runs-dir=~"], "/home/me"), (["--runs_dir", "~/x"], "/home/me/x")],
)
def test_tilde_in_path_options_is_expanded(monkeypatch, args, expected):
    monkeypatch.setenv("HOME", "/home/me")
    given = parse(Sample, ["one", *args, "--prompt=~/x"], "sample")
    assert (given.runs_dir, given.prompt) == (Path(expected), "~/x")
    assert parse(Eval, ["one", *args], "eval").folders.runs_dir == Path(expected)


def test_tilde_in_names_of_recipes_exports_tokenizers_and_folders_is_expanded(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me" / "export").mkdir(parents=True)
    (tmp_path / "me" / "export" / "model.safetensors").touch()
    (tmp_path / "me" / "best.json").write_text(json.dumps(asdict(Config())))
    assert "no corpus, file or folder 'nowhere'" in call("train", "~/best.json", "--corpus", "nowhere")[2]
    assert "me/export/config.json" in call("sample", "~/export")[2]
    assert f"no tokenizer '{tmp_path}/me/none'" in call("prepare", "python-docs", "--tokenizer", "~/none")[2]
    assert f"no run 'one' in {tmp_path}/me" in call("inspect", "one", "--runs-dir=~")[2]


def test_an_interrupted_process_does_not_wait_for_its_threads(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(cli, "run_command", lambda argv: 130)
    with pytest.raises(SystemExit):
        cli.main([])
    assert ended == [130]


@pytest.mark.parametrize("saved", [True, False])
def test_the_best_step_of_a_run_is_said_to_be_lost_if_it_was_not_saved(tmp_path, saved, capsys):
    """As the random parameters before a training that diverges."""
    scores = [Evaluated(step, Evaluation(loss, 0.01, 1.0, 1.0, 9)) for step, loss in ((0, 3.0), (20, 9.0))]
    for step in (0, 20) if saved else (20,):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    _print_summary(RunConsole(), Summary(Run(tmp_path), 20, 20, scores, 1.0, None, 0))
    (best,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  best"))
    assert best.endswith("at step 0" if saved else "at step 0, which was not saved")
