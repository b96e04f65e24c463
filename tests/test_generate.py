from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgpt import model, sharding
from jaxgpt.attention import init_cache
from jaxgpt.sample import (
    CHUNK,
    LONGEST,
    SamplingParams,
    cast_kernels,
    checked,
    for_decoding,
    generate,
    min_p,
    stream,
    top_k,
    top_p,
)

KEY = jax.random.key(0)
GREEDY = SamplingParams(0)
forward = jax.jit(model.forward, static_argnums=0)


@lru_cache
def random_params(config):
    """Non-zero parameters with logits far from uniform, so that an error changes the tokens."""
    shapes, rng = jax.eval_shape(partial(model.init_params, config), KEY), np.random.default_rng(0)

    def random(path, x):  # were biases near one, too, the last norm's would decide every token
        return jnp.asarray(0.5 * rng.standard_normal(x.shape) + (path[-1].key == "scale"), x.dtype)

    return jax.tree_util.tree_map_with_path(random, shapes)


@pytest.fixture
def tiny_model(tiny, change):
    config = change(tiny, dropout=0.0).model
    return config, random_params(config)


def plain_loop(config, params, prompt, n, choose):
    """Continue `prompt` by `n` tokens in plain Python, with one forward pass of the context per token.

    The context starts with the last block_size tokens of the prompt. Once full, it shrinks to its newest half.
    """
    W = config.block_size
    ids = list(prompt)[-W:]
    written = []
    for i in range(n):
        padded = np.zeros((1, W), int)
        padded[0, : len(ids)] = ids
        written.append(int(choose(np.asarray(forward(config, params, padded))[0, len(ids) - 1], i)))
        ids = [*ids, written[-1]] if len(ids) < W else [*ids, written[-1]][-max(1, W // 2) :]
    return written


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1, 5, 8, 30])
def test_greedy_matches_plain_loop(tiny_model, length):
    config, params = tiny_model
    prompt = np.random.default_rng(length).integers(0, 13, length)
    got = generate(config, params, prompt[None], 20, KEY, GREEDY)
    assert got[0].tolist() == plain_loop(config, params, prompt, 20, lambda logits, i: logits.argmax())


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_cache_smaller_than_block_size_suffices(tiny, change, position):
    """3 tokens of the prompt and 20 or 15 new ones, the last of which is not read, take 22 or 17 of the 32 slots."""
    config = change(tiny, block_size=64, dropout=0.0, position=position).model
    params, ids = random_params(config), np.random.default_rng(0).integers(0, 13, (64, 3))
    prompts = ids
    for n in range(3, 23):
        logits = forward(config, params, np.pad(ids, [(0, 0), (0, 64 - n)]))[:, n - 1]
        ids = np.append(ids, logits.argmax(axis=-1)[:, None], axis=1)
    for n in (20, 15):
        got = generate(config, params, prompts, n, KEY, GREEDY)
        np.testing.assert_array_equal(got, ids[:, 3 : 3 + n])


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_last_token_depends_on_the_first_one(tiny, change, position):
    """A cache of 16 slots would suffice for the prompt, but not for the token after it."""
    config = change(tiny, block_size=64, dropout=0.0, position=position).model
    params, prompts = random_params(config), np.random.default_rng(0).integers(0, 13, (500, 16))
    got = np.asarray(generate(config, params, prompts, 2, KEY, GREEDY))
    read = np.pad(np.append(prompts, got[:, :1], axis=1), [(0, 0), (0, 64 - 17)])
    logits = np.asarray(forward(config, params, read))[:, 16]
    np.testing.assert_allclose(logits[np.arange(500), got[:, 1]], logits.max(axis=-1), atol=1e-3)


def test_sampling_draws_from_softmax_at_temperature(tiny_model):
    config, params = tiny_model
    many = generate(config, params, np.full((20_000, 1), 3), 1, KEY, SamplingParams(2.0))
    counts = np.bincount(np.asarray(many)[:, 0], minlength=13) / 20_000
    expected = jax.nn.softmax(model.forward(config, params, jnp.array([[3]]))[0, 0] / 2)
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 20_000))


@pytest.mark.smoke
def test_top_k_of_one_is_greedy(tiny_model):
    config, params = tiny_model
    greedy = generate(config, params, [[1, 2]], 20, KEY, GREEDY)
    np.testing.assert_array_equal(generate(config, params, [[1, 2]], 20, KEY, SamplingParams(top_k=1)), greedy)


@pytest.mark.parametrize("n", [0, 1, CHUNK, CHUNK + 1, LONGEST + 3])
def test_concatenated_stream_equals_generate(tiny_model, n):
    config, params = tiny_model
    pieces = list(stream(config, params, [[1], [2]], n, KEY))
    whole = generate(config, params, [[1], [2]], n, KEY)
    assert whole.shape == (2, n)
    np.testing.assert_array_equal(np.concatenate([np.empty((2, 0)), *pieces], axis=1), whole)


def test_tokens_are_a_function_of_the_key(tiny_model):
    config, params = tiny_model
    one, two = (generate(config, params, [[1]], 30, KEY) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (generate(config, params, [[1]], 30, jax.random.key(1)) != one).any()


def test_sequence_does_not_depend_on_the_rest_of_its_batch(tiny_model):
    config, params = tiny_model
    prompts = np.array([[1], [1], [2]])
    together = generate(config, params, prompts, 20, KEY)
    np.testing.assert_array_equal(generate(config, params, prompts[:1], 20, KEY)[0], together[0])
    assert (together[0] != together[1]).any(), "each sequence has its own key"


def test_none_disables_filters_and_n_tokens_may_be_an_array_scalar(tiny_model):
    config, params = tiny_model
    off = SamplingParams(top_p=None, min_p=None)
    assert checked(off) == checked(checked(off)) == checked(SamplingParams())
    expected = generate(config, params, [[1, 2]], 3, KEY, GREEDY)
    for n in (np.int64(3), jnp.int32(3)):
        np.testing.assert_array_equal(generate(config, params, [[1, 2]], n, KEY, GREEDY), expected)


def test_padded_ids_are_never_drawn(tiny_model):
    config, params = tiny_model
    assert int(generate(config, params, np.full((50, 1), 1), 30, KEY, SamplingParams(5.0)).max()) >= 4
    assert int(generate(config, params, np.full((50, 1), 1), 30, KEY, SamplingParams(5.0, n_ids=4)).max()) < 4


@pytest.fixture
def compiled():
    """A function that returns how many programs JAX has compiled since the test began."""
    count = 0

    def listen(event, *_, **__):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.smoke
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_new_lengths_and_sampling_params_do_not_recompile(tiny, change, compiled, position):
    config = change(tiny, block_size=64, n_layer=1, position=position).model

    def write(P, n, temperature=0.7, top_p=0.8, min_p=0.2):
        sampling = SamplingParams(temperature, 0, top_p, min_p)
        args = config, random_params(config), np.ones((2, P), int), n, jax.random.key(n), sampling
        np.asarray(generate(*args))
        list(stream(*args))

    write(17, 100, 0.5, 0.9, 0.1)
    before = compiled()
    assert before > 0
    for P, n in ((18, 30), (32, 200), (25, 9)):
        write(P, n)
    assert compiled() == before
    write(18, 15)
    assert compiled() > before, "up to 32 tokens get a cache of 32 slots, half as many as before"
    before = compiled()
    write(33, 100)
    assert compiled() > before, "a prompt of 33 tokens is padded to 64"


@pytest.mark.parametrize("W", [1, 3, 8])
def test_rope_context_slides(tiny, change, W):
    config = change(tiny, dropout=0.0, position="rope", n_layer=1, block_size=W).model
    params, ids = random_params(config), [3]
    for _ in range(30):  # with one block, a sliding cache gives the logits of the last block_size tokens
        padded = np.zeros((1, W), int)
        padded[0, : len(ids[-W:])] = ids[-W:]
        ids.append(int(forward(config, params, padded)[0, len(ids[-W:]) - 1].argmax()))
    assert generate(config, params, [[3]], 30, KEY, GREEDY)[0].tolist() == ids[1:]


@pytest.mark.parametrize("block_size", [1, 3])
def test_shortest_block_sizes(tiny, change, block_size):
    config = change(tiny, block_size=block_size, n_layer=1).model
    got = generate(config, random_params(config), [[1, 2, 3, 4]], 9, KEY, GREEDY)[0].tolist()
    assert got == plain_loop(config, random_params(config), [1, 2, 3, 4], 9, lambda logits, i: logits.argmax())


def test_bigram_depends_on_the_last_token_only(tiny, change):
    config = change(tiny, kind="bigram").model
    table = 8 * np.random.default_rng(0).standard_normal((13, 13))
    ids = [4]
    for _ in range(20):
        ids.append(int(table[ids[-1]].argmax()))
    params = {"token_embedding_table": {"embedding": jnp.asarray(table, jnp.float32)}}
    assert generate(config, params, [[7, 4]], 20, KEY, GREEDY)[0].tolist() == ids[1:]


@pytest.mark.smoke
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_models_prompts_and_keys_can_be_mapped(tiny, change, position):
    """Beyond the context, too. Donation under `vmap` would warn, and warnings are errors."""
    config, keys = change(tiny, position=position).model, jax.random.split(KEY, 3)
    models = jax.vmap(partial(model.init_params, config))(keys)
    prompts = np.random.default_rng(0).integers(0, 13, (3, 2, 5))
    written = jax.vmap(lambda *mapped: generate(config, mapped[0], mapped[1], 20, mapped[2]))
    got = [written(models, prompts, keys), jax.jit(written)(models, prompts, keys)]
    for i in range(3):
        alone = generate(config, jax.tree.map(lambda x, i=i: x[i], models), prompts[i], 20, keys[i])
        for each in got:
            np.testing.assert_array_equal(each[i], alone)
    fixed = jax.vmap(lambda params: generate(config, params, prompts[0], 20, KEY))(models)
    first = jax.tree.map(lambda x: x[0], models)
    alone = generate(config, first, prompts[0], 20, KEY)
    np.testing.assert_array_equal(fixed[0], alone)
    np.testing.assert_array_equal(jax.jit(lambda: generate(config, first, prompts[0], 20, KEY))(), alone)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("options", [{}, {"top_k": 4, "top_p": 0.6}, {"min_p": 0.3}])
def test_numbers_of_sampling_can_be_traced(tiny, change, position, options):
    """At temperature 0, top_p 1 and min_p 0 too, which have other programs if they are concrete."""
    config = change(tiny, position=position, dropout=0.0).model
    params, temperatures = random_params(config), [0.0, 0.5, 20.0]

    def write(sampling):
        return generate(config, params, [[1, 2], [3, 4]], 20, KEY, sampling)

    samplings = [SamplingParams(t, **options) for t in temperatures]
    alone = [write(sampling) for sampling in samplings]
    mapped = jax.vmap(lambda t: write(SamplingParams(t, **options)))(jnp.array(temperatures))
    np.testing.assert_array_equal(mapped, alone)
    np.testing.assert_array_equal([jax.jit(write)(sampling) for sampling in samplings], alone)


def test_traced_top_p_of_one_keeps_tokens_after_the_rounded_sum_is_one():
    kept = jax.jit(lambda p: top_p(jnp.array([0.0, -20.0, -20.0]), checked(SamplingParams(top_p=p)).top_p))
    assert np.isfinite(kept(1.0)).all()
    assert np.isfinite(kept(0.9)).tolist() == [True, False, False]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_generate_in_a_shard_map(tiny_model, axis_type):
    config, params = tiny_model
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    prompts, keys = np.arange(8)[:, None], jax.random.split(KEY, 8)

    def write(prompt, key, temperature):
        return generate(config, params, prompt, 20, key[0], SamplingParams(temperature[0]))

    for mapped in (
        (prompts, keys[:1], jnp.ones(1)),
        (prompts[:1], keys, jnp.ones(1)),
        (prompts[:1], keys[:1], jnp.arange(8.0)),
    ):
        specs = tuple(PartitionSpec("d") if len(x) == 8 else PartitionSpec() for x in mapped)
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(mapped, specs, strict=True)]
        got = jax.jit(jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("d")))(*placed)
        alone = [write(*(x[i % len(x)][None] for x in mapped))[0] for i in range(8)]
        np.testing.assert_array_equal(got, alone)


def test_keys_are_folded_by_sequence_and_token_number(tiny_model):
    config, params = tiny_model
    got = generate(config, params, [[1, 2], [1, 2]], 12, KEY, SamplingParams(0.7, 5, min_p=0.01))

    @jax.jit
    def choose(key, logits, i):
        logits = min_p(top_k(logits / 0.7, 5), 0.01)
        return jax.random.categorical(jax.random.fold_in(key, i), logits)

    for b in range(2):
        key = jax.random.fold_in(KEY, b)
        assert got[b].tolist() == plain_loop(config, params, [1, 2], 12, partial(choose, key))


def test_tiny_top_p_and_min_p_of_one_are_greedy(tiny_model):
    config, params = tiny_model
    greedy = generate(config, params, [[1, 2]], 20, KEY, GREEDY)
    for options in ({"top_p": 1e-6}, {"min_p": 1.0}):
        np.testing.assert_array_equal(generate(config, params, [[1, 2]], 20, KEY, SamplingParams(**options)), greedy)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "at least one token"),
        ([1, 2], {}, r"expected \(B, P\)"),
        (5, {}, r"shape \(\) and dtype int64, expected \(B, P\)"),
        (np.zeros((0, 3)), {}, "at least one token"),
        ([[1, 99]], {}, "ids from 1 to 99, expected ids from 0 to 1"),
        ([[1, 13]], {}, "ids from 1 to 13, expected ids from 0 to 12"),
        ([[-1, 1]], {}, "ids from -1 to 1"),
        ([[0.7, 1.9]], {}, r"shape \(1, 2\) and dtype float64, expected \(B, P\) integers"),
        (np.array([[1, 2**32 + 1]]), {}, "ids from 1 to 4294967297"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": float("inf")}, "temperature is inf"),
        ([[1]], {"temperature": 1e-40}, "temperature is 1e-40"),
        ([[1]], {"temperature": np.array([0.5, 1.0])}, r"temperature has shape \(2,\), expected one number"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0, expected a number above 0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"min_p": -0.1}, "min_p is -0.1, expected a number from 0"),
        ([[1]], {"min_p": float("nan")}, "min_p is nan"),
        ([[1]], {"n_ids": 99}, r"n_ids is 99, expected 0 \(all\) to 13"),
        ([[1]], {"n_ids": -1}, "n_ids is -1"),
    ],
)
def test_bad_arguments_are_refused(tiny_model, prompt, options, message):
    config, params = tiny_model
    with pytest.raises(ValueError, match=message):
        generate(config, params, prompt, 5, KEY, SamplingParams(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"tie_weights": True, "bias": True, "scan_layers": True, "softcap": 5.0},
        {"position": "rope", "mlp": "swiglu", "n_kv_head": 1, "smear": True, "bigram_embed": True},
    ],
)
def test_precast_kernels_give_the_same_tokens_and_logits(tiny, change, options):
    config = change(tiny, dropout=0.0, precision="bfloat16", **options).model
    params = random_params(config)
    cast = cast_kernels(config, params)
    kernels, found = (
        {path[:-1]: x for path, x in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == name}
        for tree, name in ((model.unstacked(params), "kernel"), (cast[1], "transposed"))
    )
    for path, kernel in kernels.items():
        np.testing.assert_array_equal(found[path], kernel.T.astype(jnp.bfloat16), strict=True)
    prompts = np.random.default_rng(0).integers(0, 13, (5, 6))
    drawn = (generate(*of, prompts, 20, KEY, SamplingParams(2.0)) for of in ((config, params), cast))
    np.testing.assert_array_equal(*drawn)
    extend = jax.jit(model.extend, static_argnums=0)
    for idx in (prompts, prompts[:1, :1]):
        before, after = (extend(*of, init_cache(config, len(idx), 8), idx)[0] for of in ((config, params), cast))
        np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_bigram_has_no_kernels_to_cast_on_a_gpu(tiny, change, monkeypatch):
    config = change(tiny, kind="bigram", precision="bfloat16").model
    params = random_params(config)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert for_decoding(config, params)[1] is params
