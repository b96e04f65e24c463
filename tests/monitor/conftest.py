import pytest

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.start import start
from jaxgpt.train import fit

HOSTILE = "</script><script>alert('x')</script><b>\"&amp;"
"""Text that changes a page which takes it for markup."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of 20 steps, and the folder of its tokens; its text contains HOSTILE."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / "text.txt"
    text.write_text(f"the cat sat on the mat\n{HOSTILE}\n" * 40)
    config = Config(
        data=DataConfig(corpus=str(text)),
        model=ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=16),
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
        train=TrainConfig(steps=20, batch_size=4, scan_steps=5, eval_every=10, eval_batches=0),
    )
    run, corpus = start(config, "hostile", folder / "runs", folder / "data")
    fit(run, corpus)
    return run, folder / "data"
