"""What a run's folder says of it, as plain values: no model is loaded here, and nothing is written."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from jaxgpt import cost, recipes
from jaxgpt.config import Config, differences
from jaxgpt.monitor.terminal import duration
from jaxgpt.monitor.utilisation import peak, utilisation
from jaxgpt.run import Run

POINTS = 3000
"""Of a curve, at most about so many points are shown, shared among the runs of a report."""

Points = list[tuple[int, float]]
"""(step, value), by step."""


@dataclass(frozen=True)
class Score:
    """One evaluation over the whole validation split."""

    step: int
    loss: float
    standard_error: float | None
    bits_per_char: float
    bits_per_byte: float
    n_tokens: int


@dataclass(frozen=True)
class Facts:
    """A run as its folder tells it."""

    name: str
    config: Config
    recipe: str
    """The recipe nearest to it."""
    changes: list[tuple[str, Any, Any]]
    """(field, in the recipe, here) of every setting that differs."""
    command: str
    """What makes such a run again."""
    corpus: dict[str, Any]
    """Its tokens.json."""
    n_params: int
    starts: list[dict[str, Any]]
    """When, on what and with which versions it was started and resumed."""
    events: list[dict[str, Any]]
    """Its diary."""
    cut_off: bool
    """Whether its process was killed."""
    resume: str
    """What goes on with it."""
    step: int
    scores: list[Score]
    loss: Points
    """Of training, the extremes of long runs kept."""
    grad_norm: Points
    learning_rate: Points
    speed: Points
    """Tokens per second of training between two saves, at the later one."""

    @property
    def best(self) -> Score | None:
        """The evaluation of lowest loss."""
        return min(self.scores, key=lambda score: score.loss, default=None)

    @property
    def overfits_from(self) -> int | None:
        """The step of lowest validation loss, where the last one is worse by more than its standard error."""
        if not self.best or self.scores[-1].loss <= self.best.loss + (self.scores[-1].standard_error or 0):
            return None
        return self.best.step

    @property
    def seconds(self) -> float | None:
        """From each start to its end, compiling and evaluating included; None if nothing is known. A process that was
        killed, or goes on, counts up to its last save."""
        return sum(map(lasted, self._processes)) or None

    @property
    def ended(self) -> bool:
        """Whether every process of it has come to its end, or to where it broke off: else `seconds` are the least."""
        return all(each[-1]["event"] in ("end", "broken-off") for each in self._processes)

    @property
    def took(self) -> str:
        """`seconds` as people say them, empty if nothing is known."""
        said = "" if self.seconds is None else duration(self.seconds)
        return said if self.ended or not said else f"at least {said}"

    @property
    def _processes(self) -> list[list[dict[str, Any]]]:
        """Of each process that trained: its start, its saves, and how it ended if it could say so."""
        found: list[list[dict[str, Any]]] = []
        for event in self.events:
            if event["event"] == "start":
                found.append([event])
            elif found and event["event"] in ("save", "broken-off", "end"):
                found[-1].append(event)
        return found

    @property
    def noted(self) -> list[tuple[int, str, str]]:
        """(step, kind, what was told or the device) of each resume, each spike, and what broke it off."""
        return [
            (event["step"], kind, event.get("text", event.get("device", "")))
            for kind, event in zip(kinds(self.events), self.events, strict=True)
            if kind in ("resume", "spike", "broken-off") and "step" in event
        ]

    @property
    def running(self) -> bool:
        """Whether more is to come: it has just been made, or it trains."""
        told = (event["event"] for event in reversed(self.events))
        last = next((kind for kind in told if kind in ("start", "end", "broken-off", "import")), "start")
        return last == "start" and not self.cut_off

    @property
    def n_devices(self) -> int:
        return self.starts[-1].get("devices", 1) if self.starts else 1

    @property
    def tokens_per_second(self) -> float | None:
        """Of training since it was last started, as its last save tells it."""
        told = (event.get("tokens_per_second") for event in reversed(self.events))
        return next((speed for speed in told if speed), None)

    @property
    def utilisation(self) -> float | None:
        """Share of the published rate of its devices that it came to at `tokens_per_second`, None if not known."""
        most = peak(self.starts[-1].get("device", ""), self.n_devices) if self.starts else None
        speed = self.tokens_per_second
        return utilisation(self.config, speed, most) if most and speed else None


def gather(run: Run, points: int = POINTS, called: str = "") -> Facts:
    """What the folder of `run` says; lines that are still being written are left out.

    Args:
      points: of a curve, at most.
      called: its name in the report; by default that of its folder.

    Raises:
      RunError, CorpusError: its configuration or its tokens.json is damaged.
    """
    config, events = run.config, run.events()
    lines = run.metrics() if run.metrics_file.exists() else []
    steps = [line for line in lines if "loss" in line]
    as_typed = config
    if config.model.vocab_size == run.tokenizer.vocab_size:  # which 0 stands for
        as_typed = replace(config, model=replace(config.model, vocab_size=0))
    name = recipes.nearest(as_typed)

    def curve(field: str) -> Points:
        return thinned([(line["step"], line[field]) for line in steps if line[field] is not None], points)

    return Facts(
        name=called or run.path.resolve().name,
        config=config,
        recipe=name,
        changes=recipes.changes(name, as_typed),
        command=recipes.command(as_typed),
        corpus=run.corpus_meta,
        n_params=cost.n_params(config.model),
        starts=[event for event in events if event["event"] == "start"],
        events=events,
        cut_off=run.cut_off,
        resume=run.resume_command,
        step=max((line["step"] for line in lines), default=0),
        scores=[score(line) for line in lines if line.get("val_loss") is not None],
        loss=curve("loss"),
        grad_norm=curve("grad_norm"),
        learning_rate=curve("learning_rate"),
        speed=speeds(events),
    )


def score(line: dict[str, Any]) -> Score:
    """The evaluation that a line of metrics.jsonl holds."""
    names = ("loss", "standard_error", "bits_per_char", "bits_per_byte", "n_tokens")
    return Score(line["step"], *(line[f"val_{name}"] for name in names))


def thinned(points: Points, n: int) -> Points:
    """At most about `n` of the points, the ends, the least and the greatest of each stretch among them.

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
    """Tokens per second of training between saves: each save tells what its process had trained by then."""
    found: Points = []
    before = 0, 0.0
    for event in events:
        if event["event"] == "start":
            before = 0, 0.0
        elif event["event"] == "save" and "trained_seconds" in event:  # older ones told of a later step's
            now = event["trained_tokens"], event["trained_seconds"]
            if now[1] > before[1]:
                found.append((event["step"], (now[0] - before[0]) / (now[1] - before[1])))
            before = now
    return found


def lasted(process: Sequence[dict[str, Any]]) -> float:
    """Seconds from the first of its events to the last, by the process's own clock if it came to its end."""
    begun, ended = (datetime.fromisoformat(process[i]["time"]) for i in (0, -1))
    return float(process[-1].get("seconds", max(0.0, (ended - begun).total_seconds())))


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    """What each event is; a start after another, or from a step on, is a resume.

    >>> kinds([{"event": "start", "step": 0}, {"event": "save", "step": 5}, {"event": "start", "step": 5}])
    ['start', 'save', 'resume']
    """
    found, started = list[str](), False
    for event in events:
        resumed = event["event"] == "start" and (started or event.get("step"))
        started = started or event["event"] == "start"
        found.append("resume" if resumed else event["event"])
    return found


def differing(all_facts: Sequence[Facts]) -> list[tuple[str, list[Any]]]:
    """(field, its value in each run) of every setting in which runs differ."""
    fields = {name for facts in all_facts for name, _, _ in differences(all_facts[0].config, facts.config)}
    flat = [
        {name: value for section in vars(facts.config).values() for name, value in vars(section).items()}
        for facts in all_facts
    ]
    return [(name, [values[name] for values in flat]) for name in flat[0] if name in fields]


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))
