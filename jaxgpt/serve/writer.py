"""One model that generates for many jobs at once: assigns rows of the batch to them, reads prompts and decodes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.run import Run
from jaxgpt.sample import bucket, for_decoding
from jaxgpt.serve import batch
from jaxgpt.serve.batch import CHUNK, Drawn, Settings

READ = 512
"""About how many prompt tokens are read at once."""
PACE = 0.05
"""Seconds between two pieces of a text: the longest that a new request waits, or that a cancelled one keeps its row."""
MEMORY = 2**30
"""Bytes that the KV caches of one model may take."""


class Piece(NamedTuple):
    """The next tokens of a text."""

    drawn: Drawn  # (n,) and (n, K)
    first: int  # where the context of these tokens begins, as a position in prompt and text


class Looked(NamedTuple):
    attention: Any  # (L, H, T), of the last token
    likely: Any  # (K,) the most likely next tokens
    likely_p: Any  # (K,)


class End(NamedTuple):
    """The last message of a job."""

    error: str = ""


@dataclass(eq=False)
class Job:
    """A request and its progress: generate `tokens` more tokens, or if 0, look at the last of `ids`."""

    run: Run
    ids: list[int]  # the prompt, at least one token, then the generated tokens
    tokens: int = 0  # still to generate
    settings: Settings = batch.DEFAULT
    seed: int = 1337
    put: Callable[[Any], None] = lambda message: None  # gets each Piece, or a Looked, then an End, in the JAX thread
    row: int = -1  # of the batch; -1 while it waits for one
    first: int = 0  # where the context begins in `ids`
    read: int = 0  # tokens in the cache; 0 if the context must be read first
    since: float = 0.0  # when it began to wait to be read
    step: int = 0  # tokens generated


class Writer:
    """A loaded model and its rows."""

    def __init__(self, config: ModelConfig, params: model.Params, n_ids: int, places: int):
        self.config, self.params, self.n_ids = config, params, n_ids
        self.decoder = for_decoding(config, params)
        cache = jax.tree.leaves(jax.eval_shape(lambda: batch.empty(config, 1)).cache)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
        self.R = max(1, min(places, MEMORY // max(1, size)))
        self.rows = batch.empty(config, self.R)
        self.widths = sorted({min(self.R, N) for N in (1, 8, self.R)})  # numbers of rows that `decode` is compiled for
        self.slides = config.kind == "bigram" or config.position == "rope"
        self.seconds = 0.0  # per token, in the last `decode`

    def turn(self, jobs: list[Job]) -> list[Job]:
        """Answer one look, assign free rows to waiting texts, read some prompts, and decode a few tokens of the others.

        Args:
          jobs: all that have not ended, in the order in which they came. The rows of others are free.

        Returns:
          The jobs that are done.
        """
        looks = [job for job in jobs if not job.tokens][:1]  # one, so that texts do not wait for many
        for look in looks:
            look.put(self._look(look.ids))
        texts = [job for job in jobs if job.tokens]
        free = sorted(set(range(self.R)) - {job.row for job in texts})
        began = time.perf_counter()
        for row, job in zip(free, [job for job in texts if job.row < 0], strict=False):
            job.row, job.first, job.since = row, max(0, len(job.ids) - self.config.block_size), began
        texts = [job for job in texts if job.row >= 0]
        while (unread := [job for job in texts if not job.read and job.tokens]) and time.perf_counter() < began + PACE:
            self._read(sorted(unread, key=lambda job: job.since))
        if decoding := [job for job in texts if job.read and job.tokens]:
            self._decode(decoding)
        return looks + [job for job in texts if not job.tokens]

    def _look(self, ids: Sequence[int]) -> Looked | End:
        T = len(ids)
        idx = np.pad(np.array([ids], np.int32), [(0, 0), (0, bucket(T, self.config.block_size) - T)])
        try:
            attention, *rest = jax.device_get(batch.look(self.config, self.params, idx, np.int32(T), self.n_ids))
        except RuntimeError as error:  # out of memory: the texts go on
            return End(str(error))
        return Looked(attention[:, :, :T], *rest)

    def _read(self, unread: list[Job]) -> None:
        """Read the context of the first job, and of others in the same bucket, and draw the next token of each."""
        W = self.config.block_size
        T = bucket(len(unread[0].ids) - unread[0].first, W)
        N = max(1, min(8, READ // T, self.widths[-1]))
        jobs = [job for job in unread if bucket(len(job.ids) - job.first, W) == T][:N]
        padded = jobs + jobs[:1] * (N - len(jobs))
        contexts = [job.ids[job.first :] for job in padded]
        settings = zip(*(job.settings for job in padded), strict=True)
        new = {
            "idx": np.array([ids + [0] * (T - len(ids)) for ids in contexts], np.int32),
            "length": np.array([len(ids) for ids in contexts], np.int32),
            "row": np.array([job.row for job in jobs] + [self.R] * (N - len(jobs)), np.int32),
            "step": np.array([job.step for job in padded], np.int32),
            "seed": np.array([job.seed for job in padded], np.uint32),
            "settings": Settings(*map(np.array, settings, batch.DTYPES)),
        }
        self.rows, drawn = batch.read(*self.decoder, self.rows, new, self.n_ids)
        drawn = jax.device_get(drawn)
        for i, job in enumerate(jobs):
            job.read = len(contexts[i])
            self._send(job, i, drawn, 1)

    def _decode(self, jobs: list[Job]) -> None:
        last = max(job.row for job in jobs)
        N = next(N for N in self.widths if last < N)
        n = min(CHUNK, max(self._room(job) for job in jobs))
        if self.seconds:
            n = max(1, min(n, int(PACE / self.seconds)))
        began = time.perf_counter()
        self.rows, drawn = batch.decode(*self.decoder, self.rows, np.int32(n), N, self.n_ids)
        drawn = jax.device_get(drawn)
        self.seconds = (time.perf_counter() - began) / n
        for job in jobs:
            m = min(n, self._room(job))  # the rest is discarded
            job.read += m
            self._send(job, job.row, drawn, m)

    def _room(self, job: Job) -> int:
        """Tokens until a job ends or must be read again."""
        return job.tokens if self.slides else min(job.tokens, self.config.block_size - job.read)

    def _send(self, job: Job, i: int, drawn: Drawn, n: int) -> None:
        """Send a job its next n tokens, column i of `drawn`. With learned positions, a full context restarts from its
        second half, as in `sample.generate`."""
        piece = Drawn(*(x[:n, i] for x in drawn))
        job.ids = [*job.ids, *piece.token.tolist()]
        job.tokens, job.step = job.tokens - n, job.step + n
        job.put(Piece(piece, job.first))
        if not self.slides and job.read >= self.config.block_size:
            job.first, job.read = len(job.ids) - max(1, self.config.block_size // 2), 0
            job.since = time.perf_counter()
