"""The rungs of the ladder: their scores against plain loops, exact counts and the lecture's losses; the command."""

import json
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import cli
from jaxgpt.display.baselines import ngram_losses
from jaxgpt.lecture import ladder
from jaxgpt.lecture.model import forward, init_params
from jaxgpt.prepare import sources
from jaxgpt.tokenizer import CharTokenizer

RUNGS = {rung.name: rung for rung in ladder.RUNGS}
NETWORKS = [rung.name for rung in ladder.RUNGS if rung.kind == "transformer"]
V = 5


def small_rung(name, **changes):
    """The rung at a size that compiles quickly."""
    return replace(
        RUNGS[name], **{"channels": 8, "block_size": 4, "batch_size": 4, "n_layer": 1, "steps": 40} | changes
    )


def chain(n, seed=0):
    """Ids (n,) from a Markov chain of V states whose transitions are far from uniform."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(V, 0.4), V)
    ids = [0]
    for _ in range(n - 1):
        ids.append(rng.choice(V, p=transitions[ids[-1]]))
    return np.array(ids, np.uint16)


def conditional_entropy(tokens):
    pairs = np.zeros((V, V))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    conditional = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    return -(pairs[pairs > 0] * np.log(conditional[pairs > 0])).sum() / pairs.sum()


def test_score_against_a_plain_loop():
    val, rung = chain(41, seed=1), replace(RUNGS["bigram"], block_size=8)
    params = init_params(rung, V, jax.random.key(0))
    logits = np.asarray(params["table"], np.float64)
    longer = np.append(val, val[:7])  # seven more tokens do not fill another window; they are scored too
    for ids, B in ((val, 256), (val, 2), (longer, 256)):
        losses = [np.log(np.exp(logits[now]).sum()) - logits[now, after] for now, after in pairwise(ids)]
        np.testing.assert_allclose(ladder.score(rung, params, ids, B), np.mean(losses), rtol=1e-6)


def test_counted_rungs_have_the_baselines_of_the_report():
    train, val = chain(300), chain(47, seed=1)
    found = ngram_losses(train, val, V)
    results = list(ladder.climb(ladder.RUNGS[:3], train, val, CharTokenizer("abcde")))
    assert [result.loss for result in results] == list(found.values())
    assert [result.n_params for result in results] == [5, 5, 25]
    assert found["uniform"] == pytest.approx(np.log(V))


def test_the_loss_of_the_counted_bigram_is_near_the_conditional_entropy():
    train = chain(20_001)
    (result,) = ladder.climb([RUNGS["bigram counts"]], train, train, CharTokenizer("abcde"))
    limit = conditional_entropy(train)
    assert limit - 1e-6 < result.loss < limit + 1e-3


def test_the_trained_bigram_approaches_the_conditional_entropy():
    train, rung = chain(2001), replace(RUNGS["bigram"], learning_rate=3e-2)
    limit = conditional_entropy(train)
    fresh = ladder.learn(replace(rung, steps=0), train, V, seed=0)
    assert ladder.score(RUNGS["bigram"], fresh, train) > limit + 0.3
    trained = ladder.learn(replace(rung, steps=300), train, V, seed=0)
    assert limit - 1e-6 < ladder.score(RUNGS["bigram"], trained, train) < limit + 0.02


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rung_attends_only_to_the_past(name):
    rung = small_rung(name)
    T, params = rung.block_size, init_params(rung, V, jax.random.key(0))
    idx = jnp.array([[0, 1, 2, 3]])

    def logits(offsets):
        """Logits with offsets (T, C) added to the token embeddings, by position."""
        shifted = params | {"tokens": params["tokens"][idx[0]] + offsets}
        return forward(rung, shifted, jnp.arange(T)[None])[0]

    jacobian = np.asarray(jax.jacobian(logits)(jnp.zeros((T, rung.channels))))  # (T, V, T, C)
    np.testing.assert_array_equal(np.abs(jacobian).sum(axis=(1, 3)) > 0, np.tri(T, dtype=bool))
    assert forward(rung, params, idx).shape == (1, T, V)
    assert forward(rung, params, idx[:, :2]).shape == (1, 2, V)


def test_dropout_needs_a_key():
    rung = small_rung("dropout and scale", dropout=0.5)
    params, idx = init_params(rung, V, jax.random.key(0)), jnp.array([[0, 1, 2, 3]])
    plain = forward(rung, params, idx)
    one, same, other = (forward(rung, params, idx, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, plain)
    np.testing.assert_array_equal(plain, forward(replace(rung, dropout=0.0), params, idx, jax.random.key(1)))


def n_params(rung, V):
    """The number of parameters of a rung, counted by hand."""
    C, T, F = rung.channels, rung.block_size, rung.feed_forward * rung.channels
    block = 3 * C * C  # key, query, value
    block += C * C + C if rung.residual else 0  # the projection
    block += (C * F + F if F else 0) + (F * C + C if rung.feed_forward > 1 else 0)
    block += 4 * C if rung.layer_norm else 0
    return V * C + T * C + rung.n_layer * block + (2 * C if rung.layer_norm else 0) + C * V + V


SIZES = {
    "bigram": 4225,
    "one head": 7553,
    "four heads": 7553,
    "feed-forward": 8609,
    "residual": 41_921,
    "layer norm": 42_369,
    "dropout and scale": 816_705,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_of_each_rung(name):
    shapes = jax.eval_shape(lambda key: init_params(RUNGS[name], 65, key), jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert size == SIZES[name]
    if name in NETWORKS:
        assert size == n_params(RUNGS[name], 65)


def test_the_full_rung_has_the_lecture_s_ten_million_parameters():
    shapes = jax.eval_shape(lambda key: init_params(ladder.FULL, 65, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == n_params(ladder.FULL, 65) == 10_788_929


@pytest.mark.parametrize("name", ["bigram", "one head"])
def test_initial_parameters_are_distributed_as_in_pytorch(name):
    params, C = init_params(RUNGS[name], 65, jax.random.key(0)), 32
    if name == "bigram":
        assert np.std(params["table"]) == pytest.approx(1.0, rel=0.05)
        return
    assert np.std(params["tokens"]) == pytest.approx(1.0, rel=0.05)
    kernel = np.asarray(params["blocks"][0]["key"]["kernel"])
    assert 0.95 * C**-0.5 < np.abs(kernel).max() <= C**-0.5
    assert np.std(kernel) == pytest.approx((3 * C) ** -0.5, rel=0.08)
    assert 0 < np.abs(params["head"]["bias"]).max() <= C**-0.5


def climb(seed=3, **changes):
    ids = chain(600)
    rung = small_rung("feed-forward", learning_rate=1e-2, **changes)
    (result,) = ladder.climb((rung,), ids[:500], ids[500:], CharTokenizer("abcde"), seed, sample=12)
    return result


def test_learning_lowers_the_loss_and_depends_on_the_seed_alone():
    before, after, again, other = climb(steps=0), climb(steps=100), climb(steps=100), climb(steps=100, seed=4)
    assert after.loss < before.loss - 0.2
    assert (again.loss, again.sample) == (after.loss, after.sample)
    assert other.loss != after.loss
    assert len(after.sample) == 12


RUNG_NAMES = ("uniform", "bigram counts", "bigram", "dropout and scale")


@pytest.fixture
def lecture(tmp_path, monkeypatch, capsys):
    """Run the command on small rungs: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(ladder, "RUNGS", tuple(small_rung(name) for name in RUNG_NAMES))
    monkeypatch.setattr(ladder, "FULL", small_rung("dropout and scale", about="in full"))

    def run(*args):
        code = cli.run_command(["lecture", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def test_programs_of_500_steps_have_different_dropout_keys(monkeypatch):
    keys = []
    monkeypatch.setattr(ladder, "_train", lambda rung, state, tokens, starts, key: keys.append(key) or state)
    ladder.learn(small_rung("dropout and scale", steps=1001), chain(100), V, 0)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys) == 3


def test_the_command_prints_draws_and_writes(lecture, verse, tmp_path):
    code, out, _ = lecture("--corpus", verse, "--steps", 2, "--plot", "lecture.png", "--json", "lecture.json")
    assert code == 0, out
    assert all(f"{name}: " in out for name in RUNG_NAMES)
    assert " (lecture: 2.5), " in out
    assert " (lecture: 1.48 at 6 layers, 384 channels, context 256), " in out
    assert (tmp_path / "lecture.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "lecture.json").read_text("utf-8"))
    assert [each["rung"]["name"] for each in written["rungs"]] == list(RUNG_NAMES)
    assert all(each["rung"]["steps"] == 2 for each in written["rungs"] if each["rung"]["kind"] == "transformer")
    assert written["rungs"][0]["loss"] == pytest.approx(np.log(11), abs=1e-6)
    assert written["seed"] == 1337


def test_results_are_written_even_if_the_chart_cannot_be(lecture, verse, tmp_path, monkeypatch):
    def full(spec, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("jaxgpt.display.charts.save", full)
    code, _, err = lecture("--corpus", verse, "--steps", 1, "--plot", "a.png", "--json", "a.json")
    assert (code, err) == (1, "jaxgpt: a.png: No space left on device\n")
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["rungs"]


def test_the_command_with_full_writes_only_the_corpus(lecture, verse, tmp_path):
    code, out, _ = lecture("--corpus", verse, "--steps", 1, "--full")
    assert code == 0
    assert "in full" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "-1"], "steps is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--plot", "no/such/a.png"], "no folder no/such"),
        (["--json", "no/such/a.json"], "no folder no/such"),
        (["--plot", "a.json", "--json", "./a.json"], "a.json is for another result: name another file, --json FILE"),
        (["--plot", "a.jpeg"], "expected one of .png, .svg, .pdf"),
        (["--corpus", "nowhere"], "no corpus, file or folder 'nowhere'"),
    ],
)
def test_bad_options_are_refused_before_any_work(lecture, tmp_path, args, message):
    code, out, err = lecture(*(["--corpus", "python-docs"] if "--corpus" not in args else []), *args)
    assert code == 2
    assert message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.optimized
def test_each_rung_up_to_layer_norm_comes_within_0_05_of_the_lecture(shakespeare):
    """Rungs of 5,000 steps train only 4,000 here."""
    text = shakespeare.read_text("utf-8")
    tokenizer = CharTokenizer.train(text)
    assert len(text) == sources.SHAKESPEARE_BYTES
    ids = tokenizer.encode(text).astype(np.uint16)
    train, val = np.split(ids, [int(0.9 * len(ids))])
    rungs = [rung for rung in ladder.RUNGS if rung.lecture and not rung.lecture_size]
    rungs = [replace(rung, steps=min(4000, rung.steps)) for rung in rungs]
    assert [rung.name for rung in rungs][:: len(rungs) - 1] == ["bigram", "layer norm"]
    for result in ladder.climb(rungs, train, val, tokenizer, sample=0):
        print(result.rung.name, result.loss)
        nearest = np.clip(result.loss, min(result.rung.lecture), max(result.rung.lecture))
        assert abs(result.loss - nearest) <= 0.05, result.rung.name
