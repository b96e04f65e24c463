from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.attention import init_cache
from jaxgpt.sample import CHUNK, LONGEST, SamplingParams, cast_kernels, checked, generate, min_p, stream, top_k

KEY = jax.random.key(0)
GREEDY = SamplingParams(0)
forward = jax.jit(model.forward, static_argnums=0)


@lru_cache
def weights(config):
    """Parameters none of which is zero, far from a uniform guess, so that a fault shows."""
    shapes, rng = jax.eval_shape(partial(model.init_params, config), KEY), np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape) + (x.ndim == 1), x.dtype), shapes)


@pytest.fixture
def tiny_model(tiny, change):
    config = change(tiny, dropout=0.0).model
    return config, weights(config)


def by_hand(config, params, prompt, n, choose):
    """Greedy or sampled continuation in plain Python: one forward pass of the visible tokens a step.

    Those are the last block_size of the prompt and all that follow; when block_size were read, half of them.
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
def test_greedy_is_the_plain_loop_for_short_and_long_prompts(tiny_model, length):
    config, params = tiny_model
    prompt = np.random.default_rng(length).integers(0, 13, length)
    got = generate(config, params, prompt[None], 20, KEY, GREEDY)
    assert got[0].tolist() == by_hand(config, params, prompt, 20, lambda logits, i: logits.argmax())


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_cache_smaller_than_block_size_holds_all_that_is_read(tiny, change, position):
    """A prompt of 3 and 20 more, of which the last is not read, get 32 slots of 64; so do the 17 that 15 more make."""
    config = change(tiny, block_size=64, dropout=0.0, position=position).model
    params, ids = weights(config), np.random.default_rng(0).integers(0, 13, (64, 3))
    prompts = ids
    for n in range(3, 23):
        logits = forward(config, params, np.pad(ids, [(0, 0), (0, 64 - n)]))[:, n - 1]
        ids = np.append(ids, logits.argmax(axis=-1)[:, None], axis=1)
    for n in (20, 15):
        got = generate(config, params, prompts, n, KEY, GREEDY)
        np.testing.assert_array_equal(got, ids[:, 3 : 3 + n])


def test_sampling_draws_from_the_softmax_at_that_temperature(tiny_model):
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
def test_a_stream_joined_is_the_whole(tiny_model, n):
    config, params = tiny_model
    pieces = list(stream(config, params, [[1], [2]], n, KEY))
    whole = generate(config, params, [[1], [2]], n, KEY)
    assert whole.shape == (2, n)
    np.testing.assert_array_equal(np.concatenate([np.empty((2, 0)), *pieces], axis=1), whole)


def test_the_same_key_writes_the_same_and_another_key_something_else(tiny_model):
    config, params = tiny_model
    one, two = (generate(config, params, [[1]], 30, KEY) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (generate(config, params, [[1]], 30, jax.random.key(1)) != one).any()


def test_a_sequence_does_not_depend_on_the_rest_of_its_batch(tiny_model):
    config, params = tiny_model
    prompts = np.array([[1], [1], [2]])
    together = generate(config, params, prompts, 20, KEY)
    np.testing.assert_array_equal(generate(config, params, prompts[:1], 20, KEY)[0], together[0])
    assert (together[0] != together[1]).any(), "equal prompts are continued differently"


def test_a_filter_of_none_is_off_and_a_number_of_tokens_may_be_numpys(tiny_model):
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
    """How many programs were compiled since, by JAX's own count."""
    count = 0

    def listen(event, *_, **__):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.smoke
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_another_prompt_length_number_of_tokens_or_temperature_compiles_nothing(tiny, change, compiled, position):
    config = change(tiny, block_size=64, n_layer=1, position=position).model

    def write(P, n, temperature=0.7, top_p=0.8, min_p=0.2):
        sampling = SamplingParams(temperature, 0, top_p, min_p)
        given = config, weights(config), np.ones((2, P), int), n, jax.random.key(n), sampling
        np.asarray(generate(*given))
        list(stream(*given))

    write(17, 100, 0.5, 0.9, 0.1)
    before = compiled()
    assert before > 0
    for P, n in ((18, 30), (32, 200), (25, 9)):
        write(P, n)
    assert compiled() == before
    write(18, 15)
    assert compiled() > before, "no more than 32 tokens get a cache of 32, half as much to look back on"
    before = compiled()
    write(33, 100)
    assert compiled() > before, "prompts of 33 and more are padded to 64"


def test_rotated_positions_slide(tiny, change):
    config = change(tiny, dropout=0.0, position="rope", n_layer=1).model
    params, ids = weights(config), [3]
    for _ in range(30):  # with one block, sliding is reading the last block_size tokens again
        padded = np.zeros((1, 8), int)
        padded[0, : len(ids[-8:])] = ids[-8:]
        ids.append(int(forward(config, params, padded)[0, len(ids[-8:]) - 1].argmax()))
    assert generate(config, params, [[3]], 30, KEY, GREEDY)[0].tolist() == ids[1:]


@pytest.mark.parametrize("block_size", [1, 3])
def test_the_shortest_contexts(tiny, change, block_size):
    for position in ("learned", "rope"):
        config = change(tiny, block_size=block_size, n_layer=1, position=position).model
        got = generate(config, weights(config), [[1, 2, 3, 4]], 9, KEY, GREEDY)[0].tolist()
        if position == "learned":
            assert got == by_hand(config, weights(config), [1, 2, 3, 4], 9, lambda logits, i: logits.argmax())
        assert len(got) == 9


def test_a_bigram_sees_the_last_token_alone(tiny, change):
    config = change(tiny, kind="bigram").model
    table = 8 * np.random.default_rng(0).standard_normal((13, 13))
    ids = [4]
    for _ in range(20):
        ids.append(int(table[ids[-1]].argmax()))
    params = {"token_embedding_table": {"embedding": jnp.asarray(table, jnp.float32)}}
    assert generate(config, params, [[7, 4]], 20, KEY, GREEDY)[0].tolist() == ids[1:]


def test_tokens_are_drawn_with_the_key_of_their_sequence_and_number(tiny_model):
    config, params = tiny_model
    got = generate(config, params, [[1, 2], [1, 2]], 12, KEY, SamplingParams(0.7, 5, min_p=0.01))

    @jax.jit
    def choose(key, logits, i):
        logits = min_p(top_k(logits / 0.7, 5), 0.01)
        return jax.random.categorical(jax.random.fold_in(key, i), logits)

    for b in range(2):
        key = jax.random.fold_in(KEY, b)
        assert got[b].tolist() == by_hand(config, params, [1, 2], 12, partial(choose, key))


def test_the_smallest_nucleus_and_the_greatest_share_are_greedy(tiny_model):
    config, params = tiny_model
    greedy = generate(config, params, [[1, 2]], 20, KEY, GREEDY)
    for how in ({"top_p": 1e-6}, {"min_p": 1.0}):
        np.testing.assert_array_equal(generate(config, params, [[1, 2]], 20, KEY, SamplingParams(**how)), greedy)


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ([[]], {}, "at least one token"),
        ([1, 2], {}, r"expected \(B, P\)"),
        (np.zeros((0, 3)), {}, "at least one token"),
        ([[1, 99]], {}, "ids from 1 to 99, expected ids from 0 to 1"),
        ([[-1, 1]], {}, "ids from -1 to 1"),
        ([[0.7, 1.9]], {}, r"shape \(1, 2\) and dtype float64, expected \(B, P\) integers"),
        (np.array([[1, 2**32 + 1]]), {}, "ids from 1 to 4294967297"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": 1e-40}, "temperature is 1e-40"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0, expected a number above 0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"min_p": -0.1}, "min_p is -0.1, expected a number from 0"),
        ([[1]], {"min_p": float("nan")}, "min_p is nan"),
        ([[1]], {"n_ids": 99}, r"n_ids is 99, expected 0 \(all\) to 13"),
        ([[1]], {"n_ids": -1}, "n_ids is -1"),
    ],
)
def test_refusals(tiny_model, prompt, options, said):
    config, params = tiny_model
    with pytest.raises(ValueError, match=said):
        generate(config, params, prompt, 5, KEY, SamplingParams(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"tie_weights": True, "bias": True, "scan_layers": True, "softcap": 5.0},
        {"position": "rope", "mlp": "swiglu", "n_kv_head": 1, "smear": True, "bigram_embed": True},
    ],
)
def test_kernels_cast_beforehand_give_the_same_tokens_and_logits(tiny, change, options):
    config = change(tiny, dropout=0.0, precision="bfloat16", **options).model
    params = weights(config)
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
        np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)  # sums in another order
