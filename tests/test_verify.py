"""The proof must see what it is to see: a changed bit, a line lost, a line twice."""

import dataclasses
import re
import shutil

import jax.numpy as jnp
import pytest

from jaxgpt.recipes import RECIPES
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.loop import fit
from jaxgpt.training.placement import ONE_DEVICE, like
from jaxgpt.training.run import Run
from jaxgpt.training.start import start
from jaxgpt.verify import compare, scaled_down, verify_resume


@pytest.fixture
def config(tiny, change, verse):
    return change(tiny, corpus=str(verse), vocab_size=0, keep=9)


@pytest.fixture
def pair(config, tmp_path):
    run, corpus = start(config, "a", tmp_path / "runs", tmp_path / "data")
    fit(run, corpus)
    shutil.copytree(run.path, tmp_path / "runs" / "b")
    return run, Run(tmp_path / "runs" / "b")


def test_equal_runs_are_found_equal(pair):
    verdict = compare(*pair)
    assert verdict.difference is None
    assert verdict.lines == 23
    assert verdict.checkpoints == 2


def test_one_bit_of_one_array_is_found_and_named(pair):
    a, b = pair
    with Checkpoints(b.checkpoints, keep=9) as checkpoints:
        state, manifest = checkpoints.restore(10, like(b.config, ONE_DEVICE)), checkpoints.manifest(10)
        shutil.rmtree(b.checkpoints / "10")
        bias = state.params["h_0"]["attn"]["c_proj"]["bias"]
        state.params["h_0"]["attn"]["c_proj"]["bias"] = bias.at[3].set(jnp.nextafter(bias[3], 9.0))
        checkpoints.save(state, manifest.val_loss, manifest.about)
    difference = compare(a, b).difference
    assert difference.startswith("step 10, params/h_0/attn/c_proj/bias[3]: ")
    assert difference.endswith("1 of its 16 numbers differ")


@pytest.mark.parametrize("harm", ["lost", "twice", "torn", "other"])
def test_a_line_that_differs_is_found(pair, harm):
    a, b = pair
    lines = b.metrics_file.read_bytes().splitlines(keepends=True)
    match harm:
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
    number = 23 if harm == "torn" else 8 if harm != "twice" else 9
    assert compare(a, b).difference.startswith(f"metrics.jsonl, line {number}: ")


def test_equal_runs_that_both_lost_a_step_are_not_accepted(pair):
    for run in pair:
        lines = run.metrics_file.read_bytes().splitlines(keepends=True)
        run.metrics_file.write_bytes(b"".join(lines[:7] + lines[8:]))
    assert compare(*pair).difference == "metrics.jsonl does not hold each step from 1 to 20 once"
    for run in pair:
        shutil.rmtree(run.checkpoints / "20")
    shutil.rmtree(pair[0].checkpoints / "10")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_verified_in_part(name):
    config = RECIPES[name].config
    part = scaled_down(config, 100, 50)
    assert part.optimizer.decay_steps == config.train.steps
    assert part.model == config.model


@pytest.mark.smoke
def test_a_recipe_killed_and_resumed(jaxgpt, verse):
    small = {"n-layer": 1, "n-embd": 16, "n-head": 2, "block-size": 8, "scan-steps": 20, "eval-every": 20, "steps": 300}
    flags = [word for name, value in small.items() for word in (f"--{name}", value)]
    done = jaxgpt("verify-resume", "gpt-demo", "--corpus", verse, *flags, "--kills", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"IDENTICAL after 3 kills \(\d in a save\): 316 lines of metrics", done.stdout), done.stdout
    assert done.stdout.count("killed at step") == 3


def test_a_run_that_fails_by_itself_is_told(config, tmp_path):
    broken = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e38))
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1 by itself.*steps in a row were left out"):
        verify_resume(broken, tmp_path / "runs", tmp_path / "data", 1, 0, print)
