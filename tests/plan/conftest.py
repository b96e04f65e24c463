"""Recipes to plan."""

import pytest

from jaxgpt.plan import plan
from jaxgpt.recipes import recipe


@pytest.fixture
def recipes(change):
    """As they are, but for GPT-2 124M's batch of 480, which 256 chips do not divide, and a loop of its blocks."""
    small = change(recipe("gpt2-124m").config, batch_size=512, accumulate=1, scan_layers=True, remat="blocks")
    return {"124m": plan.resolved(small), "1.5b": plan.resolved(recipe("gpt2-1.5b").config)}
