import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import nn
from jaxgpt.sampling.generate import CHUNK, generate, stream
from jaxgpt.training.step import init_state

KEY = jax.random.key(0)


@pytest.fixture
def model(tiny, change):
    config = change(tiny, dropout=0.0)
    params = jax.tree.map(lambda x: 8 * x, init_state(config).params)  # far from uniform, so that a fault shows
    return config.model, params


def by_hand(config, params, prompt, n, choose):
    """Greedy or sampled continuation, one forward pass of the visible tokens a step, in plain Python."""
    ids = list(prompt)
    for i in range(n):
        seen = jnp.array([ids[-config.block_size :]])
        ids.append(int(choose(nn.forward(config, params, seen)[0, -1], i)))
    return ids[len(prompt) :]


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1, 5, 8, 30])
def test_greedy_is_the_plain_loop_for_short_and_long_prompts(model, length):
    config, params = model
    prompt = np.random.default_rng(length).integers(0, 13, length)
    got = generate(config, params, prompt[None], 20, KEY, temperature=0)
    assert got[0].tolist() == by_hand(config, params, prompt, 20, lambda logits, i: logits.argmax())


def test_sampling_draws_from_the_softmax_at_that_temperature(model):
    config, params = model
    many = generate(config, params, np.full((20_000, 1), 3), 1, KEY, temperature=2.0)
    counts = np.bincount(np.asarray(many)[:, 0], minlength=13) / 20_000
    expected = jax.nn.softmax(nn.forward(config, params, jnp.array([[3]]))[0, 0] / 2)
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 20_000))


@pytest.mark.smoke
def test_top_k_of_one_is_greedy(model):
    config, params = model
    greedy = generate(config, params, [[1, 2]], 20, KEY, temperature=0)
    np.testing.assert_array_equal(generate(config, params, [[1, 2]], 20, KEY, top_k=1), greedy)


@pytest.mark.parametrize("n", [0, 1, CHUNK, 2 * CHUNK + 3])
def test_a_stream_joined_is_the_whole(model, n):
    config, params = model
    pieces = list(stream(config, params, [[1], [2]], n, KEY))
    whole = generate(config, params, [[1], [2]], n, KEY)
    assert whole.shape == (2, n)
    np.testing.assert_array_equal(np.concatenate([np.empty((2, 0)), *pieces], axis=1), whole)


def test_the_same_key_writes_the_same_and_another_key_something_else(model):
    config, params = model
    one, two = (generate(config, params, [[1]], 30, KEY) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (generate(config, params, [[1]], 30, jax.random.key(1)) != one).any()


def test_a_sequence_does_not_depend_on_the_rest_of_its_batch(model):
    config, params = model
    prompts = np.array([[1], [1], [2]])
    together = generate(config, params, prompts, 20, KEY)
    np.testing.assert_array_equal(generate(config, params, prompts[:1], 20, KEY)[0], together[0])
    assert (together[0] != together[1]).any(), "equal prompts are continued differently"


def test_padded_ids_are_never_drawn(model):
    config, params = model
    assert int(generate(config, params, np.full((50, 1), 1), 30, KEY, temperature=5.0).max()) >= 4
    assert int(generate(config, params, np.full((50, 1), 1), 30, KEY, temperature=5.0, n_ids=4).max()) < 4


def test_another_temperature_compiles_nothing(model):
    from jaxgpt.sampling.generate import _advance

    config, params = model
    generate(config, params, [[1]], 7, KEY, temperature=0.5)
    compiled = _advance._cache_size()
    generate(config, params, [[2, 3]], 7, KEY, temperature=0.7)
    assert _advance._cache_size() == compiled


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ([[]], {}, "at least one token"),
        ([1, 2], {}, r"expected \(B, P\)"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": 1e-40}, "temperature is 1e-40"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
    ],
)
def test_refusals(model, prompt, options, said):
    config, params = model
    with pytest.raises(ValueError, match=said):
        generate(config, params, prompt, 5, KEY, **options)
