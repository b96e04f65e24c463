"""A run as plain values, read from its directory: loads no model, writes nothing."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt.config import Config, differences, replaced, unresolved
from jaxgpt.corpus import shareable, train_size
from jaxgpt.metrics_log import Evaluated
from jaxgpt.monitor import cost
from jaxgpt.monitor.chips import utilization
from jaxgpt.monitor.terminal import duration
from jaxgpt.recipes import RECIPES
from jaxgpt.run import Run

POINTS = 3000
"""About how many points of a curve are kept, shared among the runs of a report."""

Points = list[tuple[int, float]]
"""(step, value), by step."""


@dataclass(frozen=True)
class Facts:
    """The contents of a run's directory."""

    name: str
    config: Config
    recipe: str  # the one with the fewest `changes`
    changes: list[tuple[str, Any, Any]]  # (field, value in the recipe, value here)
    command: str  # trains a run of this config
    resume: str  # the command that resumes this run
    corpus: dict[str, Any]  # tokens.json
    n_params: int
    events: list[dict[str, Any]]  # events.jsonl
    cut_off: bool  # whether its process was killed
    step: int
    scores: list[Evaluated]  # those of a finite loss
    loss: Points  # of training; a long curve keeps its extremes
    grad_norm: Points
    learning_rate: Points
    speed: Points  # tokens per second of training since the save before

    @property
    def held_out(self) -> int:
        """Tokens of the validation split, as `Corpus.split` takes them."""
        data, parts = self.config.data, self.corpus.get("parts", [self.corpus])
        n = sum(part["count"] - train_size(part["count"], data.val_fraction) for part in parts)
        return min(n, data.val_tokens or n)

    @property
    def best(self) -> Evaluated | None:
        return min(self.scores, key=lambda scored: scored.rank, default=None)

    @property
    def overfits_from(self) -> int | None:
        """The step of the best evaluation, if the last one is worse by more than its standard error."""
        if not self.best:
            return None
        (step, best), (_, last) = self.best, self.scores[-1]
        return step if last.loss > best.loss + last.standard_error else None

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The start events, with hardware and versions."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def took(self) -> str:
        """Wall time of the processes that recorded their end, with compilation and evaluations; empty if none did."""
        ends = [event["seconds"] for event in self.events if "seconds" in event]
        least = "at least " if len(ends) < len(self.starts) else ""
        return least + duration(sum(ends)) if ends else ""

    @property
    def incidents(self) -> list[tuple[int, str, str]]:
        """(step, kind, message or device) of each resume, spike and failure."""
        return [
            (event["step"], kind, event.get("text", event.get("device", "")))
            for kind, event in zip(kinds(self.events), self.events, strict=True)
            if kind in ("resume", "spike", "broken-off") and "step" in event
        ]

    @property
    def running(self) -> bool:
        """Whether it is new or still training."""
        ends = [event["event"] for event in self.events if event["event"] in ("start", "end", "broken-off", "import")]
        return ends[-1:] in ([], ["start"]) and not self.cut_off

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed of the newest process that recorded one, from its last save."""
        speeds = (event.get("tokens_per_second") for event in reversed(self.events))
        return next(filter(None, speeds), None)

    @property
    def utilization(self) -> float | None:
        """Model FLOPs utilization at `tokens_per_second`, on the devices of its process; None if unknown."""
        start, found = dict[str, Any](), None
        for event in self.events:
            if event["event"] == "start":
                start = event
            elif speed := event.get("tokens_per_second"):
                found = utilization(self.config, start.get("device", ""), start.get("devices", 1), speed)
        return found


def gather(run: Run, points: int = POINTS, name: str = "") -> Facts:
    """Read the directory of `run`, keeping at most `points` of each curve; lines still being written are left out.

    Raises RunError or CorpusError if its configuration or its tokens.json is damaged. `name` replaces the directory's.
    """
    config, events = run.config, run.events()
    lines = run.metrics() if run.metrics_file.exists() else []
    # The default, 0, becomes the tokenizer's size.
    typed = replaced(config, vocab_size=0) if config.model.vocab_size == run.tokenizer.vocab_size else config
    recipe, changes = nearest(typed)

    def curve(field: str) -> Points:
        return thinned([(line["step"], line[field]) for line in lines if line.get(field) is not None], points)

    return Facts(
        name=name or run.path.resolve().name,
        config=config,
        recipe=recipe,
        changes=changes,
        command=command(typed),
        corpus=run.corpus_meta,
        n_params=cost.n_params(config.model),
        resume=run.resume_command,
        events=events,
        cut_off=run.cut_off,
        step=max((line["step"] for line in lines), default=0),
        scores=[Evaluated.read(line) for line in lines if line.get("val_loss") is not None],
        loss=curve("loss"),
        grad_norm=curve("grad_norm"),
        learning_rate=curve("learning_rate"),
        speed=speeds(events),
    )


def nearest(config: Config) -> tuple[str, list[tuple[str, Any, Any]]]:
    """The recipe from which `config` differs in the fewest settings, and these settings."""
    config = unresolved(config)
    changes = {name: differences(recipe.config, config) for name, recipe in RECIPES.items()}
    return min(changes.items(), key=lambda item: len(item[1]))


def command(config: Config) -> str:
    """A `jaxgpt train` command that makes `config`: the nearest recipe, and a flag for each other setting; URLs are
    `shareable`."""
    recipe, changes = nearest(config)
    words = ["jaxgpt", "train", recipe]
    for field, _, value in changes:
        flag = field.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(map(shareable, words))


def thinned(points: Points, n: int) -> Points:
    """About `n` of the points at most: both ends, and the lowest and highest of each stretch.

    >>> thinned([(0, 1.0), (1, 9.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 0.0), (6, 1.0), (7, 1.0)], 6)
    [(0, 1.0), (1, 9.0), (4, 1.0), (5, 0.0), (7, 1.0)]
    """
    if len(points) <= n:
        return points
    size = -(-len(points) // max(1, (n - 2) // 2))
    kept = {points[0], points[-1]}
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)


def speeds(events: Iterable[dict[str, Any]]) -> Points:
    """Tokens per second of training between saves, from the totals of its process that each save records."""
    found: Points = []
    tokens, seconds = 0, 0.0
    for event in events:
        if event["event"] == "start":
            tokens, seconds = 0, 0.0
        elif event["event"] == "save" and "trained_seconds" in event:  # not in runs of version 0.1
            before, (tokens, seconds) = (tokens, seconds), (event["trained_tokens"], event["trained_seconds"])
            if seconds > before[1]:
                found.append((event["step"], (tokens - before[0]) / (seconds - before[1])))
    return found


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    """The kind of each event: a start that follows another or begins after step 0 is a "resume".

    >>> kinds([{"event": "start", "step": 0}, {"event": "save", "step": 5}, {"event": "start", "step": 5}])
    ['start', 'save', 'resume']
    """
    found = list[str]()
    for event in events:
        resumed = event["event"] == "start" and ("start" in found or event.get("step"))
        found.append("resume" if resumed else event["event"])
    return found


def differing(all_facts: Sequence[Facts]) -> list[tuple[str, list[Any]]]:
    """(field, its value in each run) of every setting that differs between runs."""
    sections = zip(*(vars(facts.config).values() for facts in all_facts), strict=True)
    rows = [(name, [getattr(each, name) for each in section]) for section in sections for name in vars(section[0])]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]
