"""Many runs as one program: a training step mapped over seeds and continuous settings. Each member is a run of its own.

The mapped settings are a pytree of traced numbers (`optimizer.Hyperparameters`). Each combination of the other settings
(sizes, kinds) is a program of its own. The members are sharded over a mesh of one axis. On an accelerator the members
of a device run side by side (vmap), on a CPU in turn (lax.map): batched matmuls are no faster there, and one device per
core keeps all cores busy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from jaxgpt import model
from jaxgpt.cli import memory
from jaxgpt.config import Config, replaced
from jaxgpt.corpus import Corpus
from jaxgpt.data import DEVICE_TOKENS, chunks, config_starts, evaluation_windows, gather
from jaxgpt.evaluation import Evaluation, evaluation, loss_sums, map_batches, windows_per_batch
from jaxgpt.optimizer import Hyperparameters, hyperparameters
from jaxgpt.step import Metrics, TrainState, init_state, train_steps
from jaxgpt.sweep.grid import Member
from jaxgpt.tokenizer import Ids
from jaxgpt.train import due

OFF = ("learning_rate", "warmup_steps", "grad_clip", "dropout")
"""Settings that 0 switches off: members with a 0 need another program."""
CPU_MEMBERS = 8
"""Most members that a CPU trains together: enough for its cores, and few enough that an interrupt loses little."""
MEMORY_SHARE = 0.3
"""Share of an accelerator's free memory that the estimate for its members may take: a compiled step of *tiny* takes
more than twice its estimate."""


class Score(NamedTuple):
    """A member after `step` steps: a line of results.jsonl. Losses are in nats per token."""

    member: int  # its index
    setting: dict[str, Any]
    seed: int
    step: int
    val_loss: float | None  # over the whole validation split; like the next three, None if it diverged
    val_standard_error: float | None
    val_bits_per_char: float | None
    val_bits_per_byte: float | None
    train_loss: float | None  # mean over the last scan; None before the first
    diverged: bool
    done: bool  # at its last step, or after max_skipped non-finite steps in a row


class Chunk(NamedTuple):
    """Members that train together."""

    base: Config  # of one of them; the others differ in mapped settings only
    names: tuple[str, ...]  # of the mapped settings
    members: tuple[int, ...]  # indices in the list of all members
    devices: int
    size: int  # with padding, a multiple of the devices


def split(configs: Sequence[Config], devices: int, at_once: int = 0) -> list[Chunk]:
    """The chunks of a sweep, with `at_once` members at most, or as many as fit in memory. Raises as `max_members`."""
    programs: dict[Config, list[int]] = {}
    for i, config in enumerate(configs):
        programs.setdefault(program_of(config), []).append(i)
    found = []
    for members in programs.values():
        hypers = [hyperparameters(configs[i]) for i in members]
        names = tuple(name for name in Hyperparameters._fields if len({getattr(each, name) for each in hypers}) > 1)
        for steps in dict.fromkeys(configs[i].train.steps for i in members):
            alike = [i for i in members if configs[i].train.steps == steps]
            base, used = configs[alike[0]], min(devices, len(alike), at_once or devices)
            n_chunks = -(-len(alike) // max_members(base, used, at_once))
            size = -(-len(alike) // n_chunks // used) * used
            for first in range(0, len(alike), size):
                together = tuple(alike[first : first + size])
                found.append(Chunk(base, names, together, used, -(-len(together) // used) * used))
    return found


def max_members(config: Config, devices: int, at_once: int = 0) -> int:
    """The most members that train together, a multiple of `devices`. An OutOfMemoryError if one per device does not
    fit."""
    cpu = in_turn()
    try:
        memory.require(config, copies=devices)
    except memory.OutOfMemoryError as error:
        if devices == 1:
            raise
        raise memory.OutOfMemoryError(f"{error}; or fewer members at once: --at-once {devices // 2}") from error
    free, need = memory.available(), memory.needed(config, 0, recomputed=not cpu).total
    share = 1 if cpu else MEMORY_SHARE * devices  # the devices of a CPU have one memory
    fit = CPU_MEMBERS if free is None else int(share * free / need)
    fit = min(CPU_MEMBERS, fit) if cpu else fit
    return max(1, (at_once or fit) // devices) * devices


def program_of(config: Config) -> Config:
    """What members of one program have in common: `config` with 1 for each mapped setting and for the length."""
    mapped = {name: 1 for name, value in hyperparameters(config)._asdict().items() if value != 0 or name not in OFF}
    return replaced(config, **mapped, min_lr_ratio=1, steps=1)


def in_turn() -> bool:
    """Whether the members of a device run in turn."""
    return jax.default_backend() == "cpu"


class Program:
    """Compiled functions of M members that differ in mapped settings only; arrays (M, ...) are sharded by member."""

    def __init__(self, base: Config, devices: Sequence[Any]):
        mesh, hyper = Mesh(np.array(devices), ("member",)), hyperparameters(base)
        self.sharding = NamedSharding(mesh, P("member"))

        def init(shared: None, values: dict[str, jax.Array]) -> TrainState:
            return init_state(base, hyper._replace(**values))

        def steps(tokens: Any, state: TrainState, values: dict[str, jax.Array], windows: jax.Array) -> Any:
            return train_steps(base, state, tokens, windows, hyper._replace(**values))

        def sums(batches: tuple[jax.Array, jax.Array], params: model.Params) -> jax.Array:
            return map_batches(partial(model.losses, base.model, params), *batches)

        def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
            """`function` of M members: its first argument is common to all, the others have a leading axis M."""

            def on_device(shared: Any, own: Any) -> Any:
                def of_one(mine: Any) -> Any:
                    return function(shared, *mine)

                return jax.lax.map(of_one, own) if in_turn() else jax.vmap(of_one)(own)

            ours = P("member")
            sharded = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), ours), out_specs=ours, check_vma=False)
            return lambda shared, *own: sharded(shared, own)

        self.init = jax.jit(partial(mapped(init), None))
        """values {name: (M,)} -> states of M members."""
        self.steps = jax.jit(mapped(steps), donate_argnums=1)
        """tokens (N,) or None, states, values, windows (M, K, ...) -> states K steps later, metrics (M, K)."""
        self.loss_sums = jax.jit(mapped(sums))
        """(windows (K, B, T + 1), skip (K, B)), params -> `map_batches` of M members, (M, K, B)."""


def run(
    members: Sequence[Member],
    corpus: Corpus,
    devices: Sequence[Any],
    at_once: int = 0,
    finished: frozenset[int] = frozenset(),
) -> Iterator[list[Score]]:
    """Train each chunk whose members are not all `finished`, sharded over `devices`. Its finished members train along,
    so that nothing is rounded differently. Configs are as `runs.resolve` completes them, for one corpus.

    Yields the scores of each evaluation, also those of members that are done. Evaluations come as in a run (eval_every,
    eval_start).
    """
    programs: dict[Any, Program] = {}
    for chunk in split([member.config for member in members], len(devices), at_once):
        if not finished.issuperset(chunk.members):
            key = program_of(chunk.base), chunk.devices
            program = programs.setdefault(key, Program(chunk.base, devices[: chunk.devices]))
            yield from train(program, chunk, members, corpus)


def train(program: Program, chunk: Chunk, members: Sequence[Member], corpus: Corpus) -> Iterator[list[Score]]:
    """Train the members of one chunk; yields as `run`."""
    base, M = chunk.base, chunk.size
    padded = chunk.members + chunk.members[-1:] * M
    configs = [members[i].config for i in padded[:M]]
    train_tokens, val_tokens = corpus.split(base.data)
    parts, whole = corpus.training_parts(base.data), len(train_tokens) <= DEVICE_TOKENS
    on_device = jax.device_put(np.asarray(train_tokens), NamedSharding(program.sharding.mesh, P())) if whole else None
    # The map needs an array (M,), also where no setting differs.
    values = jax.device_put({name: column(configs, name) for name in chunk.names or ("seed",)}, program.sharding)
    state = program.init(values)
    skipped, stopped = np.zeros(M, int), np.zeros(M, bool)  # skipped: consecutive steps
    train_losses = np.full(M, np.nan)  # means over the last scan
    unread: list[Metrics] = []  # of the scans since the last evaluation

    def scores(step: int) -> list[Score]:
        found = evaluate(program, state.params, corpus, val_tokens, chunk)
        rows = zip(chunk.members, found, train_losses, stopped.tolist(), strict=False)  # without the padding
        return [score(i, members[i], step, *row) for i, *row in rows]

    if base.train.eval_start:
        yield scores(0)
    for begin, end in chunks(base, 0):
        starts = np.stack([config_starts(config, parts, begin, end) for config in configs])
        windows = starts.astype(np.int32) if whole else gather(train_tokens, starts, base.model.block_size)
        state, metrics = program.steps(on_device, state, values, jax.device_put(windows, program.sharding))
        jax.block_until_ready(unread[-1:])  # at most two scans are in flight
        unread.append(metrics)
        if due(base, end):
            scans = jax.device_get(unread)
            unread.clear()
            for applied in np.concatenate([scan.applied for scan in scans], axis=1).T:
                skipped = np.where(applied, 0, skipped + 1)
                stopped |= skipped >= base.train.max_skipped
            train_losses = scans[-1].loss.mean(axis=1, dtype=np.float64)
            yield scores(end)
            if stopped.all():
                return


def evaluate(program: Program, params: model.Params, corpus: Corpus, tokens: Ids, chunk: Chunk) -> list[Evaluation]:
    """The loss of each member, padding included, over the whole of `tokens`, as `evaluation.evaluate`."""
    config = chunk.base.model
    T = config.block_size
    starts, skip = evaluation_windows(len(tokens), T)
    B = windows_per_batch(config, len(starts), 1 if in_turn() else chunk.size // chunk.devices)
    sums = loss_sums(lambda *batches: program.loss_sums(batches, params), tokens, T, starts, skip, B)
    return [evaluation(each, T, tokens, corpus.tokenizer) for each in sums]


def score(i: int, member: Member, step: int, result: Evaluation, train_loss: float, stopped: bool) -> Score:
    """The score of member `i`; `stopped` after max_skipped non-finite steps in a row."""
    diverged, train = stopped or not math.isfinite(result.loss), member.config.train
    figures = [*([math.nan] * 4 if diverged else astuple(result)[:4]), train_loss]
    known = [float(x) if math.isfinite(x) else None for x in figures]
    done = stopped or step == train.steps
    return Score._make((i, member.setting, train.seed, step, *known, diverged, done))


def column(configs: Sequence[Config], name: str) -> NDArray[Any]:
    """A mapped setting of M members: (M,)."""
    values = [getattr(hyperparameters(config), name) for config in configs]
    return np.array(values, np.uint32 if name == "seed" else np.float32)
