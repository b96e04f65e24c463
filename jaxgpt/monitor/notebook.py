"""A run in a notebook: its metrics, weights, samples and loss chart."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.display import charts
from jaxgpt.display.text import count
from jaxgpt.monitor.curves import loss
from jaxgpt.monitor.facts import Facts, gather
from jaxgpt.monitor.terminal import describe
from jaxgpt.run import Run
from jaxgpt.sample import SamplingParams, write
from jaxgpt.start import load_checkpoint
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """A run, and the parameters of its checkpoint at `step`."""

    run: Run
    step: int
    params: model.Params

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: steps and evaluations, oldest first."""
        return self.run.metrics()

    @cached_property
    def facts(self) -> Facts:
        return gather(self.run)

    def sample(
        self,
        prompt: str | None = None,
        tokens: int = 300,
        sampling: SamplingParams | None = None,
        seed: int = 1337,
        stop: str | Sequence[str] = (),
    ) -> str:
        """A text that begins with `prompt` and ends before a `stop`."""
        model, sampling = self.config.model, sampling or SamplingParams()
        (pieces,) = write(model, self.params, self.tokenizer, prompt, tokens, sampling, seed=seed, stop=stop)
        return "".join(pieces)

    def plot(self) -> "Chart":
        """Training and validation loss over steps."""
        spec = loss([self.facts])
        if spec is None:
            raise ValueError(f"run {self.run.path.name!r} has no metrics yet: train it further")
        return Chart(spec)

    def __repr__(self) -> str:
        facts = self.facts
        best = facts.best and f"{describe(facts.best.evaluation)}, at step {facts.best.step:,}"
        rows = {
            "run": self.run.path,
            "command": facts.command,
            "weights": f"{facts.n_params:,} parameters after step {self.step:,}",
            "corpus": f"{facts.corpus['source']}, {facts.corpus['count']:,} tokens",
            "best": best,
            "trained": facts.took and f"{count(facts.step, 'step')} in {facts.took}",
        }
        return "\n".join(f"{name}: {value}" for name, value in rows.items() if value)


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite chart that a notebook displays."""

    spec: charts.Spec

    def save(self, path: str | Path) -> None:
        """Write it as .png, .svg, .pdf or .json."""
        charts.save(self.spec, Path(path))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {"image/svg+xml": charts.render(self.spec, ".svg").decode()}


def load(run: str | Path, checkpoint: str | int = "best", runs_dir: str | Path = "runs") -> Loaded:
    """A run by its name in `runs_dir` or by its path, with the parameters of a checkpoint: "best", "last" or a step.

    Raises RunError if there is no such run or checkpoint, CheckpointError if the checkpoint is damaged.
    """
    opened = Run.open(Path(runs_dir), str(run))
    return Loaded(opened, *load_checkpoint(opened, checkpoint))
