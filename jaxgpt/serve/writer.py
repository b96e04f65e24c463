"""One model that generates for many requests at once: which request has which row, and what is read or decoded next."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
"""Seconds between two pieces of a text: how long a new request waits at most, and a cancelled one keeps its row."""
MEMORY = 2**30
"""Bytes that the KV caches of one model may take."""


class Piece(NamedTuple):
    """The next tokens of a text."""

    drawn: Drawn  # (n,) and (n, K)
    first: int  # position, in prompt and text, of the first token in their context


class Looked(NamedTuple):
    attention: Any  # (L, H, T), of the last token
    likely: Any  # (K,) the most likely next tokens
    likely_p: Any  # (K,)


class End(NamedTuple):
    """Nothing more comes."""

    error: str = ""


@dataclass(eq=False)
class Job:
    """A request and its progress: a text of `tokens` more tokens, or without any the look at the last of `ids`."""

    run: Served
    ids: list[int]  # the prompt, at least one token, and what was generated
    tokens: int = 0  # still to generate
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1337
    put: Callable[[Any], None] = lambda message: None  # takes each Piece, or a Looked, then an End, in the JAX thread
    cancelled: bool = False
    row: int = -1
    first: int = 0  # position of the first token in the cache
    read: int = 0  # tokens in the cache; 0 when `ids` must be read, as at the start
    step: int = 0  # tokens generated
    since: int = 0  # the turn in which it began to wait to be read


class Writer:
    """A loaded model with its rows. Used by one thread."""

    def __init__(self, config: ModelConfig, params: model.Params, n_ids: int, places: int):
        self.config, self.params, self.n_ids = config, params, n_ids
        cache = jax.tree.leaves(jax.eval_shape(lambda: batch.empty(config, 1)).cache)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
        R = max(1, min(places, MEMORY // max(1, size)))
        self.rows = batch.empty(config, R)
        self.widths = sorted({min(R, N) for N in (1, 8, R)})  # numbers of rows that `decode` is compiled for
        self.places: list[Job | None] = [None] * R
        self.waiting: deque[Job] = deque()
        self.slides = config.kind == "bigram" or config.position == "rope"
        self.seconds = 0.0  # per token, in the last `decode`
        self.turns = 0

    @property
    def jobs(self) -> list[Job]:
        """All that are under way or waiting."""
        return [job for job in (*self.places, *self.waiting) if job and not job.cancelled]

    def turn(self) -> list[Job]:
        """Answer one look, admit waiting jobs to free rows, read some prompts, and decode a few tokens for all others.

        Returns:
          The jobs that are done.
        """
        self.turns += 1
        self.places = [None if job and job.cancelled else job for job in self.places]
        self.waiting = deque(job for job in self.waiting if not job.cancelled)
        looks = [job for job in self.waiting if not job.tokens][:1]  # one, so that no text waits for many
        for look in looks:
            self.waiting.remove(look)
            look.put(self._look(look.ids))
        for row, job in enumerate(self.places):
            if not job and (new := next((job for job in self.waiting if job.tokens), None)):
                self.waiting.remove(new)
                new.row, new.since, self.places[row] = row, self.turns, new
                new.first = max(0, len(new.ids) - self.config.block_size)
        placed = [job for job in self.places if job]
        until = time.perf_counter() + PACE
        while (unread := [job for job in placed if not job.read and job.tokens]) and time.perf_counter() < until:
            self._read(sorted(unread, key=lambda job: job.since))
        if going := [job for job in placed if job.read and job.tokens]:
            self._decode(going)
        self.places = [job if job and job.tokens else None for job in self.places]
        return looks + [job for job in placed if not job.tokens]

    def _look(self, ids: Sequence[int]) -> Looked | End:
        T = len(ids)
        idx = np.pad(np.array([ids], np.int32), [(0, 0), (0, bucket(T, self.config.block_size) - T)])
        try:
            attention, *rest = jax.device_get(batch.look(self.config, self.params, idx, np.int32(T), self.n_ids))
        except RuntimeError as error:  # out of memory: the texts go on
            return End(str(error))
        return Looked(attention[:, :, :T], *rest)

    def _read(self, unread: list[Job]) -> None:
        """Read the text of the first job, and of others about as long, and draw the next token of each."""
        W, R = self.config.block_size, len(self.places)
        texts = [(job, job.ids[job.first :]) for job in unread]
        T = bucket(len(texts[0][1]), W)
        N = max(1, min(8, READ // T, self.widths[-1]))
        texts = [(job, ids) for job, ids in texts if bucket(len(ids), W) == T][:N]
        padded = texts + texts[:1] * (N - len(texts))
        settings = zip(*((job.temperature, job.top_k, job.top_p, job.min_p) for job, _ in padded), strict=True)
        new = {
            "idx": np.array([ids + [0] * (T - len(ids)) for _, ids in padded], np.int32),
            "length": np.array([len(ids) for _, ids in padded], np.int32),
            "row": np.array([job.row for job, _ in texts] + [R] * (N - len(texts)), np.int32),
            "step": np.array([job.step for job, _ in padded], np.int32),
            "seed": np.array([job.seed for job, _ in padded], np.uint32),
            "settings": Settings(*(np.array(x, dtype) for x, dtype in zip(settings, batch.DTYPES, strict=True))),
        }
        self.rows, drawn = batch.read(self.config, self.params, self.rows, new, self.n_ids)
        drawn = jax.device_get(drawn)
        for i, (job, ids) in enumerate(texts):
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
            m = min(n, self._room(job))  # the rest is discarded
            job.read += m
            self._give(job, job.row, drawn, m)

    def _room(self, job: Job) -> int:
        """Tokens until a job ends or must be read again."""
        return job.tokens if self.slides else min(job.tokens, self.config.block_size - job.read)

    def _give(self, job: Job, i: int, drawn: Drawn, n: int) -> None:
        """Send a job its n tokens. With learned positions, a full context restarts from its second half, as `generate`
        does."""
        piece = Drawn(*(x[:n, i] for x in drawn))
        job.ids = [*job.ids, *piece.token.tolist()]
        job.tokens, job.step = job.tokens - n, job.step + n
        job.put(Piece(piece, job.first))
        if not self.slides and job.read >= self.config.block_size:
            job.first, job.read, job.since = len(job.ids) - max(1, self.config.block_size // 2), 0, self.turns
