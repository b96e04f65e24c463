"""FlashAttention with dropout: run on the CPU, where Pallas interprets it, and lowered for GPUs."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import AbstractDevice, AbstractMesh

from jaxgpt import flash, kernels, prng, sharding
from jaxgpt.attention import attention, causal_mask
from jaxgpt.config import ModelConfig
from jaxgpt.prng import Drop

B, H, T, D = 2, 4, 128, 16
CONFIG = ModelConfig(vocab_size=13, block_size=T, n_head=H, n_embd=H * D, precision="bfloat16", dropout=0.3)
DROP = Drop(prng.key(3), 0.7)
Q, K, V, G = jax.random.normal(jax.random.key(0), (4, B, H, T, D)).astype(jnp.bfloat16)


def with_gradients(function, q, k, v):
    out, vjp = jax.vjp(function, q, k, v)
    return out, *vjp(G.astype(out.dtype))


attend = partial(kernels.causal_attention, CONFIG, used="flash")


@pytest.mark.smoke
@pytest.mark.parametrize("drop", [None, DROP])
def test_outputs_and_gradients_match_reference(drop):
    def reference(q, k, v):
        positions = jnp.arange(T)
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return attention(q, k, v, causal_mask(T), drop=drop and (lambda weights: drop(weights, positions, positions)))

    found = jax.jit(partial(with_gradients, partial(attend, drop=drop)))(Q, K, V)
    expected = jax.jit(partial(with_gradients, reference))(Q, K, V)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=0.02, atol=0.02)


def test_sharded_and_vmapped_calls_drop_the_same_weights():
    call = jax.jit(partial(with_gradients, partial(attend, drop=DROP)))
    alone = call(Q, K, V)
    with jax.set_mesh(sharding.make_mesh(sharding.Sizes(data=2, tensor=2))):
        sharded = call(Q, K, V)
    chex.assert_trees_all_equal(sharded, alone)
    keep = jnp.array([0.7, 0.4])
    mapped = jax.jit(jax.vmap(lambda keep: attend(Q, K, V, Drop(DROP.key, keep))))(keep)
    chex.assert_trees_all_equal(mapped[0], alone[0])
    assert (mapped[1] != alone[0]).any()


def test_kernel_choice_on_gpu(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")

    def kernel(T=256, dropped=True, **changes):
        return kernels.kernel(ModelConfig(**dict(n_head=2, n_embd=128, precision="bfloat16") | changes), T, dropped)

    assert kernel() == "flash"
    assert kernel(T=1024, dropped=False) == "cudnn"
    assert kernel(T=1024, dropped=False, deterministic=True) == "flash"
    assert kernel(T=320, dropped=False, deterministic=True) == "flash", "cuDNN's gradients repeat up to 256 tokens"
    assert kernel(precision="auto") == "flash", "a GPU of unknown capability computes in bfloat16"
    for other in (dict(T=260), dict(window=32), dict(n_embd=96), dict(precision="float32")):
        assert kernel(**other) == "blocked"


def test_kernel_choice_on_tpu(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")

    def kernel(T=256, dropped=False, **changes):
        return kernels.kernel(ModelConfig(**dict(n_head=2, n_embd=128, precision="bfloat16") | changes), T, dropped)

    assert kernel() == "splash"
    for other in (dict(dropped=True), dict(window=32), dict(n_embd=96), dict(T=260), dict(precision="float32")):
        assert kernel(**other) == "blocked"


def test_cudnn_takes_heads_of_a_multiple_of_8_up_to_128_channels(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    for D, expected in ((128, "cudnn"), (136, "blocked"), (24, "cudnn"), (20, "blocked")):
        config = ModelConfig(n_head=2, n_embd=2 * D, precision="bfloat16")
        assert kernels.kernel(config, 1024, dropped=False) == expected


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_dropout_is_applied_on_every_platform(monkeypatch, platform):
    """Without it, the fastest kernel would be cuDNN's or splash attention, which drop nothing."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    for name in ("_cudnn", "_splash"):
        monkeypatch.delattr(kernels, name)
    config = dataclasses.replace(CONFIG, n_head=1, n_embd=64)
    shape = jax.ShapeDtypeStruct((B, 1, T, 64), jnp.float32)
    program = str(jax.make_jaxpr(lambda q: kernels.causal_attention(config, q, q, q, DROP))(shape))
    assert ("pallas_call" in program) == (platform == "gpu")


def test_matmuls_accumulate_in_float32():
    """XLA for CPUs always does; GPUs would sum in bfloat16, and scores of several hundred would be off by 2."""
    program = str(jax.make_jaxpr(partial(with_gradients, attend))(Q, K, V))
    assert "preferred_element_type=float32" in program
    assert "preferred_element_type=bfloat16" not in program


def test_heads_that_the_mesh_does_not_divide_are_whole_on_each_device():
    q, k, v = (x[:, :3] for x in (Q, K, V))
    alone = jax.jit(attend)(q, k, v)
    with jax.set_mesh(sharding.make_mesh(sharding.Sizes(data=2, tensor=2))):
        np.testing.assert_array_equal(jax.jit(attend)(q, k, v), alone)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_sharded_contexts_are_attended_to_in_blocks(monkeypatch, platform):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    config = ModelConfig(n_head=2, n_embd=128, precision="bfloat16")
    with jax.set_mesh(sharding.make_mesh(sharding.Sizes(context=2))):
        assert kernels.kernel(config, 256, dropped=False) == "blocked"


@pytest.mark.parametrize(("window", "tensor"), [(0, 1), (3, 1), (0, 2), (0, 4)])
def test_cudnn_attends_to_the_tokens_of_the_reference(monkeypatch, window, tensor):
    """XLA computes the attention that cuDNN is asked for, also where devices are more than the two KV heads."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *qkv, **o: call(*qkv, **o | {"implementation": "xla"}))
    q, k, v = Q[:1, :, :8], K[:1, :2, :8], V[:1, :2, :8]
    with jax.numpy_rank_promotion("allow"):
        with jax.set_mesh(sharding.make_mesh(sharding.Sizes(tensor=tensor))):
            attend = partial(kernels.causal_attention, dataclasses.replace(CONFIG, window=window), used="cudnn")
            found = jax.jit(attend)(q, k, v)
        expected = attention(q, kernels.repeat_kv(k, H), kernels.repeat_kv(v, H), causal_mask(8, window))
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.02)


def test_splash_attention_matches_the_reference(monkeypatch):
    make = splash_attention_kernel.make_splash_mha
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", partial(make, interpret=True))
    q, k, v = (x[:1, :1] for x in (Q, K, V))
    found = kernels.causal_attention(CONFIG, q, k, v, used="splash")
    with jax.numpy_rank_promotion("allow"):
        expected = attention(q, k, v, causal_mask(T))
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.02)


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_forward_and_backward_lower_to_two_triton_kernels():
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    shapes = [jax.ShapeDtypeStruct((B, H, T, D), jnp.bfloat16)] * 3
    seeds = jax.ShapeDtypeStruct((B, H, 4), jnp.uint32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=h100)):
        traced = jax.jit(lambda s, *qkv: with_gradients(lambda *x: flash.flash_attention(*x, s), *qkv)).trace(
            seeds, *shapes
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
