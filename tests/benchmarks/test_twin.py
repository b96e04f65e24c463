"""The PyTorch twin: the same model, optimizer and schedule as jaxgpt, so that benchmarks compare the same work."""

import dataclasses
import json
import time
from typing import get_args

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.data import Batch
from jaxgpt.evaluation import evaluate
from jaxgpt.huggingface import gpt2
from jaxgpt.optimizer import learning_rate, make_optimizer
from jaxgpt.recipes import recipe
from jaxgpt.step import TrainState, train_step
from jaxgpt.tokenizer import CharTokenizer

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")

from scripts.benchmarks import shapes, twin  # noqa: E402 (after the skip)


@pytest.fixture
def small(tiny, change):
    """Without dropout, because JAX and PyTorch draw different random numbers."""
    return change(tiny, dropout=0.0, learning_rate=1e-2, steps=8, decay_steps=8, weight_decay=0.3, grad_clip=0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_steps_agree(small, change, accumulate):
    """Equal weights and batches give equal losses and weights."""
    small = change(small, accumulate=accumulate)
    tokens = np.random.default_rng(0).integers(13, size=500).astype(np.uint16)
    training = twin.Training(small, tokens)
    params = gpt2.to_params(small.model, twin.gpt2_tensors(training.twin))
    state = TrainState(np.int32(0), params, make_optimizer(small).init(params))
    for _ in range(4):
        batch = Batch(*(x.numpy().astype(np.int32) for x in training.batch))
        state, metrics = jax.jit(train_step, static_argnums=0)(small, state, batch)
        assert training.step().item() == pytest.approx(float(metrics.loss), abs=2e-5)
    after = gpt2.to_params(small.model, twin.gpt2_tensors(training.twin))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), after, state.params)


def test_schedules_agree(tiny, change):
    config = change(tiny, steps=50, decay_steps=50, warmup_steps=7, learning_rate=3e-3, min_learning_rate=1e-4)
    ours = [float(learning_rate(config)(step)) for step in range(60)]
    assert [twin.learning_rate(config, step) for step in range(60)] == pytest.approx(ours, rel=1e-5)


def test_the_cpu_recipe_has_the_settings_of_nanogpt():
    """nanoGPT's README: train.py config/train_shakespeare_char.py --device=cpu --compile=False --block_size=64 ..."""
    config = recipe("shakespeare-cpu").config
    model, opt, train = config.model, config.optimizer, config.train
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (4, 4, 128, 64)
    assert (model.dropout, model.bias, model.tie_weights, model.gelu) == (0.0, False, True, "exact")
    assert (train.batch_size, train.steps, train.sampling, train.accumulate) == (12, 2000, "random", 1)
    assert (opt.learning_rate, opt.final_learning_rate, opt.warmup_steps) == (1e-3, 1e-4, 100)
    assert (opt.beta1, opt.beta2, opt.weight_decay, opt.grad_clip) == (0.9, 0.99, 0.1, 1.0)
    assert opt.decay_steps in (0, 2000)


def test_initial_weights_have_the_same_distribution():
    config = ModelConfig(vocab_size=65, n_layer=3, bias=True)
    torch.manual_seed(0)
    ours = jax.device_get(model.init_params(config, jax.random.key(0)))
    theirs = twin.gpt2_tensors(twin.Twin(config))
    for name, mine in gpt2.to_tensors(config, ours).items():
        assert theirs[name].std() == pytest.approx(mine.std(), rel=0.05, abs=1e-9), name
        assert theirs[name].mean() == pytest.approx(mine.mean(), abs=2e-3), name


def test_the_program_trains_saves_and_scores(verse, tmp_path):
    """Its validation loss equals that of jaxgpt for the weights that it saved."""
    from safetensors.numpy import load_file

    out, began = tmp_path / "twin.json", time.monotonic() - 100
    twin.main(str(verse), out, steps=2, seed=3, began=began)
    done, text = json.loads(out.read_text()), verse.read_text()
    assert done["seed"] == 3
    assert 100 < done["seconds"] < 160, "since it began"
    tokenizer = CharTokenizer.train(text)
    config = dataclasses.replace(recipe("shakespeare-cpu").config.model, vocab_size=tokenizer.vocab_size)
    tokens = tokenizer.encode(text)
    val = tokens[int(len(tokens) * 0.9) :]
    assert len(val) % config.block_size != 1, "the last window overlaps"
    params = gpt2.to_params(config, load_file(out.with_suffix(".safetensors")))
    assert done["loss"] == pytest.approx(evaluate(config, params, val, tokenizer).loss, abs=1e-5)


def test_top_1_sampling_is_greedy(small):
    torch.manual_seed(0)
    model = twin.Twin(small.model).eval()
    idx = torch.zeros((2, 1), dtype=torch.long)
    written = twin.sample(model, idx, 12, top_k=1)  # longer than block_size
    for t in range(12):
        window = written[:, : t + 1][:, -model.block_size :].clone()  # a normal tensor, not one of inference mode
        assert torch.equal(written[:, t + 1], model(window)[:, -1].argmax(-1))
    several = twin.sample(model, idx, 12, top_k=5)
    assert not torch.equal(written, several)


def test_dropout_is_off_in_eval_mode(tiny):
    torch.manual_seed(0)
    model, idx = twin.Twin(dataclasses.replace(tiny.model, dropout=0.5)), torch.zeros((2, 8), dtype=torch.long)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_bfloat16_equals_float32_up_to_rounding(small):
    tokens = np.random.default_rng(0).integers(13, size=500).astype(np.uint16)
    exact, rounded = (twin.Training(small, tokens, way).step() for way in ("float32", "bfloat16"))
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), abs=2e-2)


def test_dropout_is_in_every_place_of_nanogpt(tiny, monkeypatch):
    """In the embedding, in the attention weights, and twice in each block; so that both sides do the same work."""
    attend, drawn, places = twin.F.scaled_dot_product_attention, [], []

    def attention(q, k, v, is_causal, dropout_p):
        drawn.append(dropout_p)
        return attend(q, k, v, is_causal=is_causal, dropout_p=dropout_p)

    monkeypatch.setattr(twin.F, "scaled_dot_product_attention", attention)
    model = twin.Twin(dataclasses.replace(tiny.model, dropout=0.5))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda used, *_: places.append(used.p))
    model(torch.zeros((2, 8), dtype=torch.long))
    assert drawn == [0.5] * tiny.model.n_layer
    assert places == [0.5] * (1 + 2 * tiny.model.n_layer)


def test_the_model_is_compiled_and_uses_tf32_only_where_the_way_says_so(small, monkeypatch):
    tokens, compiled = np.zeros(100, np.uint16), []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    found = {}
    for name in get_args(shapes.Way):
        twin.Training(small, tokens, name)
        found[name] = (len(compiled), torch.get_float32_matmul_precision())
        compiled.clear()
    torch.set_float32_matmul_precision("highest")
    for name, (n, precision) in found.items():
        assert n == name.endswith("+compile")
        assert precision == ("highest" if name.startswith("float32") else "high")


def test_sampling_computes_one_position_in_the_precision_of_its_way(small):
    """Only the logits of the last token are computed; a temperature near zero chooses the largest."""
    model, found, idx = twin.Twin(small.model).eval(), [], torch.zeros((2, 1), dtype=torch.long)
    model.register_forward_hook(lambda module, given, out: found.append((out.shape[1], out.dtype)))
    greedy, cold = (twin.sample(model, idx, 4, **draw) for draw in ({"top_k": 1}, {"temperature": 1e-6, "top_k": 13}))
    assert torch.equal(greedy, cold)
    twin.sample(model, idx, 1, way="bfloat16")
    assert found == [(1, torch.float32)] * 8 + [(1, torch.bfloat16)]


def test_the_program_trains_with_the_settings_that_it_is_given(verse, tmp_path, monkeypatch):
    class Given(Exception):
        pass

    def training(*given):
        raise Given(*given)

    monkeypatch.setattr(twin, "Training", training)
    with pytest.raises(Given) as found:
        twin.main(str(verse), tmp_path / "twin.json", "shakespeare-gpu", 7, 3, "bfloat16+compile", "cuda")
    config, tokens, *how = found.value.args
    assert how == ["bfloat16+compile", "cuda"]
    assert (config.train.steps, config.train.seed) == (7, 3)
    assert config.model.n_layer == recipe("shakespeare-gpu").config.model.n_layer
    assert len(tokens) == int(0.9 * len(verse.read_text())), "the training split"
