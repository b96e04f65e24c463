"""Many runs as one program: seeds and continuous settings are mapped over, each member a run like any other.

The training step itself is mapped: the continuous settings of a config are a pytree of traced numbers. Discrete
settings (sizes, kinds) make a program each. The members are sharded over a mesh of one axis. On accelerators those of a
device are computed side by side (vmap), on CPUs one after another (lax.map): batched matmuls are no faster there, and a
device for each core keeps all of them busy.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from jaxgpt import data as batches
from jaxgpt.config import Config
from jaxgpt.corpus import Corpus
from jaxgpt.data import DEVICE_TOKENS, chunks, config_starts
from jaxgpt.evaluation import Evaluation, evaluation, loss_sums, window_losses, windows_per_batch
from jaxgpt.optimizer import Hyperparameters, hyperparameters
from jaxgpt.step import Metrics, TrainState, init_state, train_steps
from jaxgpt.sweep.chunks import Chunk, program_of, setting, split
from jaxgpt.train import due

SCORED_BY_A_CORE = 2048
"""Tokens per batch of an evaluation on a CPU: they fit in the caches of a core."""


class Progress(NamedTuple):
    """The members of a chunk after `step` of `steps`, with their newest losses."""

    members: tuple[int, ...]
    step: int
    steps: int
    losses: list[float]


class Scored(NamedTuple):
    """A member after `step` steps."""

    member: int
    step: int
    evaluation: Evaluation | None  # over the whole validation split; None if it diverged
    train_loss: float | None  # the mean of its last scan_steps steps, in nats per token; None before the first
    done: bool  # it ended: at its last step, or after max_skipped steps in a row without a finite loss


@dataclass(frozen=True)
class Program:
    """The compiled functions of chunks of one program: (M, ...) arrays of members over the devices, in and out."""

    base: Config
    names: tuple[str, ...]
    devices: tuple[Any, ...]

    @cached_property
    def over_members(self) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self.devices), ("member",)), P("member"))

    @property
    def one_by_one(self) -> bool:
        """Whether the members of a device take turns, and are not computed side by side."""
        return bool(self.devices[0].platform == "cpu")

    def hyper(self, values: dict[str, jax.Array]) -> Hyperparameters:
        """Those of a member: `values` where they are mapped, else those of the base config."""
        return hyperparameters(self.base)._replace(**values)

    @cached_property
    def init(self) -> Any:
        """values {name: (M,)} -> states of M members."""
        return jax.jit(self._spread(lambda values: init_state(self.base, self.hyper(values)), shared=0))

    @cached_property
    def steps(self) -> Any:
        """tokens (N,) or None, states, values, windows (M, K, ...) -> states K steps later, metrics (M, K). Donates
        states."""

        def of_one(tokens: Any, state: TrainState, values: dict[str, jax.Array], windows: jax.Array) -> Any:
            return train_steps(self.base, state, tokens, windows, self.hyper(values))

        return jax.jit(self._spread(of_one, shared=1), donate_argnums=1)

    @cached_property
    def losses(self) -> Any:
        """batch (B, T), skip (B,), params -> `window_losses` of M members, (M, B)."""
        model = self.base.model
        return jax.jit(self._spread(lambda batch, skip, params: window_losses(model, params, batch, skip), shared=2))

    def _spread(self, function: Any, shared: int) -> Any:
        """`function` of one member for M of them: its first `shared` arguments are the same for all, the others have an
        axis of M in front."""

        def on_device(*given: Any) -> Any:
            def of_one(mine: Any) -> Any:
                return function(*given[:shared], *mine)

            return jax.lax.map(of_one, given[shared:]) if self.one_by_one else jax.vmap(of_one)(given[shared:])

        def of_all(*given: Any) -> Any:
            specs = (P(),) * shared + (P("member"),) * (len(given) - shared)
            mesh = self.over_members.mesh
            return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P("member"), check_vma=False)(*given)

        return of_all


def run(
    configs: Sequence[Config],
    corpus: Corpus,
    devices: Sequence[Any],
    at_once: int = 0,
    finished: frozenset[int] = frozenset(),
) -> Iterator[Progress | list[Scored]]:
    """Train every config that is not `finished`, chunk by chunk; yields progress and scores.

    Members are evaluated when runs of their configs would be (eval_every, eval_start). There are no random-batch
    estimates (eval_batches), and no weights are kept.

    Args:
      configs: completed by `runs.resolve`, of one corpus.
      devices: to split the members over.
    """
    programs: dict[Any, Program] = {}
    for chunk in split(configs, len(devices), at_once, finished):
        key = program_of(chunk.base), chunk.names, chunk.devices
        program = programs.setdefault(key, Program(chunk.base, chunk.names, tuple(devices[: chunk.devices])))
        yield from train(program, chunk, configs, corpus)


def train(
    program: Program, chunk: Chunk, configs: Sequence[Config], corpus: Corpus
) -> Iterator[Progress | list[Scored]]:
    """Train the members of one chunk.

    Raises:
      OutOfMemoryError: the compiled step does not fit.
    """
    base, members, over = chunk.base, chunk.members, program.over_members
    filled = [configs[i] for i in (*members, *members[-1:] * (chunk.size - len(members)))]
    train_tokens, val_tokens = corpus.split(base.data)
    parts, watch = corpus.training_parts(base.data), Watch(base, members)
    whole = len(train_tokens) <= DEVICE_TOKENS
    everywhere = NamedSharding(over.mesh, P())
    on_device = jax.device_put(np.asarray(train_tokens), everywhere) if whole else None
    # One member, or equal ones: the map still needs an axis.
    values = jax.device_put({name: _column(filled, name) for name in chunk.names or ("seed",)}, over)

    def load(begin: int, end: int) -> jax.Array:
        """The windows (M, K, ...) of these steps, as `train_steps` takes them."""
        starts = np.stack([config_starts(config, parts, begin, end) for config in filled])
        windows = starts.astype(np.int32) if whole else batches.gather(train_tokens, starts, base.model.block_size)
        return jax.device_put(windows, over)

    def score(state: TrainState, step: int) -> list[Scored]:
        return watch.scored(step, evaluate(program, state.params, corpus, val_tokens, chunk.size))

    with ThreadPoolExecutor(1, "compile") as background:
        first, shapes = load(*next(chunks(base, 0))), jax.eval_shape(program.init, values)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over), shapes)
        ahead = background.submit(lambda: program.steps.lower(on_device, like, values, first).compile())
        state = program.init(values)
        if base.train.eval_start:
            yield score(state, 0)
        steps = ahead.result()
    for begin, end in chunks(base, 0):
        windows = load(begin, end)
        compiled = steps if windows.shape == first.shape else program.steps
        state, metrics = compiled(on_device, state, values, windows)
        if losses := watch.read():
            yield Progress(members, begin, base.train.steps, losses)
        watch.unread = metrics
        if due(base, end):
            watch.read()
            yield score(state, end)
            if watch.ended.all():
                return


def evaluate(program: Program, params: Any, corpus: Corpus, tokens: batches.Ids, M: int) -> list[Evaluation]:
    """The loss of each of M members over the whole of `tokens`, as `evaluation.evaluate`."""
    model = program.base.model
    starts, skip = batches.evaluation_windows(len(tokens), model.block_size)
    if program.one_by_one:
        B = max(1, SCORED_BY_A_CORE // model.block_size)
    else:
        B = windows_per_batch(model, len(starts), -(-M // len(program.devices)))
    sums = loss_sums(lambda *batch: program.losses(*batch, params), tokens, model.block_size, starts, skip, B)
    return [evaluation(each, model.block_size - skip, tokens, corpus.tokenizer) for each in sums]


class Watch:
    """The losses of the members of a chunk, read one scan late, and which of them diverged."""

    def __init__(self, base: Config, members: Sequence[int]):
        n = len(members)
        self._base, self._members, self._skipped = base, members, np.zeros(n, int)
        self.unread: Metrics | None = None
        """Metrics (M, K) that the devices may still be computing."""
        self.ended = np.zeros(n, bool)
        """Members without a finite loss in max_skipped steps in a row."""
        self._over, self._means = set[int](), np.full(n, np.nan)

    def read(self) -> list[float]:
        """The newest loss of each member, which may wait for the devices; an empty list if there are no new ones."""
        if self.unread is None:
            return []
        n, metrics, self.unread = len(self.ended), jax.device_get(self.unread), None
        for applied in metrics.applied[:n].T:
            self._skipped = np.where(applied, 0, self._skipped + 1)
            self.ended |= self._skipped >= self._base.train.max_skipped
        self._means = metrics.loss[:n].mean(axis=1, dtype=np.float64)
        return [float(x) for x in metrics.loss[:n, -1]]

    def scored(self, step: int, scores: Sequence[Evaluation]) -> list[Scored]:
        """The scores of the members after `step` steps; one that ended by divergence is scored once."""
        found = []
        for member, score, ended, mean in zip(self._members, scores, self.ended, self._means, strict=False):
            if member not in self._over:
                lost = ended or not math.isfinite(score.loss)
                train_loss = float(mean) if math.isfinite(mean) else None
                done = bool(ended or step == self._base.train.steps)
                found.append(Scored(member, step, None if lost else score, train_loss, done))
            if ended:
                self._over.add(member)
        return found


def _column(configs: Sequence[Config], name: str) -> NDArray[Any]:
    """A mapped setting of M members: (M,)."""
    return np.array([setting(config, name) for config in configs], np.uint32 if name == "seed" else np.float32)
