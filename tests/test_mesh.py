"""A run on a mesh gives the results of a run on one device."""

import dataclasses
import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgpt import config as configs
from jaxgpt import data as batches
from jaxgpt import kernels, loss, model, prng, sample, sharding
from jaxgpt.attention import attention, causal_mask
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.cli import mesh as cli_mesh
from jaxgpt.data import loader
from jaxgpt.evaluation import evaluate
from jaxgpt.loss import token_losses
from jaxgpt.sharding import MeshError, Sizes, make_mesh, one_device, state_shardings
from jaxgpt.step import (
    abstract_state,
    init_state,
    jit_train_steps,
    loss_and_grads,
    sharded_init,
    train_step,
    train_steps,
)
from jaxgpt.tokenizer import CharTokenizer

SINGLE_AXES = ["data=8", "fsdp=8", "tensor=8", "context=8"]
MIXED_AXES = ["data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2,context=2"]
"""The tests of the bigram and of a corpus on disk add the pair that is missing here, data and context."""
TOKENS = np.random.default_rng(0).integers(0, 16, 400).astype(np.uint16)
BOUND = 2e-5
"""Tolerance of losses over 20 steps, in nats: a mesh adds float32 numbers in another order."""


@pytest.fixture(scope="module")
def results():
    """Results on one device by config, so that each is computed once."""
    return {}


@pytest.fixture
def small(tiny, change):
    """`tiny` in sizes that are divisible by every mesh here."""
    return change(tiny, vocab_size=16, n_head=4, n_embd=32, batch_size=8, steps=20, scan_steps=10, dropout=0.0)


@pytest.fixture
def rich(small, change):
    """`small` with scanned blocks, dropout, micro-batches, remat and Muon."""
    options = dict(n_layer=2, dropout=0.1, scan_layers=True, remat="blocks", tie_weights=True, n_kv_head=2)
    return change(
        small, batch_size=16, accumulate=2, algorithm="muon", muon_steps=2, mlp="swiglu", position="rope", **options
    )


def parse_mesh(text):
    return make_mesh(Sizes.parse(text))


@lru_cache
def initial(config):
    return jax.device_get(init_state(config))


def train_on(config, mesh, tokens=TOKENS):
    """Train for 20 steps, in two chunks: their metrics, the parameters, and losses of five windows and of TOKENS."""
    load, steps, K = loader(config, tokens, mesh), jit_train_steps(config, mesh), config.train.scan_steps
    with jax.set_mesh(mesh):
        state = jax.device_put(initial(config), state_shardings(mesh, initial(config)))
        chunks, programs = [], []
        for begin in range(0, 2 * K, K):
            state, metrics = steps(state, *load(begin, begin + K))
            chunks.append(jax.device_get(metrics))
            programs.append(steps._cache_size())
        assert programs[0] == programs[1]  # the second chunk compiled nothing
        idx = np.arange(40).reshape(5, 8) % 16
        losses = jax.jit(model.losses, static_argnums=0)(config.model, state.params, idx, idx).sum(axis=1)
        split_loss = evaluate(config.model, state.params, TOKENS, CharTokenizer("abcdefghijklmnop")).loss
        losses = np.append(jax.device_get(losses), split_loss)
    return jax.tree.map(lambda *x: np.concatenate(x), *chunks), jax.device_get(state.params), losses


def assert_matches_one_device(config, text, results):
    if config not in results:
        results[config] = train_on(config, one_device())
    metrics, params, losses = results[config]
    mesh_metrics, mesh_params, mesh_losses = train_on(config, parse_mesh(text))
    np.testing.assert_allclose(mesh_metrics.loss, metrics.loss, atol=BOUND, rtol=0)
    np.testing.assert_allclose(mesh_metrics.grad_norm, metrics.grad_norm, rtol=1e-3)
    np.testing.assert_allclose(mesh_losses, losses, atol=8 * BOUND, rtol=0)
    assert abs(metrics.loss[-1] - metrics.loss[0]) > 1000 * BOUND  # the model has learned
    for a, b in zip(jax.tree.leaves(mesh_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0)


@pytest.mark.parametrize("text", SINGLE_AXES)
def test_training_on_a_mesh_matches_one_device(small, results, text):
    assert_matches_one_device(small, text, results)


@pytest.mark.parametrize("text", MIXED_AXES)
def test_training_with_many_options_matches_one_device(rich, results, text):
    assert_matches_one_device(rich, text, results)


def test_bigram_matches_one_device_with_sharded_logits(small, change, results):
    config = change(small, kind="bigram")
    assert_matches_one_device(config, "data=2,fsdp=2,context=2", results)
    mesh = parse_mesh("data=2,fsdp=2,context=2")
    with jax.set_mesh(mesh):
        served = loader(config, TOKENS, mesh)(0, 1)
        text = jit_train_steps(config, mesh).lower(abstract_state(config, mesh), *served).compile()
    assert re.search(r"f32\[2,4,16\]", text.as_text()), "a shard of the logits of 8 x 8 tokens"
    assert "f32[8,8,16]" not in text.as_text()


def test_mesh_of_one_device_adds_no_sharding_constraints(rich, small):
    """Its program also computes the same bits as the plain function."""
    for config, mesh, constrained in ((rich, one_device(), False), (small, parse_mesh("data=2,tensor=2"), True)):
        with jax.set_mesh(mesh):
            served = loader(config, TOKENS, mesh)(0, 10)
            text = jit_train_steps(config, mesh).lower(abstract_state(config, mesh), *served).as_text()
        assert ("sdy.sharding_constraint" in text) == constrained
    served = loader(small, TOKENS, one_device())(0, 10)  # 10 steps, as in `train_on`: the program is compiled already
    plain = jax.jit(train_steps, static_argnums=0)(small, init_state(small), *served)
    with jax.set_mesh(one_device()):
        alone = jit_train_steps(small, one_device())(sharded_init(small, one_device()), *served)
    jax.tree.map(np.testing.assert_array_equal, alone, plain)


def test_corpus_on_disk_is_read_shard_by_shard(small, results, monkeypatch):
    """Each shard of the batch is read once; the losses are those of a corpus on the device."""
    text, read, config, gather_windows, disk_tokens = (
        "data=2,fsdp=2,context=2",
        [],
        small,
        batches.gather,
        TOKENS.copy(),
    )
    if config not in results:
        results[config] = train_on(config, one_device())

    def gather(tokens, starts, T):
        if tokens is disk_tokens:  # not those of an earlier test, whose reader may still read ahead
            read.append(starts)
        return gather_windows(tokens, starts, T)

    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    monkeypatch.setattr(batches, "gather", gather)
    served = train_on(config, parse_mesh(text), disk_tokens)[0]
    np.testing.assert_allclose(served.loss, results[config][0].loss, atol=BOUND, rtol=0)
    sizes, plan = Sizes.parse(text), batches.chunk_starts(config.train.seed, 0, 10, len(TOKENS), 8, 8)
    first = read[: sizes.data * sizes.fsdp]
    assert all(starts.shape == (10, 8 // (sizes.data * sizes.fsdp)) for starts in first)
    assert sorted(np.concatenate(first, axis=1).ravel()) == sorted(plan.ravel())
    windows = loader(config, TOKENS, parse_mesh(text))(0, 10)[1]
    assert windows.addressable_shards[0].data.shape == (10, 8 // (sizes.data * sizes.fsdp), 9)


def test_the_initial_state_has_the_same_bits_over_a_mesh(rich):
    with jax.set_mesh(mesh := parse_mesh("data=2,fsdp=2,tensor=2")):
        state = sharded_init(rich, mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), initial(rich))


def test_batch_and_state_are_sharded(small):
    """Each of four devices holds two sequences, and its shards of the parameters and of their moments."""
    mesh = parse_mesh("fsdp=4")
    with jax.set_mesh(mesh):
        state = jax.device_put(initial(small), state_shardings(mesh, initial(small)))
        idx = jax.jit(lambda x: sharding.constrain(x, "batch", None))(jnp.zeros((8, 3), int))
    assert idx.addressable_shards[0].data.shape == (2, 3)
    kernel = state.params["h_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.shape == (32, 128)
    assert kernel.addressable_shards[0].data.shape == (8, 128)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "['c_fc']['kernel']" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 2
    assert all(moment.sharding == kernel.sharding for moment in moments)


ALL_OPTIONS = dict(bias=True, tie_weights=False, smear=True, bigram_embed=True)


@pytest.mark.parametrize(
    "options",
    [{}, ALL_OPTIONS, ALL_OPTIONS | {"mlp": "swiglu", "scan_layers": True}, {"kind": "bigram"}],
    ids=lambda o: "+".join(o),
)
def test_every_parameter_has_exactly_one_rule(small, change, options):
    config = change(small, **options)
    shapes = jax.eval_shape(init_state, config)
    shardings = state_shardings(parse_mesh("fsdp=4,tensor=2"), shapes)
    for leaf, sharding_ in zip(jax.tree.leaves(shapes.params), jax.tree.leaves(shardings.params), strict=True):
        assert len(sharding_.spec) == len(leaf.shape)
    sharded = [s for s in jax.tree.leaves(shardings.params) if any(s.spec)]
    assert len(sharded) >= 6 or config.model.kind == "bigram"


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_every_matrix_is_split_over_both_axes(small, change, mlp):
    """Channels over `fsdp`, hidden channels and the vocabulary over `tensor`; embeddings of positions over `fsdp`."""
    config = change(small, mlp=mlp, tie_weights=False)
    shapes = jax.eval_shape(init_state, config)
    shardings, C = state_shardings(parse_mesh("fsdp=4,tensor=2"), shapes).params, small.model.n_embd
    for (path, leaf), each in zip(
        jax.tree_util.tree_leaves_with_path(shapes.params), jax.tree.leaves(shardings), strict=True
    ):
        name, shard = jax.tree_util.keystr(path, simple=True, separator="/"), each.shard_shape(leaf.shape)
        if "attn" in name and name.endswith("kernel"):
            assert sorted(shard) == [C // 4, C // 2], name
        elif leaf.ndim == 2:
            assert shard == tuple(n // 4 if n == C else n if "wpe" in name else n // 2 for n in leaf.shape), name


def test_a_parameter_that_the_mesh_does_not_divide_is_refused():
    params = {"lm_head": {"kernel": jnp.zeros((4, 3))}}
    with pytest.raises(MeshError, match=re.escape("tensor = 2 does not divide dimension 3 of 'lm_head/kernel' [4, 3]")):
        state_shardings(parse_mesh("fsdp=2,tensor=2"), params)


def test_one_device_belongs_to_this_process(monkeypatch):
    """The first of `jax.devices` belongs to process 0."""
    own = jax.devices()[3:]
    monkeypatch.setattr(jax, "local_devices", lambda: own)
    assert sharding.one_device.__wrapped__().devices.ravel().tolist() == own[:1]


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(MeshError, match=r"'h_0/attn/gate/kernel' \[4, 4\]: expected exactly one rule for it, found 0"):
        sharding.spec("h_0/attn/gate/kernel", (4, 4))
    with pytest.raises(MeshError, match="its rule has 2 dimensions"):
        sharding.spec("h_0/attn/query/kernel", (4, 4, 4))


def test_check_names_every_indivisible_dimension(small, change):
    config = change(small, vocab_size=65, batch_size=12, accumulate=2)
    with pytest.raises(MeshError) as caught:
        cli_mesh.check(config, Sizes(data=4, tensor=2, context=3))
    message = str(caught.value)
    for line in (
        "context = 3 does not divide 8 tokens of a context (block_size): try --block-size 9",
        "data x fsdp = 4 does not divide 6 sequences per micro-batch (batch_size / accumulate): try --batch-size 16",
        "tensor = 2 does not divide 65 tokens of the vocabulary (vocab_size): try --vocab-size 66",
    ):
        assert line in message
    assert message.count("\n") == 3


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_suggested_n_embd_is_a_multiple_of_the_heads(small, change, position):
    config = change(small, n_head=8, n_embd=512, position=position, batch_size=12)
    assert cli_mesh.problems(config, Sizes(fsdp=3)) == [
        "fsdp = 3 does not divide 512 channels (n_embd): try --n-embd 528"
    ]
    changed = change(config, n_embd=528)
    assert cli_mesh.problems(changed, Sizes(fsdp=3)) == configs.problems(changed) == []


@pytest.mark.parametrize(("n_head", "suggested"), [(6, 0), (8, 4)])
def test_suggested_n_kv_head_divides_the_heads(small, change, n_head, suggested):
    config = change(small, n_head=n_head, n_kv_head=2, n_embd=96)
    problem = f"tensor = 4 does not divide 2 KV heads (n_kv_head): try --n-kv-head {suggested}"
    assert cli_mesh.problems(config, Sizes(tensor=4)) == [problem]
    changed = change(config, n_kv_head=suggested)
    assert cli_mesh.problems(changed, Sizes(tensor=4)) == configs.problems(changed) == []


def test_hidden_channels_are_checked(small, change):
    config = change(small, mlp="swiglu", n_embd=48)  # 8 x 16 hidden channels
    assert cli_mesh.problems(config, Sizes(tensor=4)) == []
    (problem,) = cli_mesh.problems(change(config, n_embd=60, n_head=12, n_kv_head=12, vocab_size=24), Sizes(tensor=12))
    assert problem == "tensor = 12 does not divide 160 hidden channels: try a divisor of it"


def test_sizes_parse_and_print():
    assert Sizes.parse("fsdp=4,data=8") == Sizes(data=8, fsdp=4)
    assert str(Sizes(data=8, fsdp=4)) == "data=8,fsdp=4"
    assert Sizes.parse(str(Sizes())) == Sizes()
    for bad in ("", "data", "data=0", "data=2,data=2", "rows=2", "data=2;fsdp=2"):
        with pytest.raises(MeshError, match=re.escape(f"--mesh {bad}: expected auto")):
            Sizes.parse(bad)


def test_auto_shards_the_state_only_as_far_as_necessary(small, change):
    big = change(small, n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, batch_size=480)
    sizes, why = cli_mesh.choose(big, 8, 80 * 10**9)
    assert sizes == Sizes(data=8)
    assert "2.6 GB of 80.0 GB a device, whole on each device" in why
    sizes, why = cli_mesh.choose(big, 8, 2 * 10**9)
    assert sizes == Sizes(data=2, fsdp=4)
    assert "split over 4 devices" in why
    sizes, why = cli_mesh.choose(change(big, batch_size=528, n_embd=1600, n_head=25, n_layer=48), 6, 24 * 10**9)
    assert sizes == Sizes(data=3, fsdp=2), "as many shards as possible: 3 and 6 do not divide n_embd"
    sizes, why = cli_mesh.choose(change(big, batch_size=5, n_head=8), 7, None)
    assert sizes == Sizes(data=1)
    assert "6 of 7 devices stay idle" in why
    assert "--accumulate" not in why
    # nanoGPT's settings, with micro-batches of 12 sequences.
    small = change(big, accumulate=40)
    sizes, why = cli_mesh.choose(small, 8, 80 * 10**9)
    assert sizes == Sizes(data=4)
    assert "4 of 8 devices stay idle, as only 4 divide a micro-batch: all share it with --accumulate 5" in why
    assert cli_mesh.choose(change(small, accumulate=5), 8, 80 * 10**9)[0] == Sizes(data=8)
    sizes, why = cli_mesh.choose(small, 256, 16 * 10**9)
    assert sizes == Sizes(data=4)
    assert "252 of 256 devices stay idle, as only 4 divide a micro-batch" in why


def test_choice_of_mesh_is_explained(small, change, monkeypatch):
    line = cli_mesh.mesh_for(small, None)[1]
    assert line == "on cpu: the 8 devices of one CPU share its cores; --mesh data=8 takes them all"
    monkeypatch.setattr(jax, "process_count", lambda: 8)  # a cluster, whose devices share no cores
    line = cli_mesh.mesh_for(small, None)[1]
    assert re.fullmatch(r"on 8 of 8 x cpu as data=8: parameters, .*, whole on each device", line)
    with pytest.raises(MeshError, match=r"leaves 4 of the 8 devices .*: start fewer, or name a mesh of 8 devices"):
        cli_mesh.mesh_for(small, Sizes(data=4))
    with pytest.raises(MeshError, match=r"name a mesh of 8 devices; parameters, .*; 4 of 8 devices stay idle"):
        cli_mesh.mesh_for(change(small, batch_size=12), None)
    monkeypatch.undo()
    with pytest.raises(MeshError, match=r"the mesh context=3 does not fit:\n  context = 3 does not divide 8 tokens"):
        cli_mesh.mesh_for(small, Sizes(context=3))
    with pytest.raises(MeshError, match="needs 16 devices, expected at most 8: try --mesh auto"):
        cli_mesh.mesh_for(small, Sizes(data=8, context=2))
    only = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: only)
    assert cli_mesh.mesh_for(small, None)[1] == "on cpu", "there is no choice to explain"


def test_attention_over_a_sharded_context_matches_reference(small, change):
    drop = prng.Drop(prng.key(3), 0.7)

    config = change(small, block_size=512).model
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 512, 8))
    with jax.set_mesh(parse_mesh("context=4,tensor=2")):
        assert kernels.kernel(config, 512, dropped=False) == "blocked"
        found = jax.jit(lambda *x: kernels.causal_attention(config, *x))(q, k, v)
        dropped = jax.jit(lambda *x: kernels.causal_attention(config, *x, drop))(q, k, v)
    mask = causal_mask(512)[None, None]
    np.testing.assert_allclose(found, attention(q, k, v, mask), atol=1e-5)
    positions = jnp.arange(512)
    expected = attention(q, k, v, mask, drop=lambda weights: drop(weights, positions, positions))
    np.testing.assert_allclose(dropped, expected, atol=1e-5)


def test_a_window_over_a_sharded_context_matches_reference(small, change):
    config = change(small, block_size=512, window=50).model
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 512, 8))
    with jax.set_mesh(parse_mesh("context=4,tensor=2")):
        found = jax.jit(lambda *x: kernels.causal_attention(config, *x))(q, k, v)
    np.testing.assert_allclose(found, attention(q, k, v, causal_mask(512, 50)[None, None]), atol=1e-5)


@pytest.mark.parametrize("text", ["data=4,context=2", "data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_chunked_loss_on_a_mesh_matches_plain_loss(text):
    x, kernel = jax.random.normal(jax.random.key(0), (8, 12, 8)), jax.random.normal(jax.random.key(1), (8, 50))
    targets = jax.random.randint(jax.random.key(2), (8, 12), 0, 50)
    weights = jax.random.normal(jax.random.key(3), (8, 12))

    def chunked(x, kernel):
        losses = loss.losses_of(jnp.matmul, x, kernel, targets, chunk=200)
        return (weights * losses).sum(), losses

    def plain(x, kernel):
        losses = token_losses(x @ kernel, targets)
        return (weights * losses).sum(), losses

    def derivatives(function):
        """The gradient with the losses, and a Hessian-vector product."""
        gradient = jax.grad(function, (0, 1), has_aux=True)
        return lambda *args: (gradient(*args), jax.jvp(lambda *args: gradient(*args)[0], args, args)[1])

    with jax.set_mesh(parse_mesh(text)):
        assert "scan" in str(jax.make_jaxpr(chunked)(x, kernel))
        found = jax.jit(derivatives(chunked))(x, kernel)
    expected = derivatives(plain)(x, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("text", "shape"), [("fsdp=2,context=4", (4, 6)), ("data=2", (5, 7))])
def test_windows_that_the_mesh_does_not_divide_have_the_losses_of_one_device(text, shape):
    table, kernel = jax.random.normal(jax.random.key(0), (16, 8)), jax.random.normal(jax.random.key(1), (8, 50))
    idx = jax.random.randint(jax.random.key(2), shape, 0, 16)

    def losses(*, chunk):
        return loss.losses_of(jnp.matmul, sharding.lookup(table, idx), kernel, idx, chunk=chunk)

    expected = losses(chunk=10**6)
    with jax.set_mesh(parse_mesh(text)):
        chunked = jax.jit(lambda: losses(chunk=100))
        assert "scan" in str(chunked.trace().jaxpr)
        np.testing.assert_allclose(chunked(), expected, rtol=1e-5)


@pytest.mark.parametrize(("text", "V", "C"), [("fsdp=2,tensor=2", 17, 8), ("fsdp=2", 16, 9), ("tensor=2", 17, 8)])
def test_tables_and_kernels_that_the_mesh_does_not_divide_are_whole(text, V, C):
    table, kernel = jax.random.normal(jax.random.key(0), (V, C)), jax.random.normal(jax.random.key(1), (C, V))
    idx = jax.random.randint(jax.random.key(2), (4, 6), 0, V)

    def losses(*, chunk):
        return loss.losses_of(jnp.matmul, sharding.lookup(table, idx), kernel, idx, chunk=chunk)

    expected = losses(chunk=10**6)
    with jax.set_mesh(parse_mesh(text)):
        chunked = jax.jit(lambda: losses(chunk=200))
        assert "scan" in str(chunked.trace().jaxpr), "the logits of all devices are more than 200"
        np.testing.assert_allclose(chunked(), expected, rtol=1e-5)


def test_blocked_attention_of_a_context_that_the_mesh_does_not_divide(small, change):
    config = change(small, block_size=512).model
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 257, 8))
    with jax.set_mesh(parse_mesh("context=4,tensor=2")):
        found = jax.jit(lambda *x: kernels.causal_attention(config, *x))(q, k, v)
    np.testing.assert_allclose(found, attention(q, k, v, causal_mask(257)[None, None]), atol=1e-5)


def test_chunked_losses_without_jit_on_a_mesh(small, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 40)
    params, idx = initial(small).params, TOKENS[:32].reshape(4, 8)
    expected = model.losses(small.model, params, idx, idx)
    with jax.set_mesh(parse_mesh("data=2")):
        np.testing.assert_allclose(model.losses(small.model, params, idx, idx), expected, rtol=1e-5)


def test_generate_with_sharded_weights_on_explicit_axes(small):
    params, idx = initial(small).params, TOKENS[:32].reshape(4, 8)
    expected = sample.generate(small.model, params, idx, 6, jax.random.key(0))
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"))):
        columns = jax.tree.map(lambda x: PartitionSpec(*[None] * (x.ndim - 1), "tensor"), params)
        placed = jax.tree.map(jax.device_put, params, columns)
        np.testing.assert_array_equal(sample.generate(small.model, placed, idx, 6, jax.random.key(0)), expected)


@pytest.mark.parametrize("spec", [(), ("data",), (None, "tensor"), ("data", "tensor")])
def test_logits_and_loss_on_explicit_axes(small, spec):
    params, idx = initial(small).params, TOKENS[:32].reshape(4, 8)
    expected, mean = model.logits_and_loss(small.model, params, idx, idx)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"))):
        idx = jax.device_put(idx, PartitionSpec(*spec))
        logits, found = model.logits_and_loss(small.model, params, idx, idx)
        alone, none = model.logits_and_loss(small.model, params, idx)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, mean, rtol=1e-5)
    np.testing.assert_allclose(alone, np.reshape(expected, alone.shape), rtol=1e-4, atol=1e-5)
    assert none is None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_losses_and_gradients_on_a_user_mesh(small, monkeypatch, kind):
    """Made with `jax.make_mesh`, it may lack axes, and its axes are Explicit by default."""
    monkeypatch.setattr(loss, "LOGITS", 40)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(kind,) * 2)
    params, (inputs, targets) = initial(small).params, batches.take(TOKENS, np.arange(8), 8)

    config = dataclasses.replace(small.model, dropout=0.1)

    def mean_loss(params, inputs, targets):
        return model.losses(config, params, inputs, targets, dropout_key=jax.random.key(1)).mean()

    found = jax.jit(jax.value_and_grad(mean_loss))
    expected = found(params, inputs, targets)
    with jax.set_mesh(mesh):
        given = jax.device_put((inputs, targets), NamedSharding(mesh, PartitionSpec("data")))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found(params, *given), expected)


@pytest.mark.smoke
def test_steps_on_a_mesh_of_explicit_axes_keep_the_shardings(small):
    mesh, K = jax.make_mesh((2, 4), ("batch", "model")), 2
    rows = batches.config_starts(small, len(TOKENS), 0, K).astype(np.int32)
    run = jax.jit(train_steps, static_argnums=0)
    state, metrics = run(small, initial(small), TOKENS, rows)

    def sharded(x):  # the last dimension
        spec = [None] * (x.ndim - 1) + ["model"] if x.ndim and x.shape[-1] % 4 == 0 else []
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    with jax.set_mesh(mesh):
        placed = jax.tree.map(sharded, initial(small))
        found, found_metrics = run(
            small, placed, jnp.asarray(TOKENS), jax.device_put(rows, PartitionSpec(None, "batch"))
        )
        idx = jax.device_put(TOKENS[:32].reshape(4, 8), PartitionSpec("batch"))
        logits = model.forward(config=small.model, params=found.params, idx=idx)
        own = partial(model.losses, small.model)
        by_shard = jax.shard_map(
            own,
            in_specs=(PartitionSpec(), *[PartitionSpec("batch")] * 2),
            out_specs=PartitionSpec("batch"),
            axis_names={"batch"},
            check_vma=False,
        )
        np.testing.assert_allclose(jax.jit(by_shard)(found.params, idx, idx), own(found.params, idx, idx), rtol=1e-4)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, placed)
    assert jax.typeof(logits).sharding.spec == PartitionSpec("batch", None, None)
    np.testing.assert_allclose(found_metrics.loss, metrics.loss, rtol=1e-5)
    expected = model.forward(small.model, state.params, TOKENS[:32].reshape(4, 8))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_in_a_shard_map_are_summed_over_its_devices(small, precision):
    config = dataclasses.replace(small.model, precision=precision)
    params, (inputs, targets) = initial(small).params, batches.take(TOKENS, np.arange(8), 8)

    def gradient(params, inputs, targets):
        return jax.grad(lambda params: model.losses(config, params, inputs, targets).sum())(params)

    rows = PartitionSpec("batch")
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=PartitionSpec())
    found, expected = jax.jit(mapped)(params, inputs, targets), gradient(params, inputs, targets)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), found, expected)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_micro_batches_in_a_shard_map_match_the_whole_batch(small, change, monkeypatch, platform):
    """Data-parallel training with the checks of shard_map on; the embeddings of GPUs have their own backward pass."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    config = change(small, kind="bigram", accumulate=2)
    params, batch = initial(config).params, batches.take(TOKENS, np.arange(16), 8)

    def mean(params, batch):
        loss, grads = loss_and_grads(config, params, batch, None)
        return jax.lax.pmean(loss, "batch"), grads

    mesh, rows = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,)), PartitionSpec("batch")
    mapped = jax.shard_map(mean, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec())
    loss, grads = jax.jit(mapped)(params, batch)
    expected, expected_grads = loss_and_grads(config, params, batch, None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, jax.tree.map(lambda g: 8 * g, expected_grads)
    )


@pytest.mark.smoke
def test_each_device_of_a_shard_map_can_train_its_own_model(small, change):
    """Local SGD with micro-batches, with the checks of shard_map on."""
    config, mesh = change(small, accumulate=2), jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(jax.random.key(0), 8)
    params = jax.jit(jax.vmap(partial(model.init_params, config.model)))(keys)
    states = jax.vmap(lambda params: dataclasses.replace(initial(small), params=params))(params)
    data = batches.take(TOKENS, np.arange(64).reshape(8, 8), 8)
    step = jax.vmap(partial(train_step, config))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec("model"), out_specs=PartitionSpec("model"))
    found, expected = jax.jit(mapped)(states, data), jax.jit(step)(states, data)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


def test_mesh_without_the_axes_of_a_run_is_refused(small):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    with pytest.raises(
        MeshError, match=r"axes data, model, expected data, fsdp, tensor, context: use sharding.make_mesh"
    ):
        abstract_state(small, mesh)


def test_checkpoint_restores_on_another_mesh(small, tmp_path):
    mesh = parse_mesh("fsdp=4,tensor=2")
    state = jax.device_put(initial(small), state_shardings(mesh, initial(small)))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, {})
    for mesh in (one_device(), parse_mesh("data=2,fsdp=2")):
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(0, abstract_state(small, mesh))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))
        shardings = state_shardings(mesh, found)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, found, shardings)))


def test_scanned_blocks_match_unrolled_blocks(rich):
    config = dataclasses.replace(rich.model, dropout=0.0)
    unrolled = dataclasses.replace(config, scan_layers=False)
    init, forward = (jax.jit(function, static_argnums=0) for function in (model.init_params, model.forward))
    params, unstacked = init(config, jax.random.key(0)), init(unrolled, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, model.unstacked(params), unstacked)
    jax.tree.map(np.testing.assert_array_equal, model.stacked(unstacked), params)
    idx = np.arange(16).reshape(2, 8)
    np.testing.assert_allclose(forward(config, params, idx), forward(unrolled, unstacked, idx), atol=1e-5)
