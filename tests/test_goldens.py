"""The GPT matches numbers that PyTorch computed: logits, loss, every gradient, and 20 AdamW steps with clipping."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.data import Batch
from jaxgpt.huggingface import gpt2
from jaxgpt.loss import cross_entropy
from jaxgpt.optimizer import make_optimizer
from jaxgpt.step import TrainState, loss_and_grads, train_step

GOLDENS = Path(__file__).parent / "goldens"
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # PyTorch's Linear stores weights as (out, in)


@pytest.fixture(scope="module", params=["gpt_bias", "gpt_nobias"])
def golden(request):
    """(config, arrays of PyTorch, params): `params(prefix)` converts the arrays of that prefix to our parameters."""
    settings = json.loads((GOLDENS / f"{request.param}.json").read_text())
    arrays = dict(np.load(GOLDENS / f"{request.param}.npz"))
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    model = ModelConfig(**{name: settings[name] for name in names})
    adamw = settings["optimizer"]
    config = Config(
        model=model,
        optimizer=OptimizerConfig(
            learning_rate=adamw["lr"],
            schedule="constant",
            warmup_steps=0,
            beta1=adamw["betas"][0],
            beta2=adamw["betas"][1],
            eps=adamw["eps"],
            weight_decay=adamw["weight_decay"],
            grad_clip=adamw["clip_global_norm"],
        ),
        train=TrainConfig(batch_size=settings["B"], steps=settings["steps"]),
    )

    def params(prefix):
        theirs = {
            name.removeprefix(f"{prefix}/transformer."): x.T if name.endswith(LINEAR) else x
            for name, x in arrays.items()
            if name.startswith(f"{prefix}/")
        }
        return gpt2.to_params(model, theirs)

    return config, arrays, params


def batch(arrays, i):
    return Batch(jnp.asarray(arrays["idx"][i], jnp.int32), jnp.asarray(arrays["targets"][i], jnp.int32))


def assert_close(ours, theirs, relative, name=""):
    """Compare within `relative` times the largest entry of `theirs`."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * float(np.abs(theirs).max()), err_msg=name)


def assert_params_close(config, ours, theirs, relative):
    """Compare tensor by tensor in GPT-2's layout, in which queries, keys and values share one bias. The gradient of the
    keys' bias alone is only rounding error: a constant added to all scores of a query changes no softmax."""
    ours, theirs = (gpt2.to_tensors(config, jax.device_get(params)) for params in (ours, theirs))
    for name in theirs:
        if config.bias or not name.endswith(".bias"):
            assert_close(ours[name], theirs[name], relative, name)


@pytest.mark.smoke
def test_logits_and_loss_match(golden):
    config, arrays, params = golden
    inputs, targets = batch(arrays, 0)
    logits = jax.jit(model.forward, static_argnums=0)(config.model, params("param"), inputs)
    assert_close(logits, arrays["logits"], 1e-5)
    np.testing.assert_allclose(cross_entropy(logits, targets), arrays["loss"], rtol=1e-5)


@pytest.mark.smoke
def test_every_gradient_matches(golden):
    config, arrays, params = golden
    _, grads = jax.jit(loss_and_grads, static_argnums=0)(config, params("param"), batch(arrays, 0), None)
    assert_params_close(config.model, grads, params("grad"), 1e-5)


@pytest.mark.smoke
def test_twenty_steps_of_adamw_match(golden):
    config, arrays, params = golden
    start = params("param")
    state = TrainState(jnp.int32(0), start, make_optimizer(config).init(start))
    step, losses, norms = jax.jit(train_step, static_argnums=0), [], []
    for i in range(config.train.steps):
        state, metrics = step(config, state, batch(arrays, i))
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    np.testing.assert_allclose(losses, arrays["adamw_losses"], rtol=1e-4)
    np.testing.assert_allclose(norms, arrays["grad_norms"], rtol=1e-3)
    assert_params_close(config.model, state.params, params("after"), 1e-3)
