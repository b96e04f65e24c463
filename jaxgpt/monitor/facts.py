"""A run as plain values, read from its directory: loads no model, writes nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from jaxgpt import cost, recipes
from jaxgpt.config import Config, differences
from jaxgpt.monitor.chips import peak, utilisation
from jaxgpt.monitor.terminal import duration
from jaxgpt.run import Run

POINTS = 3000
"""Points of a curve that are kept, about, shared among the runs of a report."""

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
    """What a run's directory holds."""

    name: str
    config: Config
    recipe: str
    """The recipe with the fewest differences."""
    changes: list[tuple[str, Any, Any]]
    """(field, value in the recipe, value here) of every setting that differs."""
    command: str
    """The command that trains such a run."""
    corpus: dict[str, Any]
    """Its tokens.json."""
    n_params: int
    starts: list[dict[str, Any]]
    """Start events: time, hardware and versions of each start and resume."""
    events: list[dict[str, Any]]
    """The lines of events.jsonl."""
    cut_off: bool
    """Whether its process was killed."""
    resume: str
    """The command that resumes it."""
    step: int
    scores: list[Score]
    loss: Points
    """Training loss; a long curve keeps its extremes."""
    grad_norm: Points
    learning_rate: Points
    speed: Points
    """Tokens per second of training between two saves, at the step of the later one."""

    @property
    def best(self) -> Score | None:
        """The evaluation of lowest loss."""
        return min(self.scores, key=lambda score: score.loss, default=None)

    @property
    def overfits_from(self) -> int | None:
        """The step of the best evaluation, if the last one is worse by more than its standard error."""
        if not self.best or self.scores[-1].loss <= self.best.loss + (self.scores[-1].standard_error or 0):
            return None
        return self.best.step

    @property
    def seconds(self) -> float | None:
        """From each start to its end, with compilation and evaluations; None if unknown. A process that was killed or
        is still running counts up to its last save."""
        return sum(map(lasted, self._processes)) or None

    @property
    def ended(self) -> bool:
        """Whether every process has ended or failed; otherwise `seconds` is a lower bound."""
        return all(each[-1]["event"] in ("end", "broken-off") for each in self._processes)

    @property
    def took(self) -> str:
        """`seconds` as text, empty if unknown."""
        if self.seconds is None:
            return ""
        return ("" if self.ended else "at least ") + duration(self.seconds)

    @property
    def _processes(self) -> list[list[dict[str, Any]]]:
        """For each process that trained: its start, its saves, and its end if it was recorded."""
        found: list[list[dict[str, Any]]] = []
        for event in self.events:
            if event["event"] == "start":
                found.append([event])
            elif found and event["event"] in ("save", "broken-off", "end"):
                found[-1].append(event)
        return found

    @property
    def noted(self) -> list[tuple[int, str, str]]:
        """(step, kind, message or device) of each resume, spike and failure."""
        return [
            (event["step"], kind, event.get("text", event.get("device", "")))
            for kind, event in zip(kinds(self.events), self.events, strict=True)
            if kind in ("resume", "spike", "broken-off") and "step" in event
        ]

    @property
    def running(self) -> bool:
        """Whether it is new or still training."""
        names = (event["event"] for event in reversed(self.events))
        last = next((kind for kind in names if kind in ("start", "end", "broken-off", "import")), "start")
        return last == "start" and not self.cut_off

    @property
    def n_devices(self) -> int:
        return self.starts[-1].get("devices", 1) if self.starts else 1

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed since the last start, from the newest save."""
        speeds = (event.get("tokens_per_second") for event in reversed(self.events))
        return next((speed for speed in speeds if speed), None)

    @property
    def utilisation(self) -> float | None:
        """Share of its devices' published FLOP/s that it used at `tokens_per_second`; None if unknown."""
        most = peak(self.starts[-1].get("device", ""), self.n_devices) if self.starts else None
        speed = self.tokens_per_second
        return utilisation(self.config, speed, most) if most and speed else None


def gather(run: Run, points: int = POINTS, called: str = "") -> Facts:
    """Read the directory of `run`; lines that are still being written are left out.

    Args:
      points: how many points of a curve to keep, at most.
      called: its name in a report; by default that of its directory.

    Raises:
      RunError, CorpusError: its configuration or its tokens.json is damaged.
    """
    config, events = run.config, run.events()
    lines = run.metrics() if run.metrics_file.exists() else []
    steps = [line for line in lines if "loss" in line]
    as_typed = config
    if config.model.vocab_size == run.tokenizer.vocab_size:  # the default, 0, stands for it
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
    """The evaluation in a line of metrics.jsonl."""
    names = ("loss", "standard_error", "bits_per_char", "bits_per_byte", "n_tokens")
    return Score(line["step"], *(line[f"val_{name}"] for name in names))


def thinned(points: Points, n: int) -> Points:
    """At most about `n` of the points: both ends, and the lowest and highest of each stretch.

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
    """Tokens per second of training between saves, from the totals that each save records for its process."""
    found: Points = []
    before = 0, 0.0
    for event in events:
        if event["event"] == "start":
            before = 0, 0.0
        elif event["event"] == "save" and "trained_seconds" in event:  # version 0.1 recorded those of a later step
            now = event["trained_tokens"], event["trained_seconds"]
            if now[1] > before[1]:
                found.append((event["step"], (now[0] - before[0]) / (now[1] - before[1])))
            before = now
    return found


def lasted(process: Sequence[dict[str, Any]]) -> float:
    """Seconds from the first of its events to the last, by the process's own clock if it recorded its end."""
    begun, ended = (datetime.fromisoformat(process[i]["time"]) for i in (0, -1))
    return float(process[-1].get("seconds", max(0.0, (ended - begun).total_seconds())))


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    """The kind of each event: a start is a "resume" if it follows another or begins after step 0.

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
    """(field, its value in each run) of every setting that differs between runs."""
    fields = {name for facts in all_facts for name, _, _ in differences(all_facts[0].config, facts.config)}
    flat = [
        {name: value for section in vars(facts.config).values() for name, value in vars(section).items()}
        for facts in all_facts
    ]
    return [(name, [values[name] for values in flat]) for name in flat[0] if name in fields]
