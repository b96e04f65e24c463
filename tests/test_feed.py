"""What a scan of steps is served: the same windows from the device as from disk."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxgpt import data
from jaxgpt.cli.runs import start
from jaxgpt.data import chunks, loader
from jaxgpt.mesh import one_device
from jaxgpt.train import fit


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [(0, 12, [(0, 5), (5, 10), (10, 12)]), (5, 10, [(5, 10)]), (12, 16, [(12, 15), (15, 16)]), (9, 9, [])],
)
def test_chunks_end_at_multiples_of_scan_steps(tiny, change, step, steps, expected):
    assert list(chunks(change(tiny, steps=steps), step)) == expected


def test_what_is_read_from_disk_is_what_the_device_would_take(tiny, monkeypatch):
    tokens = np.arange(200, dtype=np.uint16) * 7 % 13
    on_device = loader(tiny, tokens, one_device())
    monkeypatch.setattr(data, "DEVICE_TOKENS", len(tokens) - 1)
    with ThreadPoolExecutor(1) as pool:
        for on_disk in loader(tiny, tokens, one_device()), loader(tiny, tokens, one_device(), pool=pool):
            require_the_same_windows(tiny, on_device, on_disk)


def require_the_same_windows(tiny, on_device, on_disk):
    for begin, end in [*chunks(tiny, 0), (5, 10), (3, 4)]:  # also a chunk that is served again, and one out of turn
        whole, starts = on_device(begin, end)
        nothing, windows = on_disk(begin, end)
        assert nothing is None
        at = np.asarray(starts)[..., None] + np.arange(tiny.model.block_size + 1)
        np.testing.assert_array_equal(np.asarray(windows), np.asarray(whole)[at])


def test_a_run_reads_each_chunk_once_and_leaves_no_thread(tiny, change, verse, tmp_path, monkeypatch):
    """Also the first one, for which a thread compiles while the run evaluates."""
    read, starts = Counter(), data.config_starts
    monkeypatch.setattr(data, "DEVICE_TOKENS", 0)
    monkeypatch.setattr(data, "config_starts", lambda *args: read.update([args[2:]]) or starts(*args))
    fit(*start(change(tiny, corpus=str(verse)), "read", tmp_path / "runs", tmp_path / "data"))
    assert read == {chunk: 1 for chunk in chunks(tiny, 0)}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_threads_that_ask_for_a_chunk_together_read_it_once(tiny, monkeypatch):
    read, starts, both = Counter(), data.config_starts, threading.Barrier(2)
    monkeypatch.setattr(data, "DEVICE_TOKENS", 0)
    monkeypatch.setattr(data, "config_starts", lambda *args: read.update([args[2:]]) or starts(*args))
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(2) as threads:
        on_disk = loader(tiny, np.arange(200, dtype=np.uint16) % 13, one_device(), pool=pool)

        def first_chunk(_):
            both.wait()
            return on_disk(0, 5)[1]

        one, other = threads.map(first_chunk, range(2))
    assert one is other
    assert read == {(0, 5): 1, (5, 10): 1}
