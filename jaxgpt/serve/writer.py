"""One model that writes for many at once: who has which row, what each still has to read, and what it is given."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.sample import bucket
from jaxgpt.serve import batch
from jaxgpt.serve.batch import CHUNK, Drawn, Settings
from jaxgpt.serve.library import Served

READ = 512
"""About how many tokens are read at once."""
PACE = 0.05
"""Seconds between two pieces of a text: so long a newcomer waits, and so long the row of one who left stays taken."""
MEMORY = 2**30
"""Bytes that the rows of one model may take."""


@dataclass(frozen=True)
class Request:
    """What is to be written."""

    run: Served
    ids: tuple[int, ...]
    """The prompt, at least one token."""
    tokens: int
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1337

    @property
    def how(self) -> Settings:
        return Settings(self.temperature, min(self.top_k, 2**30), self.top_p, self.min_p)


class Piece(NamedTuple):
    """Tokens that follow those of the piece before."""

    drawn: Drawn  # (n,) and (n, K)
    first: int
    """The place of the first token that they could look back on, in the prompt and all after it."""


class End(NamedTuple):
    """Nothing more comes."""

    why: str
    """"" for all done; else what went wrong."""


@dataclass(eq=False)
class Job:
    """A request under way. `put` is told each `Piece`, then an `End`, from the thread that writes."""

    request: Request
    put: Callable[[Any], None]
    cancelled: bool = False
    """Its reader has left: its place is free at the next turn."""
    row: int = -1
    first: int = 0
    """The place of the first token of what is read."""
    read: int = 0
    """How many tokens the row has read, 0 where they must be read again."""
    since: int = 0
    """The turn from which on it waits to be read."""
    written: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.request.tokens - len(self.written)

    @property
    def ids(self) -> list[int]:
        return [*self.request.ids, *self.written]


class Writer:
    """A loaded model, its rows, and the jobs that wait for one. Used by one thread."""

    def __init__(self, config: ModelConfig, params: model.Params, n_ids: int, places: int):
        self.config, self.params, self.n_ids = config, params, n_ids
        R = max(1, min(places, MEMORY // max(1, batch.bytes_per_row(config))))
        self.rows = batch.empty(config, R)
        self.widths = sorted({min(R, N) for N in (1, 8, R)})
        """How many of the first rows are decoded together: few where few are taken."""
        self.places: list[Job | None] = [None] * R
        self.waiting: deque[Job] = deque()
        self.slides = config.kind == "bigram" or config.position == "rope"
        self.seconds = 0.0
        """What one token took lately."""
        self.turns = 0

    @property
    def jobs(self) -> list[Job]:
        """All that are under way: those that have a row, and those that wait for one."""
        return [*filter(None, self.places), *self.waiting]

    @property
    def idle(self) -> bool:
        return not self.jobs

    def turn(self) -> list[Job]:
        """One turn for every job: leavers go, newcomers come, some texts are read, all others get a few tokens more.

        Returns:
          Those that have all they asked for, and have given their rows back.
        """
        self.turns += 1
        self.places = [None if job and job.cancelled else job for job in self.places]
        self.waiting = deque(job for job in self.waiting if not job.cancelled)
        for row, job in enumerate(self.places):
            if not job and self.waiting:
                self._enter(row, self.waiting.popleft())
        until = time.perf_counter() + PACE
        while (unread := [job for job in self._placed if not job.read and job.left]) and time.perf_counter() < until:
            self._read(sorted(unread, key=lambda job: job.since))
        if going := [job for job in self._placed if job.read and job.left]:
            self._decode(going)
        done = [job for job in self._placed if not job.left]
        self.places = [None if job in done else job for job in self.places]
        return done

    @property
    def _placed(self) -> list[Job]:
        return [job for job in self.places if job]

    def look(self, ids: Sequence[int]) -> tuple[Any, Any, Any]:
        """What the last of `ids`, up to block_size, attends to, (L, H, T), and what is likely after it: (K,) ids and
        their probabilities."""
        T = len(ids)
        text = batch.padded([list(ids)], bucket(T, self.config.block_size), 1)
        looked = batch.look(self.config, self.params, text["idx"], np.int32(T), self.n_ids)
        weights, likely, chances = jax.device_get(looked)
        return weights[:, :, :T], likely, chances

    def _enter(self, row: int, job: Job) -> None:
        job.row, job.since, self.places[row] = row, self.turns, job
        job.first = max(0, len(job.request.ids) - self.config.block_size)

    def _read(self, unread: list[Job]) -> None:
        """Read the texts of the first, and of others about as long, and give each its next token."""
        W, R = self.config.block_size, len(self.places)
        texts = [job.ids[job.first :] for job in unread]
        T = bucket(len(texts[0]), W)
        N = max(1, min(8, READ // T, self.widths[-1]))
        some = [(job, ids) for job, ids in zip(unread, texts, strict=True) if bucket(len(ids), W) == T][:N]
        spare = N - len(some)  # texts that go nowhere
        jobs = [job for job, _ in some] + [some[0][0]] * spare
        how = zip(*(job.request.how for job in jobs), strict=True)
        new = batch.padded([ids for _, ids in some], T, N) | {
            "row": np.array([job.row for job, _ in some] + [R] * spare, np.int32),
            "step": np.array([len(job.written) for job in jobs], np.int32),
            "seed": np.array([job.request.seed for job in jobs], np.uint32),
            "how": Settings(*(np.array(each, dtype) for each, dtype in zip(how, batch.DTYPES, strict=True))),
        }
        self.rows, drawn = batch.read(self.config, self.params, self.rows, new, self.n_ids)
        drawn = jax.device_get(drawn)
        for i, (job, ids) in enumerate(some):
            job.read = len(ids)
            self._give(job, i, drawn, 1)

    def _decode(self, going: list[Job]) -> None:
        last = max(job.row for job in going)
        N = next(N for N in self.widths if last < N)
        n = min(CHUNK, max(self._room(job) for job in going))
        if self.seconds:
            n = max(1, min(n, int(PACE / self.seconds)))
        began = time.perf_counter()
        self.rows, drawn = batch.decode(self.config, self.params, self.rows, np.int32(n), N, self.n_ids)
        drawn = jax.device_get(drawn)
        self.seconds = (time.perf_counter() - began) / n
        for job in going:
            m = min(n, self._room(job))  # what a row is given beyond is nobody's
            job.read += m
            self._give(job, job.row, drawn, m)

    def _room(self, job: Job) -> int:
        """How many tokens a job may be given before it ends, or must be read again."""
        return job.left if self.slides else min(job.left, self.config.block_size - job.read)

    def _give(self, job: Job, i: int, drawn: Drawn, m: int) -> None:
        """Tell a job its m tokens; where learned positions end, the later half is read again, as `generate` does."""
        piece = Drawn(*(x[:m, i] for x in drawn))
        job.written += piece.token.tolist()
        job.put(Piece(piece, job.first))
        if not self.slides and job.read >= self.config.block_size:
            again = max(1, self.config.block_size // 2)
            job.first, job.read, job.since = len(job.request.ids) + len(job.written) - again, 0, self.turns
