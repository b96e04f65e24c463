"""How the time of a training step grows when one size doubles, beside how its operations grow on paper."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.facts import facts
from jaxgpt.bench.ruler import Contest
from jaxgpt.bench.shapes import ABOUT, Precision, config_of, flops_per_step
from jaxgpt.bench.table import Report
from jaxgpt.config import Config, to_tree

NOTES = (
    "One size is doubled at a time; the head size grows with C, as the number of heads stays. Operations are those of "
    "the products (three times nn.cost.flops_per_token); norms, softmax, GELU and AdamW are not counted, so time may "
    "grow less than operations where a step waits for memory or for Python, and more where it waits for caches.",
    "Times are of rounds in turn; ratios of time are taken round by round, median (least to greatest).",
)


def doubled(config: Config) -> dict[str, Config]:
    """Letter to `config` with that size doubled."""
    model, train = config.model, config.train
    models = {"T": "block_size", "L": "n_layer", "C": "n_embd", "V": "vocab_size"}
    grown = {
        letter: replace(config, model=replace(model, **{name: 2 * getattr(model, name)}))
        for letter, name in models.items()
    }
    return grown | {"B": replace(config, train=replace(train, batch_size=2 * train.batch_size))}


def measure(
    device: str = "cpu",
    shape: str = "tiny",
    precision: Precision = "float32",
    rounds: int = 5,
    seconds: float = 2.0,
    until: float = float("inf"),
    patience: int = 0,
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on `shape` and on each of its sizes doubled."""
    start = config_of(shape, device, precision)
    configs = {"-": start, **dict(sorted(doubled(start).items()))}
    with Contest(device, tell) as contest:
        for name, config in configs.items():
            contest.enter(name, {"task": "train-jaxgpt", "config": to_tree(config)})
        rates = contest.measure(rounds, seconds, until, patience)
    tokens = {name: config.train.batch_size * config.model.block_size for name, config in configs.items()}
    steps = {name: [tokens[name] / rate for rate in found] for name, found in rates.items()}  # seconds per step
    rows: list[dict[str, Any]] = [
        {
            "doubled": name,
            "time": ruler.ratio(found, steps["-"]) if "-" in steps else None,
            "operations": flops_per_step(configs[name]) / flops_per_step(start),
            "ms/step": 1e3 * ruler.series(found)["median"],
            "GFLOP/s": flops_per_step(configs[name]) / ruler.series(found)["median"] / 1e9,
        }
        for name, found in steps.items()
    ]
    return {
        "mode": "scaling",
        "facts": facts(device) | {"device": contest.device_name},
        "notes": [f"from {shape}: {ABOUT[shape]}; {precision}", *NOTES, contest.quiet()],
        "failed": contest.failed,
        "tables": [{"title": f"A training step, doubled / {shape}", "rows": rows}],
        "seconds_per_step": steps,
    }
