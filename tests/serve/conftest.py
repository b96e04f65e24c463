"""Runs to serve."""

import contextlib
import io

import jax
import pytest

from jaxgpt import cli, nn
from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.training.start import start

SMALL = "--block-size 32 --n-layer 1 --n-head 4 --n-embd 32 --batch-size 16 --scan-steps 100 --warmup-steps 20 "
SMALL += "--eval-every 0 --no-eval-start --eval-batches 0 --learning-rate 1e-2 --steps 300"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with two runs on a small text: a GPT that has learnt it, and a bigram that has not begun."""
    jax.config.update("jax_disable_most_optimizations", True)
    folder = tmp_path_factory.mktemp("served")
    text, runs, data = (folder / name for name in ("text.txt", "runs", "data"))
    text.write_text("the cat sat on the mat\nthat cat has a hat\n" * 40)
    words = ["train", "gpt-demo", "--corpus", text, "--run", "cat", *SMALL.split(), "--runs-dir", runs]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.run_verb([str(word) for word in [*words, "--data-dir", data]]) == 0
    model = ModelConfig("bigram", vocab_size=11, block_size=32)
    config = Config(DataConfig(corpus=str(text)), model, train=TrainConfig(batch_size=1))
    start(config, "pairs", runs, data, nn.init_params(model, jax.random.key(0)))
    return runs
