"""Files of version 0.1 still load: tests/goldens/version-0.1 holds a run, its corpus and its export.

Commit f4ae66b wrote them in an empty folder. verse.txt was "the cat sat on the mat\\nthat cat has a hat\\n" 20 times:

jaxgpt train gpt-demo --corpus verse.txt --n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 4 --steps 10 \\
    --scan-steps 5 --eval-every 5 --eval-batches 2 --warmup-steps 2 --decay-steps 20 --remat products --dropout 0.1 \\
    --keep 1 --run small
jaxgpt export small --out exported
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.cli.runs import resume
from jaxgpt.config import replaced
from jaxgpt.evaluation import evaluate
from jaxgpt.huggingface.folders import load_export
from jaxgpt.run import Run
from jaxgpt.start import load_model
from jaxgpt.train import fit

SAVED = Path(__file__).parent / "goldens" / "version-0.1"


@pytest.fixture
def saved(tmp_path):
    """A copy, because a resume writes to the run."""
    shutil.copytree(SAVED, tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_run_resumes(saved):
    run = Run.open(saved / "runs", "small")
    before = run.metrics_file.read_bytes()
    config = replaced(run.config, steps=15)
    corpus = resume(config, run, saved / "data")
    assert config.model.remat == "matmuls", "version 0.1 called it products"
    assert fit(run, corpus, config=config).step == 15
    after = run.metrics_file.read_bytes()
    assert after.startswith(before)
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 15]


def test_saved_run_has_the_same_validation_loss(saved):
    run = Run.open(saved / "runs", "small")
    config, params, tokenizer = load_model(run, "last")
    corpus = resume(run.config, run, saved / "data")
    _, val_tokens = corpus.split(run.config.data)
    assert evaluate(config, params, val_tokens, tokenizer).loss == pytest.approx(
        run.metrics()[-1]["val_loss"], abs=1e-5
    )


def test_saved_export_has_the_logits_of_its_run(saved):
    run = Run.open(saved / "runs", "small")
    config, params, tokenizer = load_model(run, "best")
    exported_config, exported_params, exported_tokenizer = load_export(saved / "exported")
    assert exported_tokenizer == tokenizer
    idx = jax.numpy.arange(8)[None]
    expected = model.forward(config, params, idx)
    np.testing.assert_allclose(model.forward(exported_config, exported_params, idx), expected, atol=1e-5)
