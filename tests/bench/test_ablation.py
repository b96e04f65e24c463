"""The ablation changes one thing at a time, and its arithmetic is that of a table of means."""

import dataclasses
import math
from pathlib import Path

import pytest

from jaxgpt.bench import ablation
from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.prepare.build import prepare_corpus


def test_a_row_is_means_and_their_errors():
    baseline = [(2.0, 0.010), (2.2, 0.012)]
    results = [(1.9, 0.020), (2.0, 0.022)]
    row = ablation.row("muon", results, baseline)
    assert row == {"option": "muon", "loss": "1.9500 ± 0.0500", "change": "-0.1500 ± 0.0500", "ms a step": 21.0}
    assert ablation.row("(nothing)", baseline, baseline)["change"] == ""
    assert math.isnan(ablation.standard_error([1.0]))


@pytest.mark.parametrize(("base", "changes"), [(ablation.PLAIN, ablation.ADDED), (ablation.ALL, ablation.REMOVED)])
def test_every_change_is_a_change(base, changes):
    model, optimizer = base
    for name, (more, others) in changes.items():
        assert {**model, **more} != model or {**optimizer, **others} != optimizer, name
        dataclasses.replace(ModelConfig(), **{**model, **more})
        dataclasses.replace(OptimizerConfig(), **{**optimizer, **others})


def test_every_option_of_the_block_is_in_it():
    plain, options = ModelConfig(), {name for model, _ in ablation.ADDED.values() for name in model}
    sizes = {"kind", "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "tie_weights"}
    assert options == set(vars(plain)) - sizes - {"init_scale", "gelu", "remat", "scan_layers"}


def test_a_short_one_learns(tmp_path):
    (tmp_path / "verse.txt").write_text("the cat sat on the mat\nthat cat has a hat\n" * 60)
    corpus = prepare_corpus(str(tmp_path / "verse.txt"), data_dir=Path(tmp_path / "data")).corpus
    (short, _), (long, seconds) = (ablation.one(corpus, ablation.ALL, 1, steps, 1) for steps in (3, 30))
    assert long < short - 0.3
    assert 0 < seconds < 60
