import pytest

from jaxgpt.plan import plan
from jaxgpt.recipes import recipe


@pytest.fixture
def recipes(change):
    """The recipe of GPT-2 1.5B, and that of 124M with a scan over its blocks and a batch that 256 chips can share."""
    small = change(recipe("gpt2-124m").config, batch_size=512, accumulate=1, scan_layers=True, remat="blocks")
    return {"124m": plan.resolved(small), "1.5b": plan.resolved(recipe("gpt2-1.5b").config)}
