"""What a scan of steps is served: the same windows from the device as from disk."""

import numpy as np
import pytest

from jaxgpt.training import feed
from jaxgpt.training.feed import chunks, feeder


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [(0, 12, [(0, 5), (5, 10), (10, 12)]), (5, 10, [(5, 10)]), (12, 16, [(12, 15), (15, 16)]), (9, 9, [])],
)
def test_chunks_end_at_multiples_of_scan_steps(tiny, change, step, steps, expected):
    assert list(chunks(change(tiny, steps=steps), step)) == expected


def test_what_is_read_from_disk_is_what_the_device_would_take(tiny, monkeypatch):
    tokens = np.arange(200, dtype=np.uint16) * 7 % 13
    on_device = feeder(tiny, tokens)
    monkeypatch.setattr(feed, "DEVICE_TOKENS", len(tokens) - 1)
    on_disk = feeder(tiny, tokens)
    for begin, end in [*chunks(tiny, 0), (5, 10), (3, 4)]:  # also a chunk that is served again, and one out of turn
        whole, starts = on_device(begin, end)
        nothing, windows = on_disk(begin, end)
        assert nothing is None
        at = np.asarray(starts)[..., None] + np.arange(tiny.model.block_size + 1)
        np.testing.assert_array_equal(np.asarray(windows), np.asarray(whole)[at])
