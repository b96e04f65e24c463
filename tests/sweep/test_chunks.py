"""Which members of a sweep train together."""

import jax
import pytest

from jaxgpt.cli import memory
from jaxgpt.cli.memory import OutOfMemoryError
from jaxgpt.config import replaced
from jaxgpt.sweep import program
from jaxgpt.sweep.grid import Member
from jaxgpt.sweep.program import program_of, split


@pytest.fixture
def base(tiny):
    return replaced(tiny, eval_batches=0)


def test_members_of_one_shape_are_one_program(base):
    few = [
        replaced(base, seed=i, learning_rate=r, warmup_steps=w) for i in (0, 1) for r in (1e-3, 1e-2) for w in (1, 2)
    ]
    (chunk,) = split(few, 4)
    assert chunk.members == tuple(range(8))
    assert set(chunk.names) == {"seed", "learning_rate", "min_learning_rate", "warmup_steps"}
    wider = [replaced(config, n_embd=32) for config in few]
    assert [each.members for each in split([*few, *wider], 4)] == [tuple(range(8)), tuple(range(8, 16))]
    # A 0 that switches something off makes another program.
    off = [replaced(base, dropout=rate) for rate in (0.0, 0.1, 0.2)]
    assert [(each.members, each.names) for each in split(off, 4)] == [((0,), ()), ((1, 2), ("dropout",))]


def test_chunks_are_even_and_no_larger_than_fits(base, monkeypatch):
    many = [replaced(base, seed=i) for i in range(18)]
    chunks = split(many, 2)
    assert [(len(each.members), each.size) for each in chunks] == [(6, 6)] * 3
    assert [len(each.members) for each in split(many, 8, at_once=3)] == [3] * 6
    assert split(many[:3], 8)[0].devices == 3
    assert [(len(each.members), each.size) for each in split(many[:9], 2)] == [(6, 6), (3, 4)]
    need = memory.needed(base, 0, recomputed=False).total
    monkeypatch.setattr(memory, "available", lambda: 5 * need)
    assert [len(each.members) for each in split(many[:8], 2)] == [4, 4], "six do not fit"
    monkeypatch.setattr(memory, "available", lambda: 10)
    with pytest.raises(OutOfMemoryError, match=r"a training step needs at least.*--at-once 1$"):
        split(many, 2)
    need = memory.needed(base, 0, recomputed=True).total
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(memory, "available", lambda: 10 * need)
    assert [len(each.members) for each in split(many, 1)] == [3] * 6
    assert program.max_members(base, 4) == 12, "each device has its own memory"
    bigrams = [replaced(config, kind="bigram", vocab_size=0) for config in many]
    assert split(bigrams, 1), "the size of the vocabulary is not yet known"


def test_finished_members_change_no_chunk(base, monkeypatch):
    """With other names, devices or sizes, the other members would be rounded differently."""
    monkeypatch.setattr(program, "train", lambda program, chunk, *_: [chunk])
    some = [Member(replaced(base, seed=i, beta2=beta2), {}) for beta2 in (0.95, 0.999) for i in (0, 1)]
    whole, rest, none = (
        list(program.run(some, None, jax.devices()[:2], 2, frozenset(done))) for done in ((), (0, 1, 2), (0, 1, 2, 3))
    )
    assert [chunk.members for chunk in whole] == [(0, 1), (2, 3)]
    assert rest == whole[1:]
    assert none == []


def test_lengths_share_a_program_but_not_a_chunk(base):
    lengths = [replaced(base, steps=n, decay_steps=n) for n in (20, 40, 20)]
    chunks = split(lengths, 2)
    assert [each.members for each in chunks] == [(0, 2), (1,)]
    assert {each.names for each in chunks} == {("decay_steps",)}
    assert len({program_of(each.base) for each in chunks}) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [("learning_rate", (0.0, 1e-3)), ("warmup_steps", (0, 2)), ("grad_clip", (0.0, 1.0)), ("dropout", (0.0, 0.1))],
)
def test_a_zero_that_switches_something_off_makes_another_program(base, name, values):
    assert len(split([replaced(base, **{name: value}) for value in values], 1)) == 2


def test_no_chunk_is_larger_than_at_once_with_its_padding(base):
    many = [replaced(base, seed=i) for i in range(9)]
    assert [(len(each.members), each.size) for each in split(many, 2, at_once=3)] == [(2, 2)] * 4 + [(1, 2)]
