"""verify-resume finds a changed bit, a lost line and a repeated line."""

import contextlib
import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.cli import run_command
from jaxgpt.cli.runs import resume, start_run
from jaxgpt.config import check, replaced
from jaxgpt.metrics_log import Evaluated, Progress
from jaxgpt.recipes import RECIPES
from jaxgpt.run import Run
from jaxgpt.sharding import one_device
from jaxgpt.signals import SIGNALS
from jaxgpt.step import abstract_state
from jaxgpt.train import fit
from jaxgpt.verify import resume as verify
from jaxgpt.verify.resume import Verdict, compare, counts, kill_steps, scaled_down, verify_resume


@pytest.fixture(scope="module")
def finished(tiny_config, verse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config = replaced(tiny_config, corpus=str(verse), vocab_size=0, eval_batches=0, keep=9)
    run, corpus = start_run(config, "a", folder / "runs", folder / "data")
    fit(run, corpus)
    return run


@pytest.fixture
def pair(finished, tmp_path):
    """Two copies of a finished run."""
    return tuple(Run(shutil.copytree(finished.path, tmp_path / "runs" / name)) for name in ("a", "b"))


def test_equal_runs_compare_equal(pair):
    verdict = compare(*pair)
    assert verdict.difference is None
    assert verdict.lines == 23
    assert verdict.checkpoints == 2
    assert verdict.arrays == len(jax.tree.leaves(abstract_state(pair[0].config, one_device())))


def save_changed(run, change):
    """Save `change(state)` as the state of step 10."""
    with Checkpoints(run.checkpoints, keep=9) as checkpoints:
        state, manifest = checkpoints.restore(10, abstract_state(run.config, one_device())), checkpoints.manifest(10)
        shutil.rmtree(run.checkpoints / "10")
        checkpoints.save(change(state), manifest.about)


def with_bias(state, change):
    """`state` with one changed number."""
    projection = state.params["h_0"]["attn"]["c_proj"]
    projection["bias"] = projection["bias"].at[3].set(change(projection["bias"][3]))
    return state


def test_another_moment_of_the_optimizer_is_found(pair):
    a, b = pair
    save_changed(b, lambda state: dataclasses.replace(state, opt_state=jax.tree.map(lambda x: x + 1, state.opt_state)))
    assert compare(a, b).difference.startswith("step 10, opt_state/")


def test_minus_zero_is_not_zero(pair):
    for run, zero in zip(pair, (0.0, -0.0), strict=True):
        save_changed(run, lambda state, zero=zero: with_bias(state, lambda x: zero))
    assert compare(*pair).difference == (
        "step 10, params/h_0/attn/c_proj/bias[3]: 0.0 in a, -0.0 in b; 1 of its 16 numbers differ"
    )


def test_one_bit_of_one_array_is_found_and_named(pair):
    a, b = pair
    save_changed(b, lambda state: with_bias(state, lambda x: jnp.nextafter(x, 9.0)))
    difference = compare(a, b).difference
    assert difference.startswith("step 10, params/h_0/attn/c_proj/bias[3]: ")
    assert difference.endswith("1 of its 16 numbers differ")


@pytest.mark.parametrize("damage", ["lost", "twice", "torn", "other"])
def test_different_line_is_found(pair, damage):
    a, b = pair
    lines = b.metrics_file.read_bytes().splitlines(keepends=True)
    match damage:
        case "lost":
            del lines[7]
        case "twice":
            lines.insert(7, lines[7])
        case "torn":
            lines[-1] = lines[-1][:-9]
        case "other":
            lines[7] = lines[7].replace(b"loss", b"lost")
    assert lines != b.metrics_file.read_bytes().splitlines(keepends=True)
    b.metrics_file.write_bytes(b"".join(lines))
    number = 23 if damage == "torn" else 8 if damage != "twice" else 9
    assert compare(a, b).difference.startswith(f"metrics.jsonl, line {number}: ")


def test_two_runs_that_lack_the_same_step_are_not_accepted(pair):
    for run in pair:
        lines = run.metrics_file.read_bytes().splitlines(keepends=True)
        run.metrics_file.write_bytes(b"".join(lines[:7] + lines[8:]))
    assert compare(*pair).difference == "metrics.jsonl does not hold each step from 1 to 20 once"


@pytest.mark.parametrize("n", [1, 2])
def test_last_step_must_be_saved_in_both_runs(pair, n):
    for run in pair[:n]:
        shutil.rmtree(run.checkpoints / "20")
    assert compare(*pair).difference == "step 20 is not saved in both runs"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_scales_down_to_a_valid_config(name):
    config = RECIPES[name].config
    small = check(scaled_down(config))
    assert small.optimizer.decay_steps == config.train.steps
    assert small.model == config.model
    assert small.train.scan_steps < small.train.eval_every < small.train.steps <= config.train.steps


@pytest.mark.parametrize(
    ("steps", "scan_steps", "eval_every", "expected"),
    [(30, 5, 10, range(11, 26)), (10, 3, 6, range(7, 10)), (10, 3, 9, range(10, 11)), (10, 5, 5, range(6, 11))],
)
def test_kills_are_not_in_the_last_scan_if_that_is_possible(tiny, change, steps, scan_steps, eval_every, expected):
    assert kill_steps(change(tiny, steps=steps, scan_steps=scan_steps, eval_every=eval_every)) == expected


@pytest.mark.slow
@pytest.mark.smoke
def test_killed_and_resumed_recipe_is_identical(verse, tmp_path, monkeypatch, capsys, optimized_subprocesses):
    monkeypatch.chdir(tmp_path)
    small = {"n-layer": 1, "n-embd": 16, "n-head": 2, "block-size": 8, "scan-steps": 20, "eval-every": 60, "steps": 300}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    code = run_command(["verify-resume", "gpt-demo", "--corpus", str(verse), *flags, "--kills", "2"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "IDENTICAL after 2 kills: 306 lines of metrics" in out
    assert out.count("killed at step") == 2 + out.count("does not count")


def test_two_runs_that_differ_fail_the_command_and_are_kept(monkeypatch, tmp_path, capsys):
    def differ(config, folder, data_dir, kills, seed, report):
        (folder / f"seed {seed}").touch()
        return Verdict(23, 2, 9, "a line", kills)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "verify_resume", differ)
    assert run_command(["verify-resume", "gpt-demo", "--kill-seed", "7"]) == 1
    (folder,) = tmp_path.iterdir()
    assert capsys.readouterr().out == f"DIFFERENT after 5 kills: a line\nthe two runs are in {folder}\n"
    assert (folder / "seed 7").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_removes_the_temporary_folder(monkeypatch, tmp_path, number):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "verify_resume", lambda *args: os.kill(os.getpid(), number))
    before = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(["verify-resume", "gpt-demo"])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []


class Stopped(Exception):
    """Raised in place of a SIGKILL."""


@pytest.fixture
def train_until(monkeypatch, tmp_path):
    """train_until(STOP, ...) replaces the training processes. Each then trains in this process, until STOP(event) is
    true, or to the end if STOP is None."""

    def install(*stops):
        remaining = iter(stops)

        @contextlib.contextmanager
        def train(run, data_dir):
            yield Process(run, data_dir, next(remaining))

        monkeypatch.setattr(verify, "train", train)

    class Process:
        returncode = None

        def __init__(self, run, data_dir, stop):
            self.run, self.data_dir, self.stop = run, data_dir, stop

        def poll(self):
            if self.returncode is None:
                self.returncode = self.run_fit()
            return None if self.returncode else 0

        def run_fit(self):
            def watch(event):
                if self.stop and self.stop(event):
                    raise Stopped

            try:
                fit(self.run, resume(self.run.config, self.run, self.data_dir), watch)
            except Stopped:
                return -9
            return 0

        def kill(self):
            pass

        wait = poll

    return install


def after_the_save(event):
    return isinstance(event, Evaluated) and event.step == 20


def between_saves(event):
    return isinstance(event, Progress) and event.step == 25


FLAGS = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 4 --steps 30 --scan-steps 5 --eval-every 10"
FLAGS += " --eval-batches 0 --kills 1 --kill-seed 1"  # this seed draws step 13


@pytest.mark.parametrize(
    ("stops", "code", "message"),
    [
        ([None, after_the_save, None, None], 1, "NOT SHOWN: only 0 of 1 kills"),
        ([None, after_the_save, between_saves, None], 0, "IDENTICAL after 1 kill: "),
    ],
)
def test_kill_does_not_count_if_no_step_is_computed_again(
    train_until, verse, tmp_path, monkeypatch, capsys, stops, code, message
):
    monkeypatch.chdir(tmp_path)
    train_until(*stops)
    assert run_command(["verify-resume", "gpt-demo", "--corpus", str(verse), *FLAGS.split()]) == code
    out = capsys.readouterr().out
    assert message in out
    assert "killed at step 20; back to step 20: no step is computed again" in out
    assert ("killed at step 25; back to step 20\n" in out) == (between_saves in stops)


def test_kill_counts_if_the_next_process_computes_steps_again():
    assert counts(30, 20)
    assert not counts(20, 20)
    assert not counts(15, 0), "nothing was resumed"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kills", "0"], "kills is 0, expected 1 or more"),
        (["--eval-every", "0"], "eval_every is 0, expected 1 or more, and fewer than --steps (300)"),
        (["--eval-every", "300"], "eval_every is 300, expected 1 or more, and fewer than --steps (300)"),
        (["--steps", "1"], "fewer than --steps (1): without an earlier checkpoint, a killed run starts again"),
        (["--steps", "50"], "give more --steps, or smaller --scan-steps and --eval-every"),
    ],
)
def test_options_that_would_test_nothing_are_refused(flags, message, verse, capsys):
    assert run_command(["verify-resume", "gpt-demo", "--corpus", str(verse), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def bigram_config(tiny, change, verse):
    """A config that compiles quickly."""
    return change(tiny, corpus=str(verse), vocab_size=0, kind="bigram")


def test_a_training_process_that_fails_is_reported(bigram_config, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    with pytest.raises(RuntimeError, match=r"(?s)failed with exit code 1.*nowhere"):
        verify_resume(bigram_config, tmp_path / "runs", tmp_path / "data", 1, 0, print)


def test_training_process_killed_from_elsewhere_is_reported(bigram_config, tmp_path):
    """As by a system that is out of memory. Otherwise the incomplete run would be compared."""
    run, _ = start_run(bigram_config, "one", tmp_path / "runs", tmp_path / "data")

    def killed():
        with verify.train(run, tmp_path / "data") as process:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()

    with pytest.raises(RuntimeError, match="failed with exit code -9"):
        killed()
