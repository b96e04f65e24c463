"""The model matches a PyTorch twin for random configurations: logits, loss and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import model
from jaxgpt.config import Config, ModelConfig
from jaxgpt.data import Batch
from jaxgpt.huggingface import gpt2
from jaxgpt.step import loss_and_grads

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")

from scripts.benchmarks.twin import Twin, gpt2_tensors  # noqa: E402 (after the skip)

CONFIGS = st.builds(
    lambda head_size, **kwargs: ModelConfig(n_embd=head_size * kwargs["n_head"], **kwargs),
    head_size=st.integers(4, 12),
    vocab_size=st.integers(2, 40),
    block_size=st.integers(1, 20),
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 4),
    bias=st.booleans(),
    tie_weights=st.booleans(),
    gelu=st.sampled_from(["exact", "tanh"]),
)


@partial(jax.jit, static_argnums=0)
def logits_loss_and_grads(config, params, batch):
    return model.forward(config, params, batch.inputs), *loss_and_grads(Config(model=config), params, batch, None)


@settings(max_examples=5)
@given(CONFIGS, st.integers(1, 3), st.integers(0, 100), st.data())
def test_model_matches_its_pytorch_twin(config, B, seed, data):
    torch.manual_seed(seed)
    T = data.draw(st.integers(1, config.block_size))
    twin = Twin(config)
    with torch.no_grad():  # away from the initial biases of zero and scales of one, which would hide errors
        for p in twin.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    idx, targets = torch.randint(config.vocab_size, (2, B, T))
    logits = twin(idx)
    loss = torch.nn.functional.cross_entropy(logits.reshape(B * T, -1), targets.reshape(B * T))
    loss.backward()

    params = gpt2.to_params(config, gpt2_tensors(twin))
    batch = Batch(jnp.asarray(idx.numpy(), jnp.int32), jnp.asarray(targets.numpy(), jnp.int32))
    our_logits, our_loss, grads = logits_loss_and_grads(config, params, batch)
    assert_close(our_logits, logits.detach().numpy())
    assert_close(our_loss, loss.detach().numpy())
    grads = gpt2.to_tensors(config, jax.device_get(grads))
    for name, theirs in gpt2_tensors(twin, lambda p: p.grad).items():
        assert_close(grads[name], theirs, name)


def assert_close(ours, theirs, name=""):
    np.testing.assert_allclose(
        ours, theirs, rtol=1e-4, atol=2e-5 * max(float(np.abs(theirs).max()), 1e-3), err_msg=name
    )
