"""A run over a mesh computes what a run on one device does."""

import dataclasses
import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxgpt import config as configs
from jaxgpt import data as batches
from jaxgpt import kernels, loss, model, prng, sharding
from jaxgpt.attention import attention, causal_mask
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.cli import mesh
from jaxgpt.data import loader
from jaxgpt.evaluation import evaluate
from jaxgpt.loss import token_losses
from jaxgpt.sharding import MeshError, Sizes, make_mesh, one_device, state_shardings
from jaxgpt.step import abstract_state, init_state, jit_train_steps, sharded_init, train_steps
from jaxgpt.tokenizer import CharTokenizer

ALONE = ["data=8", "fsdp=8", "tensor=8", "context=8"]
PAIRS = ["data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2,context=2"]
"""Each axis alone, and each two of them: `data=2,fsdp=2,tensor=2` holds three pairs. The bigram and the corpus on disk
have data and context."""
TOKENS = np.random.default_rng(0).integers(0, 16, 400).astype(np.uint16)
BOUND = 2e-5
"""How far losses over 20 steps may differ, in nats: float32 sums in another order."""


@pytest.fixture(scope="module")
def results():
    """What was computed on one device, by config."""
    return {}


@pytest.fixture
def small(tiny, change):
    """`tiny` in sizes that every mesh here divides."""
    return change(tiny, vocab_size=16, n_head=4, n_embd=32, batch_size=8, steps=20, scan_steps=10, dropout=0.0)


@pytest.fixture
def rich(small, change):
    """With what the loop of blocks, dropout, micro-batches and recomputing add."""
    options = dict(n_layer=2, dropout=0.1, scan_layers=True, remat="blocks", tie_weights=True, n_kv_head=2)
    return change(
        small, batch_size=16, accumulate=2, algorithm="muon", muon_steps=2, mlp="swiglu", position="rope", **options
    )


def mesh_of(text):
    return make_mesh(Sizes.parse(text))


@lru_cache
def initial(config):
    return jax.device_get(init_state(config))


def trained(config, over, tokens=TOKENS):
    """20 steps in two chunks: their metrics, the parameters after them, and the losses of some windows and of all
    tokens."""
    load, steps, K = loader(config, tokens, over), jit_train_steps(config, over), config.train.scan_steps
    with jax.set_mesh(over):
        state = jax.device_put(initial(config), state_shardings(over, initial(config)))
        chunks, programs = [], []
        for begin in range(0, 2 * K, K):
            state, metrics = steps(state, *load(begin, begin + K))
            chunks.append(jax.device_get(metrics))
            programs.append(steps._cache_size())
        assert programs[0] == programs[1]  # the second chunk compiled nothing
        idx = np.arange(40).reshape(5, 8) % 16
        losses = jax.jit(model.losses, static_argnums=0)(config.model, state.params, idx, idx).sum(axis=1)
        whole = evaluate(config.model, state.params, TOKENS, CharTokenizer("abcdefghijklmnop")).loss
        losses = np.append(jax.device_get(losses), whole)
    return jax.tree.map(lambda *x: np.concatenate(x), *chunks), jax.device_get(state.params), losses


def same(config, text, results):
    if config not in results:
        results[config] = trained(config, one_device())
    (metrics, params, losses), (over, spread, theirs) = results[config], trained(config, mesh_of(text))
    np.testing.assert_allclose(over.loss, metrics.loss, atol=BOUND, rtol=0)
    np.testing.assert_allclose(over.grad_norm, metrics.grad_norm, rtol=1e-3)
    np.testing.assert_allclose(theirs, losses, atol=8 * BOUND, rtol=0)
    assert abs(metrics.loss[-1] - metrics.loss[0]) > 1000 * BOUND  # it did learn
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0)


@pytest.mark.parametrize("text", ALONE)
def test_training_over_a_mesh_is_training_on_one_device(small, results, text):
    same(small, text, results)


@pytest.mark.parametrize("text", PAIRS)
def test_so_it_is_with_dropout_micro_batches_a_loop_of_blocks_and_muon(rich, results, text):
    same(rich, text, results)


def test_so_it_is_with_a_bigram_of_which_each_device_takes_its_part_of_the_logits(small, change, results):
    config = change(small, kind="bigram")
    same(config, "data=2,fsdp=2,context=2", results)
    over = mesh_of("data=2,fsdp=2,context=2")
    with jax.set_mesh(over):
        served = loader(config, TOKENS, over)(0, 1)
        text = jit_train_steps(config, over).lower(abstract_state(config, over), *served).compile()
    assert re.search(r"f32\[2,4,16\]", text.as_text()), "of 8 sequences of 8 tokens"
    assert "f32[8,8,16]" not in text.as_text()


def test_the_mesh_of_one_device_costs_nothing(rich, small):
    """Its program has no sharding constraints, and computes the bits that the plain function computes."""
    for config, over, constrained in ((rich, one_device(), False), (small, mesh_of("data=2,tensor=2"), True)):
        with jax.set_mesh(over):
            served = loader(config, TOKENS, over)(0, 10)
            text = jit_train_steps(config, over).lower(abstract_state(config, over), *served).as_text()
        assert ("sdy.sharding_constraint" in text) == constrained
    served = loader(small, TOKENS, one_device())(0, 10)  # as above, so that it is compiled already
    plain = jax.jit(train_steps, static_argnums=0)(small, init_state(small), *served)
    with jax.set_mesh(one_device()):
        alone = jit_train_steps(small, one_device())(sharded_init(small, one_device()), *served)
    jax.tree.map(np.testing.assert_array_equal, alone, plain)


def test_a_corpus_on_disk_is_read_by_those_who_need_it(small, results, monkeypatch):
    """Each part of the batch is read once; the losses are those of a corpus on one device."""
    text, read, config, plain, mine = "data=2,fsdp=2,context=2", [], small, batches.gather, TOKENS.copy()
    if config not in results:
        results[config] = trained(config, one_device())

    def gather(tokens, starts, T):
        if tokens is mine:  # and no chunk that a reader before this one is still ahead with
            read.append(starts)
        return plain(tokens, starts, T)

    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    monkeypatch.setattr(batches, "gather", gather)
    served = trained(config, mesh_of(text), mine)[0]
    np.testing.assert_allclose(served.loss, results[config][0].loss, atol=BOUND, rtol=0)
    over, plan = Sizes.parse(text), batches.chunk_starts(config.train.seed, 0, 10, len(TOKENS), 8, 8)
    first = read[: over.data * over.fsdp]
    assert all(starts.shape == (10, 8 // (over.data * over.fsdp)) for starts in first)
    assert sorted(np.concatenate(first, axis=1).ravel()) == sorted(plan.ravel())
    windows = loader(config, TOKENS, mesh_of(text))(0, 10)[1]
    assert windows.addressable_shards[0].data.shape == (10, 8 // (over.data * over.fsdp), 9)


def test_the_initial_state_has_the_same_bits_over_a_mesh(rich):
    with jax.set_mesh(over := mesh_of("data=2,fsdp=2,tensor=2")):
        state = sharded_init(rich, over)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), initial(rich))


def test_a_batch_lies_where_it_is_computed(small):
    """Each of four devices has two sequences, and no more of the parameters than its share."""
    over = mesh_of("fsdp=4")
    with jax.set_mesh(over):
        state = jax.device_put(initial(small), state_shardings(over, initial(small)))
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


ALL = dict(bias=True, tie_weights=False, smear=True, bigram_embed=True)


@pytest.mark.parametrize(
    "options", [{}, ALL, ALL | {"mlp": "swiglu", "scan_layers": True}, {"kind": "bigram"}], ids=lambda o: "+".join(o)
)
def test_every_parameter_has_exactly_one_rule(small, change, options):
    config = change(small, **options)
    shapes = jax.eval_shape(init_state, config)
    shardings = state_shardings(mesh_of("fsdp=4,tensor=2"), shapes)
    for leaf, sharding_ in zip(jax.tree.leaves(shapes.params), jax.tree.leaves(shardings.params), strict=True):
        assert len(sharding_.spec) == len(leaf.shape)
    split = [s for s in jax.tree.leaves(shardings.params) if any(s.spec)]
    assert len(split) >= 6 or config.model.kind == "bigram"


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(MeshError, match=r"'h_0/attn/gate/kernel' \[4, 4\]: expected exactly one rule for it, found 0"):
        sharding.spec("h_0/attn/gate/kernel", (4, 4))
    with pytest.raises(MeshError, match="its rule has 2 dimensions"):
        sharding.spec("h_0/attn/query/kernel", (4, 4, 4))


def test_what_a_mesh_does_not_divide_is_named(small, change):
    config = change(small, vocab_size=65, batch_size=12, accumulate=2)
    with pytest.raises(MeshError) as caught:
        mesh.check(config, Sizes(data=4, tensor=2, context=3))
    said = str(caught.value)
    for line in (
        "context = 3 does not divide 8 tokens of a context (block_size): try --block-size 9",
        "data x fsdp = 4 does not divide 6 sequences per micro-batch (batch_size / accumulate): try --batch-size 16",
        "tensor = 2 does not divide 65 tokens of the vocabulary (vocab_size): try --vocab-size 66",
    ):
        assert line in said
    assert said.count("\n") == 3


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_an_advised_n_embd_is_a_multiple_of_the_heads(small, change, position):
    config = change(small, n_head=8, n_embd=512, position=position, batch_size=12)
    assert mesh.problems(config, Sizes(fsdp=3)) == ["fsdp = 3 does not divide 512 channels (n_embd): try --n-embd 528"]
    advised = change(config, n_embd=528)
    assert mesh.problems(advised, Sizes(fsdp=3)) == configs.problems(advised) == []


@pytest.mark.parametrize(("n_head", "advised"), [(6, 0), (8, 4)])
def test_an_advised_n_kv_head_divides_the_heads(small, change, n_head, advised):
    config = change(small, n_head=n_head, n_kv_head=2, n_embd=96)
    said = f"tensor = 4 does not divide 2 KV heads (n_kv_head): try --n-kv-head {advised}"
    assert mesh.problems(config, Sizes(tensor=4)) == [said]
    again = change(config, n_kv_head=advised)
    assert mesh.problems(again, Sizes(tensor=4)) == configs.problems(again) == []


def test_sizes_are_read_and_written():
    assert Sizes.parse("fsdp=4,data=8") == Sizes(data=8, fsdp=4)
    assert str(Sizes(data=8, fsdp=4)) == "data=8,fsdp=4"
    assert Sizes.parse(str(Sizes())) == Sizes()
    for bad in ("", "data", "data=0", "data=2,data=2", "rows=2", "data=2;fsdp=2"):
        with pytest.raises(MeshError, match=re.escape(f"--mesh {bad}: expected auto")):
            Sizes.parse(bad)


def test_auto_splits_no_more_than_it_must(small, change):
    big = change(small, n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, batch_size=480)
    sizes, why = mesh.choose(big, 8, 80 * 10**9)
    assert sizes == Sizes(data=8)
    assert "2.6 GB of 80 GB a device, whole on each device" in why
    sizes, why = mesh.choose(big, 8, 2 * 10**9)
    assert sizes == Sizes(data=2, fsdp=4)
    assert "split over 4 devices" in why
    sizes, why = mesh.choose(change(big, batch_size=528, n_embd=1600, n_head=25, n_layer=48), 6, 24 * 10**9)
    assert sizes == Sizes(data=3, fsdp=2), "not whole, though 3 and 6 divide no channels"
    sizes, why = mesh.choose(change(big, batch_size=5, n_head=8), 7, None)
    assert sizes == Sizes(data=1)
    assert "6 of 7 devices stay idle" in why
    assert "--accumulate" not in why
    # nanoGPT's settings, of which 12 sequences are a micro-batch.
    small = change(big, accumulate=40)
    sizes, why = mesh.choose(small, 8, 80 * 10**9)
    assert sizes == Sizes(data=4)
    assert "4 of 8 devices stay idle, as only 4 divide a micro-batch: all share it with --accumulate 5" in why
    assert mesh.choose(change(small, accumulate=5), 8, 80 * 10**9)[0] == Sizes(data=8)
    sizes, why = mesh.choose(small, 256, 16 * 10**9)
    assert sizes == Sizes(data=4)
    assert "252 of 256 devices stay idle, as only 4 divide a micro-batch" in why


def test_where_it_trains_and_why_is_reported(small, monkeypatch):
    told = mesh.mesh_for(small, None)[1]
    assert told == "on cpu: the 8 devices of one CPU share its cores; --mesh data=8 takes them all"
    monkeypatch.setattr(jax, "process_count", lambda: 8)  # then they are not of one
    told = mesh.mesh_for(small, None)[1]
    assert re.fullmatch(r"on 8 of 8 x cpu as data=8: parameters, .*, whole on each device", told)
    with pytest.raises(MeshError, match=r"leaves 4 of the 8 devices .*: start fewer, or name a mesh of 8 devices"):
        mesh.mesh_for(small, Sizes(data=4))
    monkeypatch.undo()
    with pytest.raises(MeshError, match="needs 16 devices, and there are 8: --mesh auto takes those"):
        mesh.mesh_for(small, Sizes(data=8, context=2))


def test_long_contexts_split_over_devices_are_attended_exactly(small, change):
    drop = prng.Drop(prng.key(3), 0.7)

    config = change(small, block_size=512).model
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 512, 8))
    with jax.set_mesh(mesh_of("context=4,tensor=2")):
        assert kernels.kernel(config, 512, dropped=False) == "blocked"
        found = jax.jit(lambda *x: kernels.causal_attention(config, *x))(q, k, v)
        dropped = jax.jit(lambda *x: kernels.causal_attention(config, *x, drop))(q, k, v)
    mask = causal_mask(512)[None, None]
    np.testing.assert_allclose(found, attention(q, k, v, mask), atol=1e-5)
    places = jnp.arange(512)
    expected = attention(q, k, v, mask, drop=lambda weights: drop(weights, places, places))
    np.testing.assert_allclose(dropped, expected, atol=1e-5)


@pytest.mark.parametrize("text", ["data=4,context=2", "data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_the_loss_in_parts_and_its_gradients_are_those_of_the_whole(text):
    x, kernel = jax.random.normal(jax.random.key(0), (8, 12, 8)), jax.random.normal(jax.random.key(1), (8, 50))
    targets = jax.random.randint(jax.random.key(2), (8, 12), 0, 50)
    weights = jax.random.normal(jax.random.key(3), (8, 12))

    def parts(x, kernel):
        losses = loss.losses_of(jnp.matmul, x, kernel, targets, chunk=200)
        return (weights * losses).sum(), losses

    def whole(x, kernel):
        losses = token_losses(x @ kernel, targets)
        return (weights * losses).sum(), losses

    with jax.set_mesh(mesh_of(text)):
        assert "scan" in str(jax.make_jaxpr(parts)(x, kernel))
        found = jax.jit(jax.grad(parts, (0, 1), has_aux=True))(x, kernel)
    expected = jax.grad(whole, (0, 1), has_aux=True)(x, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_mesh_may_have_some_of_the_axes_only(small, monkeypatch):
    """As one that a user makes with `jax.make_mesh`."""
    monkeypatch.setattr(loss, "LOGITS", 40)
    over = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    params, (inputs, targets) = initial(small).params, batches.take(TOKENS, np.arange(8), 8)

    def mean_loss(params):
        return model.losses(small.model, params, inputs, targets).mean()

    found = jax.jit(jax.value_and_grad(mean_loss))
    expected = found(params)
    with jax.set_mesh(over):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found(params), expected)


def test_a_checkpoint_goes_from_any_mesh_to_any_other(small, tmp_path):
    over = mesh_of("fsdp=4,tensor=2")
    state = jax.device_put(initial(small), state_shardings(over, initial(small)))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, {})
    for over in (one_device(), mesh_of("data=2,fsdp=2")):
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(0, abstract_state(small, over))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))
        shardings = state_shardings(over, found)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, found, shardings)))


def test_stacked_blocks_are_the_blocks(rich, change):
    config = dataclasses.replace(rich.model, dropout=0.0)
    plain = dataclasses.replace(config, scan_layers=False)
    init, forward = (jax.jit(function, static_argnums=0) for function in (model.init_params, model.forward))
    params, apart = init(config, jax.random.key(0)), init(plain, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, model.unstacked(params), apart)
    jax.tree.map(np.testing.assert_array_equal, model.stacked(apart), params)
    idx = np.arange(16).reshape(2, 8)
    np.testing.assert_allclose(forward(config, params, idx), forward(plain, apart, idx), atol=1e-5)
