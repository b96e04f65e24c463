"""The roofline of this machine, and where each part of a model stands under it.

A part with F FLOPs and M bytes of memory traffic takes at least max(F / peak, M / bandwidth) (Williams, Waterman and
Patterson, "Roofline", 2009). Above F / M = peak / bandwidth, the ridge, compute is the limit; below, memory is.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import kernels, model, prng
from jaxgpt.config import Config, ModelConfig
from jaxgpt.model import MLP, MultiHeadAttention
from jaxgpt.optimizer import make_optimizer
from jaxgpt.profile.programs import Program, xla_counts
from jaxgpt.profile.rounds import repeat
from jaxgpt.step import init_state

N = 2048
"""Rows and columns of the matrices that measure peak FLOP/s: 2 N³ FLOPs."""
STREAMED = 2**26
"""float32 numbers in the array that measures bandwidth: 256 MB, more than most caches."""


class Machine(NamedTuple):
    flops: float  # matmul FLOP/s
    bandwidth: float  # bytes/s

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which compute is the limit."""
        return self.flops / self.bandwidth

    def least(self, work: "Work") -> float:
        """Seconds that `work` takes at least."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


class Work(NamedTuple):
    """One pass of a part: forward alone, or forward and backward."""

    part: str
    training: bool
    times: int
    """Runs in a step of one micro-batch; 0 for a part inside another."""
    flops: float
    """By XLA's count before it optimises, or of the matmuls alone if that is more: XLA does not see into kernels."""
    matmul_flops: int
    bytes: int
    """Of its arguments and results, each moved once."""
    call: Callable[[], Any]
    """Runs it on ones, compiled; does not wait for the device."""


class Norm(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return model.norm(self.config, "norm")(x)


def works(config: Config) -> list[Work]:
    """The parts of a training step of one micro-batch, forward and with backward pass, and the optimizer.

    They are the model's own modules, and together have its parameters and matmuls. Nothing is compiled yet.
    """
    cfg, B = config.model, config.train.batch_size // config.train.accumulate
    T, C, L = cfg.block_size, cfg.n_embd, cfg.n_layer
    idx, x = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T, C), jnp.float32)
    rest = replace(cfg, n_layer=0, scan_layers=False)
    params = jax.eval_shape(lambda key: model.init_params(rest, key), prng.key(0))
    found = _passes(
        "embeddings, head, loss",
        1,
        lambda p, idx, targets: model.losses(rest, p, idx, targets).mean(),
        params,
        idx,
        idx,
    )
    if cfg.kind == "gpt":
        D = C // cfg.n_head
        q, k = (jax.ShapeDtypeStruct((B, n, T, D), jnp.float32) for n in (cfg.n_head, cfg.n_kv_head or cfg.n_head))
        found += _passes("norm", 2 * L, *_module(Norm(cfg), x))
        found += _passes("attention", L, *_module(MultiHeadAttention(cfg), x, idx=idx))
        found += _passes(
            "attention's kernel", 0, lambda p, q, k, v: kernels.causal_attention(cfg, q, k, v), {}, q, k, k
        )
        found += _passes("MLP", L, *_module(MLP(cfg), x))

    def update(params: model.Params, opt_state: Any, grads: model.Params) -> Any:
        updates, opt_state = make_optimizer(config).update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates), opt_state

    state = jax.eval_shape(init_state, config)
    return [*found, _work("optimizer", True, 1, update, (state.params, state.opt_state, state.params))]


def _module(module: nn.Module, x: Any, **ids: Any) -> tuple[Any, ...]:
    """A module as (function of params, x and ids, the shapes of these)."""
    variables = jax.eval_shape(module.init, prng.key(0), x, **ids)

    def apply(params: Any, x: jax.Array, *arrays: jax.Array) -> jax.Array:
        settings: dict[str, Any] = dict(zip(ids, arrays, strict=True))
        out: jax.Array = module.apply({"params": params}, x, **settings)  # type: ignore[assignment]
        return out

    return apply, variables.get("params", {}), x, *ids.values()


def _passes(name: str, times: int, function: Callable[..., Any], *shapes: Any) -> list[Work]:
    """The forward pass, and forward and backward: the result, and the gradient of all that is no id."""

    def both(cotangent: Any, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def of_floats(*values: Any) -> Any:
            whole = [values[floats.index(i)] if i in floats else leaf for i, leaf in enumerate(leaves)]
            return function(*jax.tree.unflatten(tree, whole))

        result, backward = jax.vjp(of_floats, *(leaves[i] for i in floats))
        return result, backward(cotangent)

    out = jax.eval_shape(function, *shapes)
    return [_work(name, False, times, function, shapes), _work(name, True, times, both, (out, *shapes))]


def _work(name: str, training: bool, times: int, function: Callable[..., Any], shapes: Any) -> Work:
    program = Program(jax.jit(function), shapes, 0)
    counted = sum(value for key, value in xla_counts(program.lowered).items() if key != "bytes accessed")
    arrays: list[Any] = []

    def call() -> Any:
        if not arrays:
            arrays.extend(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes))
        return program.compiled(*arrays)

    matmul_flops = program.matmul_flops
    return Work(name, training, times, max(float(matmul_flops), counted), matmul_flops, program.bytes, call)


def measure(works: Sequence[Work], rounds: int = 5, seconds: float = 0.02) -> list[float]:
    """Seconds of each work, the median of rounds in turn; in a round each runs for `seconds`, at least once."""

    def one_round(work: Work) -> float:
        def run() -> int:
            jax.block_until_ready(work.call())
            return 1

        n, took = repeat(run, seconds)
        return took / n

    for work in works:
        jax.block_until_ready(work.call())  # compiles
    times = [[one_round(work) for work in works] for _ in range(rounds)]
    return [statistics.median(each) for each in zip(*times, strict=True)]


def measure_machine(dtype: str, n: int = N, streamed: int = STREAMED, seconds: float = 0.4, rounds: int = 3) -> Machine:
    """The best of some rounds of JAX on its first device.

    The bandwidth is that of an array read, scaled and written in place, 8 bytes a number as STREAM counts its "scale"
    (McCalpin 1995). On a CPU a new array would cost a page fault every 4 kB, several times as slow as memory.
    """
    x = jax.random.normal(prng.key(0), (n, n), jnp.dtype(dtype))
    matmul = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    scale = jax.jit(lambda x: -1 * x, donate_argnums=0)
    array = [jnp.ones(streamed, jnp.float32)]

    def multiply() -> int:
        jax.block_until_ready(matmul(x))
        return 2 * n**3

    def stream() -> int:
        array[0] = jax.block_until_ready(scale(array[0]))
        return 8 * streamed

    best = [0.0, 0.0]
    multiply()  # compiles
    stream()
    for _ in range(rounds):
        for i, run in enumerate((multiply, stream)):
            units, took = repeat(run, seconds)
            best[i] = max(best[i], units / took)
    return Machine(*best)
