"""Runs to serve, and the application that serves them."""

import contextlib
import dataclasses
import io

import jax
import pytest

from jaxgpt import cli, model
from jaxgpt.cli.runs import start_run
from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.serve.app import application
from jaxgpt.serve.library import Library
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.scheduler import Scheduler
from jaxgpt.serve.writer import Writer
from jaxgpt.start import load_model

SMALL = "--block-size 32 --n-layer 1 --n-head 4 --n-embd 32 --batch-size 16 --scan-steps 100 --warmup-steps 20 "
SMALL += "--eval-every 0 --no-eval-start --eval-batches 0 --learning-rate 1e-2 --steps 300"


LIMITS = Limits(max_prompt=50, max_tokens=10**6, places=2, max_requests=3)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of two runs on a small text: a trained GPT and an untrained bigram."""
    folder = tmp_path_factory.mktemp("served")
    text, runs, data = (folder / name for name in ("text.txt", "runs", "data"))
    text.write_text("the cat sat on the mat\nthat cat has a hat\n" * 40)
    command = ["train", "gpt-demo", "--corpus", text, "--run", "cat", *SMALL.split(), "--runs-dir", runs]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.run_command([str(word) for word in [*command, "--data-dir", data]]) == 0
    bigram = ModelConfig("bigram", vocab_size=11, block_size=32)
    config = Config(DataConfig(corpus=str(text)), bigram, train=TrainConfig(batch_size=1))
    start_run(config, "pairs", runs, data, model.init_params(bigram, jax.random.key(0)))
    return runs


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Two untrained runs, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "text.txt").write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    one = ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16)
    for name, shape in (("one", one), ("pairs", dataclasses.replace(one, kind="bigram"))):
        config = Config(DataConfig(corpus=str(folder / "text.txt")), shape, train=TrainConfig(batch_size=1))
        params = jax.tree.map(lambda x: 8 * x, jax.jit(model.init_params, static_argnums=0)(shape, jax.random.key(0)))
        start_run(config, name, folder / "runs", folder / "data", params)
    (folder / "runs/broken").mkdir()
    (folder / "runs/broken/config.json").write_text("{}")
    return Library.at(str(folder / "runs"), folder)


@pytest.fixture(scope="module")
def scheduler(library):
    def load(run):
        config, params, tokenizer = load_model(run)
        return Writer(config, params, tokenizer.vocab_size, LIMITS.places)

    scheduler = Scheduler(load, LIMITS)
    yield scheduler
    scheduler.stop()
    scheduler.join()


@pytest.fixture(scope="module")
def app(library, scheduler):
    return application(library, scheduler)
