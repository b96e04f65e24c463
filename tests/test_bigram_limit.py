"""The trained bigram against counted pairs: two independent ways to the same loss."""

import dataclasses

import numpy as np
import pytest

from jaxgpt.cli.runs import start_run
from jaxgpt.evaluation import evaluate
from jaxgpt.recipes import recipe
from jaxgpt.start import load_checkpoint
from jaxgpt.train import fit


def conditional_entropy(tokens, V):
    """H(next | current) in nats, by counting pairs: the lowest loss that any bigram table can have on `tokens`."""
    counts = np.zeros((V, V))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    conditional = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return -(counts[counts > 0] * np.log(conditional[counts > 0])).sum() / counts.sum()


@pytest.mark.optimized
@pytest.mark.parametrize("corpus", ["python-docs", "shakespeare"])
def test_bigram_recipe_reaches_the_conditional_entropy_of_its_training_split(corpus, tmp_path, request):
    if corpus == "shakespeare":
        request.getfixturevalue("shakespeare")
    config = recipe("bigram").config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=corpus))
    run, text = start_run(config, "bigram", tmp_path / "runs", tmp_path / "data")
    fit(run, text)
    train, _ = text.split(config.data)
    limit = conditional_entropy(train, text.tokenizer.vocab_size)
    _, params = load_checkpoint(run, "last")
    loss = evaluate(run.config.model, params, train, text.tokenizer).loss
    print(f"{corpus}: trained {loss:.4f}, counted {limit:.4f}")
    assert limit <= loss + 1e-4, "no bigram table is better than the counts"
    assert loss < limit + 0.01
