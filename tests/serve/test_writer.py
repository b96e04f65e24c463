"""A job gets the tokens of `generate`, alone or in a batch, whichever other jobs come and go."""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.diagnostics import inside
from jaxgpt.sample import SamplingParams, checked, generate, next_tokens
from jaxgpt.serve import batch
from jaxgpt.serve import writer as writers
from jaxgpt.serve.batch import Drawn, Settings
from jaxgpt.serve.writer import End, Job, Looked, Piece, Writer

GREEDY, SHARP = Settings(0.0, 0, 1.0, 0.0), Settings(1.2, 7, 0.9, 0.05)
REQUESTS = [  # prompt length, tokens, settings, seed
    (1, 30, GREEDY, 1337),
    (3, 41, SHARP, 1),
    (8, 20, SHARP, 2),
    (30, 25, SHARP, 2**32 - 1),
    (5, 1, GREEDY, 1337),
]


@pytest.fixture(scope="module")
def models():
    found = {}
    for position in ("learned", "rope"):
        config = ModelConfig(vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16, position=position)
        params = jax.jit(model.init_params, static_argnums=0)(config, jax.random.key(0))
        found[position] = config, jax.tree.map(lambda x: 8 * x, params)  # far from uniform, so that errors show
    return found


forward = jax.jit(model.forward, static_argnums=0)


def softmax(logits):
    exps = np.exp(np.asarray(logits) - logits.max())
    return exps / exps.sum()


def make_job(i, requests=REQUESTS):
    length, *fields = requests[i % len(requests)]
    return Job("run", np.random.default_rng(i).integers(0, 12, length).tolist(), *fields)


def generate_alone(model, job):
    """The tokens of `generate` for this job alone, restricted to the first 12 ids."""
    sampling = SamplingParams(*job.settings, n_ids=12)
    return generate(*model, [job.ids], job.tokens, jax.random.key(job.seed), sampling)[0].tolist()


def messages(jobs, writer, cancelled=None):
    """The messages to each job, until all have ended; one may be cancelled after two turns."""
    sent = [[] for _ in jobs]
    for job, mine in zip(jobs, sent, strict=True):
        job.put = mine.append
    for turn in range(500):
        jobs = [job for job in jobs if turn < 2 or job is not cancelled]
        if not jobs:
            return sent
        done = writer.turn(jobs)
        for job in done:
            job.put(End())
        jobs = [job for job in jobs if job not in done]
    raise AssertionError("the jobs never end")


def ids(pieces):
    return [i for piece in pieces if isinstance(piece, Piece) for i in piece.drawn.token.tolist()]


@pytest.mark.parametrize(
    ("position", "requests"),
    [("learned", 2 * REQUESTS), ("rope", [(2 + 3 * i, n, SHARP, i) for i, n in enumerate((9, 30, 30, 30))])],
)
def test_every_job_gets_the_tokens_of_generate_with_fewer_rows_than_jobs(models, position, requests):
    """With 3 rows, jobs wait, take the rows of finished jobs, and are read while others decode. With rope, the last is
    read into the first row, while the caches of the other two, which are never read again, must stay as they are."""
    model = models[position]
    jobs = [make_job(i, requests) for i in range(len(requests))]
    expected = [generate_alone(model, job) for job in jobs]
    writer = Writer(*model, 12, 3)
    assert writer.widths == [1, 3]
    if position == "rope":
        writer.widths = [3]  # compiles one program less
    for pieces, text in zip(messages(jobs, writer), expected, strict=True):
        assert ids(pieces) == text
        assert pieces[-1] == End()
        assert not any(isinstance(each, End) for each in pieces[:-1])


def test_cancelled_job_frees_its_row_and_does_not_affect_others(models):
    model = models["learned"]
    writer = Writer(*model, 12, 3)
    jobs = [make_job(1), Job("run", [1], 10**6), make_job(0), make_job(1)]
    expected = [generate_alone(model, job) if job.tokens < 100 else None for job in jobs]
    sent = messages(jobs, writer, jobs[1])
    assert not any(isinstance(each, End) for each in sent[1])
    assert 0 < len(ids(sent[1])) < 100
    for i in (0, 2, 3):
        assert ids(sent[i]) == expected[i]


def test_the_caches_of_all_rows_fit_into_their_memory(models, monkeypatch):
    config, params = models["learned"]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch.empty(config, 1).cache))
    for memory, n_rows in ((9 * size, 5), (2 * size, 2), (2 * size - 1, 1), (size - 1, 1)):
        monkeypatch.setattr(writers, "MEMORY", memory)
        assert len(Writer(config, params, 12, 5).rows.token) == n_rows


@pytest.fixture
def clock(monkeypatch):
    """The time of the writer in seconds, the last of a list."""
    now = [100.0]
    monkeypatch.setattr(writers, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    return now


def draw_zeros(n, N):
    return Drawn(*4 * [np.zeros((n, N), np.int32)])


def test_prompts_are_read_in_the_order_of_their_wait_until_it_is_time_to_decode(models, clock, monkeypatch):
    """Each read takes two fifths of the pace."""
    writer, read, decoded = Writer(*models["learned"], 12, 5), [], []

    def read_one(unread):
        unread[0].read = 1
        read.append(unread[0])
        clock.append(clock[-1] + 0.4 * writers.PACE)

    monkeypatch.setattr(writer, "_read", read_one)
    monkeypatch.setattr(writer, "_decode", decoded.extend)
    jobs = [Job("run", [1], 9, row=row, since=since) for row, since in enumerate((4.0, 2.0, 5.0, 1.0, 3.0))]
    writer.turn(jobs)
    assert [job.since for job in read] == [1, 2, 3]
    assert [job.since for job in decoded] == [2, 1, 3], "those that are read, by row"


def test_a_decode_takes_no_longer_than_the_pace(models, clock, monkeypatch):
    writer, asked = Writer(*models["rope"], 12, 3), []

    def decode(config, params, rows, n, N, n_ids):
        asked.append(int(n))
        clock.append(clock[-1] + 0.3 * writers.PACE * n)
        return rows, draw_zeros(n, N)

    monkeypatch.setattr(batch, "decode", decode)
    job = Job("run", [1], 99, row=0, read=1)
    for _ in range(2):
        writer._decode([job])
    assert asked == [batch.CHUNK, 3]
    writer.seconds = 2 * writers.PACE
    writer._decode([job])
    assert asked[2:] == [1]
    assert (len(job.ids), job.tokens) == (1 + sum(asked), 99 - sum(asked))


def test_a_job_whose_context_restarts_waits_behind_the_others(models, clock):
    job = Job("run", list(range(8)), 9, row=0, read=8, since=1.0)
    Writer(*models["learned"], 12, 3)._send(job, 0, draw_zeros(1, 1), 1)
    assert (job.read, job.since) == (0, clock[-1])


def test_prompts_that_are_read_at_once_are_short(models, monkeypatch):
    monkeypatch.setattr(writers, "READ", 16)
    shapes = []

    def read(config, params, rows, new, n_ids):
        shapes.append(new["idx"].shape)
        return rows, draw_zeros(1, len(new["row"]))

    monkeypatch.setattr(batch, "read", read)
    Writer(*models["learned"], 12, 8)._read([Job("run", [1] * 8, 9, row=row) for row in range(8)])
    assert shapes == [(2, 8)]


def test_a_turn_answers_one_look(models):
    writer, answered = Writer(*models["learned"], 12, 3), []
    text = Job("run", [1], 10**6, put=lambda piece: answered.append("text"))
    looks = [Job("run", [i], put=lambda looked, i=i: answered.append(i)) for i in range(6)]
    jobs = [looks[0], looks[1], looks[5], text]  # the others were cancelled
    for _ in range(3):
        (done,) = writer.turn(jobs)
        jobs.remove(done)
    assert [each for each in answered if each != "text"] == [0, 1, 5]
    assert all("text" in pair for pair in itertools.pairwise(answered)), "a text waits for at most one look"
    assert writer.turn(jobs) == []


def test_failed_look_does_not_affect_texts(models, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(batch, "look", fail)
    look, text = messages([Job("run", [1]), make_job(1)], Writer(*models["learned"], 12, 3))
    assert look[0] == End("out of memory")
    assert ids(text) == generate_alone(models["learned"], make_job(1))


def test_probabilities_match_forward(models):
    """Before temperature and filters, in the context that begins at `first`."""
    config, params = models["learned"]
    (sent,) = messages([job := make_job(3)], Writer(config, params, 12, 3))
    at = 30
    for piece in sent[:-1]:
        for n, token in enumerate(piece.drawn.token.tolist()):
            context = job.ids[piece.first : at]
            padded = np.zeros((1, 8), np.int32)
            padded[0, : len(context)] = context
            p = softmax(forward(config, params, padded)[0, len(context) - 1, :12])
            np.testing.assert_allclose(piece.drawn.p[n], p[token], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(piece.drawn.likely_p[n], np.sort(p)[::-1][:8], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(p[piece.drawn.likely[n]], piece.drawn.likely_p[n], rtol=1e-4, atol=1e-7)
            assert job.ids[at] == token
            at += 1
    assert at == len(job.ids) == 30 + 25


def test_each_row_draws_with_its_own_settings():
    """120 rows with ten different settings at once, against `next_tokens` with one setting at a time."""
    rng = np.random.default_rng(0)
    settings = [(0.0, 3, 0.5, 1.0), (1.0, 0, 1.0, 0.0), (0.3, 0, 0.5, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 50, 1.0, 0.0)]
    settings += [(1.0, 3, 0.5, 0.2), (2.0, 0, 1e-6, 0.0), (1.0, 0, 1.0, 0.2), (1.0, 0, 1.0, 1.0), (1.0, 19, 1.0, 0.0)]
    logits = rng.normal(size=(120, 20)).astype(np.float32) * 3
    keys = jax.random.split(jax.random.key(0), 120)
    columns = Settings(*(np.array(column) for column in zip(*12 * settings, strict=True)))
    got = jax.jit(batch._draw, static_argnums=0)(18, logits, keys, columns).token
    for i, setting in enumerate(settings):
        expected = next_tokens(checked(SamplingParams(*setting)), logits[i::10, :18], keys[i::10])
        np.testing.assert_array_equal(got[i::10], expected)


def test_a_look_shows_the_attention_of_the_last_token(models):
    config, params = models["rope"]
    ids = np.array([[1, 2, 3, 4, 5]])
    ((looked, _),) = messages([Job("run", ids[0].tolist())], Writer(config, params, 12, 3))
    assert isinstance(looked, Looked)
    weights, likely, chances = looked
    maps = jax.jit(inside.attention_maps, static_argnums=0)(config, params, ids)
    np.testing.assert_allclose(weights, maps[:, 0, :, 4], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    expected = softmax(forward(config, params, ids)[0, 4, :12])
    np.testing.assert_allclose(chances, np.sort(expected)[::-1][:8], rtol=1e-4)
    np.testing.assert_allclose(expected[likely], chances, rtol=1e-4)


def test_a_look_gives_no_probability_to_ids_outside_the_vocabulary(models):
    config, params = models["learned"]
    looks = messages([Job("run", [i]) for i in range(12)], Writer(config, params, 12, 3))
    for i, (looked, _) in enumerate(looks):
        expected = softmax(forward(config, params, np.array([[i]]))[0, 0, :12])
        np.testing.assert_allclose(looked.likely_p, np.sort(expected)[::-1][:8], rtol=1e-4)


def test_memory_of_a_look_is_within_what_max_maps_counts():
    """The maps of all layers and two more copies of one layer's. `requests.MAX_MAPS` limits this."""
    L, H, T = 10, 16, 64
    config = ModelConfig(vocab_size=13, block_size=T, n_layer=L, n_head=H, n_embd=2 * H)
    params = jax.eval_shape(partial(model.init_params, config), jax.random.key(0))
    looking = batch.look.lower(config, params, np.zeros((1, T), np.int32), np.int32(T), 13).compile()
    assert looking.memory_analysis().temp_size_in_bytes <= 4 * (L + 2) * H * T**2
