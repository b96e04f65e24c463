"""Window starts as a function of seed and step, batches, mixtures, and the loaders."""

import gc
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import data as batches
from jaxgpt.cli.runs import start_run
from jaxgpt.data import chunks, loader
from jaxgpt.sharding import Sizes, make_mesh, one_device
from jaxgpt.train import fit

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.smoke
@given(SEEDS, st.integers(1, 3000), st.integers(0, 10**6))
def test_permute_is_a_permutation(seed, n, epoch):
    image = batches.permute(np.arange(n), n, seed, epoch)
    assert sorted(image) == list(range(n))


def test_permutations_differ_by_seed_and_epoch_and_are_not_the_identity():
    images = {tuple(batches.permute(np.arange(100), 100, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(images) == 4
    assert tuple(range(100)) not in images


def test_permute_spreads_each_index_evenly():
    """Over many epochs, index 0 has every image about equally often (chi-squared, 5 sigma)."""
    n, epochs = 16, 4000
    counts = np.bincount([int(batches.permute(np.array([0]), n, 7, e)[0]) for e in range(epochs)], minlength=n)
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < (n - 1) + 5 * (2 * (n - 1)) ** 0.5


@pytest.mark.smoke
@given(SEEDS, st.integers(1, 9), st.integers(2, 200), st.integers(1, 7))
def test_an_epoch_takes_every_window_once(seed, T, extra, B):
    """n steps of B windows are exactly B epochs: each has n distinct starts, T apart."""
    N = T + extra
    n = batches.n_windows(N, T)
    starts = batches.chunk_starts(seed, 0, n, N, T, B).reshape(B, n)
    for epoch in starts:
        assert sorted(epoch - epoch.min()) == list(range(0, n * T, T))
        assert epoch.min() >= 0
        assert epoch.max() + T + 1 <= N


def test_epoch_offsets_vary_and_all_tokens_are_used():
    N, T = 103, 8
    n = batches.n_windows(N, T)
    starts = batches.chunk_starts(0, 0, 200, N, T, n)  # an epoch a step
    offsets = set(starts.min(axis=1))
    assert offsets == set(range(N - n * T)), "every offset at which n windows fit must occur"
    assert starts.min() == 0
    assert starts.max() + T + 1 == N


@given(SEEDS, st.integers(1, 9), st.integers(1, 200))
def test_random_windows_stay_inside_the_tokens(seed, T, extra):
    starts = batches.chunk_starts(seed, 0, 5, T + extra, T, 16, "random")
    assert starts.min() >= 0
    assert starts.max() + T + 1 <= T + extra


@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_the_last_window_ends_at_the_last_token(sampling):
    """No off-by-one error: over many steps, the furthest target is the last token."""
    N, T = 50, 8
    tokens = np.arange(N, dtype=np.uint16)
    starts = batches.chunk_starts(3, 0, 500, N, T, 4, sampling).reshape(-1)
    batch = batches.take(tokens, starts, T)
    assert batch.targets.max() == N - 1
    assert batch.inputs.min() == 0


@pytest.mark.smoke
def test_targets_are_inputs_shifted_by_one():
    tokens = np.random.default_rng(0).integers(0, 9, 100).astype(np.uint16)
    starts = batches.window_starts(1, 0, 100, 8, 4)
    inputs, targets = batches.take(tokens, starts, 8)
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    for row, first in enumerate(starts):
        np.testing.assert_array_equal(targets[row], tokens[first + 1 : first + 9])


@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_batch_depends_only_on_seed_and_step(sampling):
    alone = [batches.window_starts(5, step, 1000, 8, 4, sampling) for step in range(30)]
    together = batches.chunk_starts(5, 0, 30, 1000, 8, 4, sampling)
    later = batches.chunk_starts(5, 17, 30, 1000, 8, 4, sampling)
    np.testing.assert_array_equal(np.stack(alone), together)
    np.testing.assert_array_equal(together[17:], later)
    assert (batches.chunk_starts(6, 0, 30, 1000, 8, 4, sampling) != together).any()


@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_arguments_may_be_numpy_integers(sampling):
    seed, step, n_tokens, T, B = np.array([7, 3, 100, 8, 4])
    found = batches.window_starts(seed, step, n_tokens, T, B, sampling)
    np.testing.assert_array_equal(found, batches.window_starts(7, 3, 100, 8, 4, sampling))
    late = 5_000_000  # whose windows count beyond 32 bits, those of a `TrainState.step` too
    found = batches.window_starts(7, jnp.int32(late), np.int32(9999), np.int8(8), np.int16(1024), sampling)
    np.testing.assert_array_equal(found, batches.window_starts(7, late, 9999, 8, 1024, sampling))


def test_corpora_beyond_32_bits():
    N = 9_000_000_000
    for sampling in ("epoch", "random"):
        starts = batches.chunk_starts(0, 0, 50, N, 1024, 64, sampling)
        assert starts.max() > 2**32
        assert starts.max() + 1025 <= N


def test_device_memory_map_and_gathered_windows_give_the_same_batch(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 500).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r")
    starts = batches.chunk_starts(0, 0, 3, 500, 8, 4)
    expected = batches.take(tokens, starts, 8)
    compiled = jax.jit(batches.take, static_argnums=2)
    for got in (
        batches.take(mapped, starts, 8),
        batches.inputs_and_targets(batches.gather(mapped, starts, 8)),
        compiled(jnp.asarray(tokens), starts.astype(np.int32), 8),
    ):
        np.testing.assert_array_equal(got.inputs, expected.inputs)
        np.testing.assert_array_equal(got.targets, expected.targets)


def test_estimates_draw_from_their_own_stream():
    drawn = batches.window_starts(0, 3, 1000, 8, 64, "estimate")
    assert (drawn != batches.window_starts(0, 3, 1000, 8, 64, "random")).any()
    assert drawn.min() >= 0
    assert drawn.max() + 9 <= 1000


def test_too_few_tokens_and_unknown_sampling_are_refused():
    with pytest.raises(ValueError, match="8 tokens hold no window of 8"):
        batches.window_starts(0, 0, 8, 8, 1)
    with pytest.raises(ValueError, match="expected 'epoch' or 'random'"):
        batches.window_starts(0, 0, 100, 8, 1, "shuffled")


@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_numbers_out_of_range_are_refused(sampling):
    for seed, step, B in ((-1, 0, 4), (0, -1, 4), (0, 0, -1)):
        with pytest.raises(ValueError, match=f"seed is {seed}, the step {step} and B {B}, expected no negative"):
            batches.window_starts(seed, step, 100, 8, B, sampling)
    for T in (0, -1):
        with pytest.raises(ValueError, match=f"100 tokens hold no window of {T} inputs"):
            batches.window_starts(0, 0, 100, T, 4, sampling)


class TestMixtures:
    PARTS = (batches.Part(100, 0.7), batches.Part(61, 0.2), batches.Part(200, 0.1))

    def part_of(self, starts):
        """The part in which each start lies."""
        return np.searchsorted(np.cumsum([n for n, _ in self.PARTS]), starts, side="right")

    @pytest.mark.parametrize("sampling", ["epoch", "random"])
    def test_each_part_has_exactly_its_share_of_every_thousand_windows(self, sampling):
        starts = batches.chunk_starts(3, 0, 300, self.PARTS, 8, 10, sampling)
        for block in starts.reshape(3, 1000):
            assert np.bincount(self.part_of(block)).tolist() == [700, 200, 100]

    @pytest.mark.parametrize("sampling", ["epoch", "random"])
    def test_a_step_alone_equals_the_step_in_a_chunk(self, sampling):
        whole = batches.chunk_starts(3, 0, 220, self.PARTS, 8, 10, sampling)
        for step in (0, 1, 99, 100, 157, 219):
            alone = batches.chunk_starts(3, step, step + 1, self.PARTS, 8, 10, sampling)
            np.testing.assert_array_equal(alone[0], whole[step])

    def test_windows_of_a_part_are_those_of_the_part_alone(self):
        starts, first = batches.chunk_starts(3, 0, 200, self.PARTS, 8, 10).reshape(-1), 0
        for i, (n, _) in enumerate(self.PARTS):
            mine = starts[self.part_of(starts) == i] - first
            alone = batches.chunk_starts(3, 0, len(mine), n, 8, 1).reshape(-1)
            np.testing.assert_array_equal(mine, alone)
            first += n

    def test_no_window_crosses_into_the_next_part(self):
        for sampling in ("epoch", "random"):
            starts = batches.chunk_starts(3, 0, 200, self.PARTS, 8, 10, sampling)
            np.testing.assert_array_equal(self.part_of(starts), self.part_of(starts + 8))

    @pytest.mark.parametrize(
        ("shares", "counts"),
        [
            ((1.5, 1, 997.5), [2, 1, 997]),
            ((0.08525, 0.0037, 0.0001, 0.01095), [853, 37, 1, 109]),
            ((0.7, 0.2, 0.1), [700, 200, 100]),
            ((1, 1, 1), [333, 334, 333]),
            ((0.0045, 0.9955), [5, 995]),
        ],
    )
    def test_shares_are_rounded_to_whole_windows(self, shares, counts):
        part, _ = batches._parts_of(3, np.arange(2000, 3000), shares)
        assert np.bincount(part, minlength=len(shares)).tolist() == counts

    def test_parts_are_shuffled_anew_every_thousand_windows(self):
        first = self.part_of(batches.chunk_starts(3, 0, 100, self.PARTS, 8, 10).reshape(-1))
        second = self.part_of(batches.chunk_starts(3, 100, 200, self.PARTS, 8, 10).reshape(-1))
        assert (first != second).sum() > 300
        assert 400 < ((first[:-1] == 0) & (first[1:] == 0)).sum() < 600  # expected: 0.7 * 0.7 of 999 neighbors


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [(0, 12, [(0, 5), (5, 10), (10, 12)]), (5, 10, [(5, 10)]), (12, 16, [(12, 15), (15, 16)]), (9, 9, [])],
)
def test_chunks_end_at_multiples_of_scan_steps(tiny, change, step, steps, expected):
    assert list(chunks(change(tiny, steps=steps), step)) == expected


def test_windows_from_disk_equal_windows_on_the_device(tiny, monkeypatch):
    tokens = np.arange(200, dtype=np.uint16) * 7 % 13
    on_device = loader(tiny, tokens, one_device())
    monkeypatch.setattr(batches, "DEVICE_TOKENS", len(tokens) - 1)
    with ThreadPoolExecutor(1) as pool:
        for on_disk in loader(tiny, tokens, one_device()), loader(tiny, tokens, one_device(), pool=pool):
            assert_same_windows(tiny, on_device, on_disk)


def assert_same_windows(tiny, on_device, on_disk):
    for begin, end in [*chunks(tiny, 0), (5, 10), (3, 4)]:  # then a chunk again, and one out of order
        whole, starts = on_device(begin, end)
        tokens, windows = on_disk(begin, end)
        assert tokens is None
        indices = np.asarray(starts)[..., None] + np.arange(tiny.model.block_size + 1)
        np.testing.assert_array_equal(np.asarray(windows), np.asarray(whole)[indices])


def test_a_run_reads_each_chunk_once_and_leaves_no_thread(tiny, change, verse, tmp_path, monkeypatch):
    """Also the first one, which two threads request: one compiles the step, one trains."""
    read, starts = Counter(), batches.config_starts
    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    monkeypatch.setattr(batches, "config_starts", lambda *args: read.update([args[2:]]) or starts(*args))
    fit(*start_run(change(tiny, corpus=str(verse)), "read", tmp_path / "runs", tmp_path / "data"))
    assert read == {chunk: 1 for chunk in chunks(tiny, 0)}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_threads_that_request_a_chunk_together_read_it_once(tiny, monkeypatch):
    read, starts, barrier = Counter(), batches.config_starts, threading.Barrier(2)
    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    monkeypatch.setattr(batches, "config_starts", lambda *args: read.update([args[2:]]) or starts(*args))
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(2) as threads:
        on_disk = loader(tiny, np.arange(200, dtype=np.uint16) % 13, one_device(), pool=pool)

        def first_chunk(_):
            barrier.wait()
            return on_disk(0, 5)[1]

        one, other = threads.map(first_chunk, range(2))
    assert one is other
    assert read == {(0, 5): 1, (5, 10): 1}


def test_order_of_windows_differs_between_epochs():
    n = batches.n_windows(1000, 8)
    first, second = (np.argsort(batches.window_starts(7, epoch, 1000, 8, n)) for epoch in (0, 1))
    assert not np.array_equal(first, second)


def test_estimates_on_a_mixture_draw_from_its_parts_by_weight():
    parts = [batches.Part(9000, 1.0), batches.Part(1000, 3.0)]
    starts = batches.chunk_starts(0, 1, 2, parts, 8, 1000, "estimate")[0]
    assert ((starts >= 9000).sum(), starts.max() < 10_000 - 8) == (750, True)


@pytest.mark.parametrize(
    ("sampling", "starts"),
    [("epoch", [3973, 1285, 3333, 3205]), ("random", [7903, 4776, 6556, 557]), ("estimate", [1796, 8416, 2669, 911])],
)
def test_windows_of_existing_runs_do_not_change(sampling, starts):
    assert batches.window_starts(1337, 500, 10_000, 64, 4, sampling).tolist() == starts


def test_windows_of_a_mixture_are_loaded_by_its_weights(tiny):
    parts, tokens = [batches.Part(120, 3.0), batches.Part(80, 1.0)], np.arange(200, dtype=np.uint16) % 13
    starts = loader(tiny, tokens, one_device(), parts)(0, 5)[1]
    np.testing.assert_array_equal(starts, batches.config_starts(tiny, parts, 0, 5))


def test_order_of_the_parts_of_a_mixture_differs_by_seed():
    parts = [batches.Part(100, 0.5), batches.Part(100, 0.5)]
    one, other = (batches.chunk_starts(seed, 0, 100, parts, 8, 10) >= 100 for seed in (3, 4))
    assert 400 < (one != other).sum() < 600


def test_windows_that_were_used_are_not_kept(tiny, monkeypatch):
    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    with ThreadPoolExecutor(1) as pool:
        on_disk = loader(tiny, np.arange(200, dtype=np.uint16) % 13, one_device(), pool=pool)
        first = weakref.ref(on_disk(0, 5)[1])
        for chunk in (5, 10), (10, 15):
            on_disk(*chunk)
        gc.collect()
        assert first() is None


def test_shards_of_windows_from_disk_hold_their_own_sequences(tiny, monkeypatch):
    tokens = np.arange(200, dtype=np.uint16) * 7 % 13
    on_device, mesh = loader(tiny, tokens, one_device()), make_mesh(Sizes(data=2, fsdp=2))
    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    assert_same_windows(tiny, on_device, loader(tiny, tokens, mesh))
