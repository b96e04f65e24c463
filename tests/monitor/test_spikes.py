"""Spikes of the training loss: when a warning is given, and that it is recorded."""

import math
from types import SimpleNamespace

import numpy as np

from jaxgpt.metrics_log import Notice, Progress
from jaxgpt.monitor.spikes import with_spikes
from jaxgpt.run import Run
from tests.test_run import META


def notices_of(losses):
    events, run = [], SimpleNamespace(event=lambda kind, **values: None)
    losses = tuple(losses)
    with_spikes(run, events.append)(Progress(len(losses), len(losses), losses[-1], None, None, losses=losses))
    return events[1:]


def spikes_in(losses):
    return [notice.step - 1 for notice in notices_of(losses)]


def falling(n, seed=0):
    """Losses (n,) that decay exponentially to 2.0, with noise."""
    return 2.0 + 2.5 * np.exp(-np.arange(n) / 200) + np.random.default_rng(seed).normal(0, 0.08, n)


def test_a_falling_noisy_loss_has_no_spikes():
    assert [spikes_in(falling(2000, seed)) for seed in range(3)] == [[]] * 3


def test_each_spike_is_reported_once():
    losses = falling(1000)
    losses[400:405] += 3
    losses[800] += 3
    assert spikes_in(losses) == [400, 800]


def test_the_mean_before_a_spike_is_reported():
    (notice,) = notices_of([2.0, 2.1] * 40 + [5.0])
    assert notice.text == "loss 5.0000; the loss before was about 2.0500"


def test_the_first_losses_and_non_finite_losses_are_not_spikes():
    assert spikes_in([1.0] * 49 + [100.0]) == []
    assert spikes_in([2.0, 2.1] * 50 + [math.nan, math.inf, 2.0]) == []


def test_a_constant_loss_spikes_if_it_rises_by_more_than_six_percent():
    assert spikes_in([2.0] * 60 + [2.11]) == []
    assert spikes_in([2.0] * 60 + [2.13]) == [60]


def test_a_spike_is_reported_once_and_recorded(tmp_path, tiny):
    run, events = Run.create(tmp_path, "one", tiny, META), []
    watch = with_spikes(run, events.append)
    losses = [2.0 + i % 3 / 100 for i in range(60)] + [9.0, 9.5, 2.0]
    for end in range(7, 64, 7):
        watch(Progress(end, 100, losses[end - 1], None, None, losses=tuple(losses[end - 7 : end])))
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert (notice.kind, notice.step) == ("spike", 61)
    assert notice.text == "loss 9.0000; the loss before was about 2.0100"
    assert [(event["event"], event["step"]) for event in run.events()] == [("spike", 61)]


def test_a_loss_is_compared_with_the_hundred_before_it_once_there_are_fifty():
    assert spikes_in([2.0] * 50 + [9.0]) == [50]
    assert spikes_in([9.0] * 100 + [2.0] * 100 + [3.0]) == [200]
