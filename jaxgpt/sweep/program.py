"""Many runs as one program: seeds and continuous settings are mapped over, each member a run like any other.

The training step itself is mapped: the continuous settings of a config are a pytree of traced numbers. Discrete
settings (sizes, kinds) make a program each. The members are sharded over a mesh of one axis. On accelerators those of a
device are computed side by side (vmap), on CPUs one after another (lax.map): batched matmuls are no faster there, and a
device for each core keeps all of them busy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.corpus import Corpus
from jaxgpt.data import DEVICE_TOKENS, Ids, chunks, config_starts, evaluation_windows, gather
from jaxgpt.evaluation import Evaluation, evaluation, loss_sums, map_batches, windows_per_batch
from jaxgpt.optimizer import Hyperparameters, hyperparameters
from jaxgpt.step import Metrics, TrainState, init_state, train_steps
from jaxgpt.sweep.chunks import Chunk, program_of, setting, split
from jaxgpt.train import due


class Scored(NamedTuple):
    """A member after `step` steps."""

    member: int
    step: int
    evaluation: Evaluation | None  # over the whole validation split; None if it diverged
    train_loss: float | None  # the mean of its last scan_steps steps, in nats per token; None before the first
    done: bool  # it ended: at its last step, or after max_skipped steps in a row without a finite loss


class Program:
    """The compiled functions of members that differ in mapped settings: (M, ...) arrays, split over the devices."""

    def __init__(self, base: Config, devices: Sequence[Any]):
        self.model, mesh = base.model, Mesh(np.array(devices), ("member",))
        self.over = NamedSharding(mesh, P("member"))

        def hyper(values: dict[str, jax.Array]) -> Hyperparameters:
            return hyperparameters(base)._replace(**values)

        def steps(tokens: Any, state: TrainState, values: dict[str, jax.Array], windows: jax.Array) -> Any:
            return train_steps(base, state, tokens, windows, hyper(values))

        def sums(windows: jax.Array, skip: jax.Array, params: Any) -> jax.Array:
            return map_batches(partial(model.losses, base.model, params), windows, skip)

        self.init = jax.jit(self._spread(lambda values: init_state(base, hyper(values)), shared=0))
        """values {name: (M,)} -> states of M members."""
        self.steps = jax.jit(self._spread(steps, shared=1), donate_argnums=1)
        """tokens (N,) or None, states, values, windows (M, K, ...) -> states K steps later, metrics (M, K)."""
        self.loss_sums = jax.jit(self._spread(sums, shared=2))
        """windows (K, B, T + 1), skip (K, B), params -> `map_batches` of M members, (M, K, B)."""

    @property
    def one_by_one(self) -> bool:
        """Whether the members of a device take turns, and are not computed side by side."""
        return bool(self.over.mesh.devices.flat[0].platform == "cpu")

    def _spread(self, function: Callable[..., Any], shared: int) -> Callable[..., Any]:
        """`function` of one member for M of them: its first `shared` arguments are the same for all, the others have an
        axis of M in front."""

        def on_device(*given: Any) -> Any:
            def of_one(mine: Any) -> Any:
                return function(*given[:shared], *mine)

            return jax.lax.map(of_one, given[shared:]) if self.one_by_one else jax.vmap(of_one)(given[shared:])

        def of_all(*given: Any) -> Any:
            specs = (P(),) * shared + (P("member"),) * (len(given) - shared)
            mesh = self.over.mesh
            return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P("member"), check_vma=False)(*given)

        return of_all


def run(
    configs: Sequence[Config],
    corpus: Corpus,
    devices: Sequence[Any],
    at_once: int = 0,
    finished: frozenset[int] = frozenset(),
) -> Iterator[int | list[Scored]]:
    """Train every config that is not `finished`, chunk by chunk; yields scores, and between them how many more steps
    were dispatched, summed over members.

    Members are evaluated when runs of their configs would be (eval_every, eval_start). There are no random-batch
    estimates (eval_batches), and no weights are kept.

    Args:
      configs: completed by `runs.resolve`, of one corpus.
      devices: to split the members over.
    """
    programs: dict[Any, Program] = {}
    for chunk in split(configs, len(devices), at_once, finished):
        key = program_of(chunk.base), chunk.names, chunk.devices
        program = programs.setdefault(key, Program(chunk.base, devices[: chunk.devices]))
        yield from train(program, chunk, configs, corpus)


def train(program: Program, chunk: Chunk, configs: Sequence[Config], corpus: Corpus) -> Iterator[int | list[Scored]]:
    """Train the members of one chunk."""
    base, members, over, n = chunk.base, chunk.members, program.over, len(chunk.members)
    filled = [configs[i] for i in (*members, *members[-1:] * (chunk.size - n))]
    train_tokens, val_tokens = corpus.split(base.data)
    parts, whole = corpus.training_parts(base.data), len(train_tokens) <= DEVICE_TOKENS
    on_device = jax.device_put(np.asarray(train_tokens), NamedSharding(over.mesh, P())) if whole else None
    # One member, or equal ones: the map still needs an axis.
    values = jax.device_put({name: column(filled, name) for name in chunk.names or ("seed",)}, over)
    state = program.init(values)
    skipped, means = np.zeros(n, int), np.full(n, np.nan)  # steps in a row; training losses of the last scan
    ended, reported = np.zeros(n, bool), np.zeros(n, bool)  # by divergence
    unread: Metrics | None = None  # of the newest scan, which the devices may still compute

    def read() -> None:
        nonlocal skipped, means
        if unread:
            metrics = jax.device_get(unread)
            for applied in metrics.applied[:n].T:
                skipped = np.where(applied, 0, skipped + 1)
                ended[skipped >= base.train.max_skipped] = True
            means = metrics.loss[:n].mean(axis=1, dtype=np.float64)

    def score(step: int) -> list[Scored]:
        evaluations = evaluate(program, state.params, corpus, val_tokens, chunk.size)
        last, found = step == base.train.steps, []
        for i in np.flatnonzero(~reported):
            lost = ended[i] or not math.isfinite(evaluations[i].loss)
            mean = float(means[i]) if math.isfinite(means[i]) else None
            found.append(Scored(members[i], step, None if lost else evaluations[i], mean, bool(last or ended[i])))
        reported[ended] = True
        return found

    if base.train.eval_start:
        yield score(0)
    for begin, end in chunks(base, 0):
        starts = np.stack([config_starts(config, parts, begin, end) for config in filled])
        windows = starts.astype(np.int32) if whole else gather(train_tokens, starts, base.model.block_size)
        state, metrics = program.steps(on_device, state, values, jax.device_put(windows, over))
        read()
        yield n * (end - begin)
        unread = metrics
        if due(base, end):
            read()
            unread = None
            yield score(end)
            if ended.all():
                return


def evaluate(program: Program, params: Any, corpus: Corpus, tokens: Ids, M: int) -> list[Evaluation]:
    """The loss of each of M members over the whole of `tokens`, as `evaluation.evaluate`."""
    T = program.model.block_size
    starts, skip = evaluation_windows(len(tokens), T)
    B = windows_per_batch(program.model, len(starts), 1 if program.one_by_one else -(-M // program.over.num_devices))
    sums = loss_sums(lambda *batches: program.loss_sums(*batches, params), tokens, T, starts, skip, B)
    return [evaluation(each, T, tokens, corpus.tokenizer) for each in sums]


def column(configs: Sequence[Config], name: str) -> NDArray[Any]:
    """A mapped setting of M members: (M,)."""
    return np.array([setting(config, name) for config in configs], np.uint32 if name == "seed" else np.float32)
