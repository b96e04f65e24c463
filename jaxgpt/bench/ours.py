"""jaxgpt's side of a contest: the very functions that `jaxgpt train` and `jaxgpt sample` call."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import memory, prng
from jaxgpt import model as nn
from jaxgpt.bench.worker import forget_peak, peak_resident_bytes, resident
from jaxgpt.config import from_tree
from jaxgpt.feed import feeder
from jaxgpt.mesh import Sizes, place
from jaxgpt.placement import ONE_DEVICE, fresh
from jaxgpt.sample import generate
from jaxgpt.step import Metrics


def random_tokens(vocab_size: int, n: int = 1_000_000) -> Any:
    """(n,) ids: how fast a step is does not depend on what it learns."""
    return np.random.default_rng(0).integers(vocab_size, size=n).astype(np.uint16)


class OnJax:
    """What contestants on JAX share: the device, its memory, and nothing to wait for."""

    def __init__(self) -> None:
        device = jax.local_devices()[0]
        self.about: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}

    def wait(self) -> None: ...

    def peak_bytes(self) -> int:
        stats = jax.local_devices()[0].memory_stats() or {}
        return int(stats.get("peak_bytes_in_use", 0)) or peak_resident_bytes()


class Training(OnJax):
    """`scan_steps` steps a piece through `train_steps`, fed and read as `loop.fit` does. Units are tokens.


    Args:
      mesh: sizes of a mesh, as `--mesh` takes them; one device without.
    """

    def __init__(self, config: Any, mesh: str = ""):
        super().__init__()
        self.config = from_tree(config)
        self.placement = place(self.config, Sizes.parse(mesh))[0] if mesh else ONE_DEVICE
        tokens = random_tokens(self.config.model.vocab_size)
        self.feed, self.steps = feeder(self.config, tokens, self.placement), self.placement.steps(self.config)
        self.step = 0
        self.unread: Metrics | None = None
        served = self.feed(0, self.config.train.scan_steps)
        with self.placement.scope():
            self.state = jax.block_until_ready(fresh(self.config, self.placement))
            began = time.perf_counter()
            compiled = self.steps.lower(self.config, self.state, *served).compile()
        self.about |= {
            "compile_seconds": time.perf_counter() - began,
            "compiled_bytes": sum(memory.compiled_bytes(compiled) or ()) or None,
            "paper_bytes": memory.needed(self.config, 0).total,
        }
        self.warm_up()

    def warm_up(self) -> None:
        self.run()
        self.wait()

    def run(self) -> int:
        train = self.config.train
        served = self.feed(self.step, self.step + train.scan_steps)
        with self.placement.scope():
            self.state, metrics = self.steps(self.config, self.state, *served)
        if self.unread:
            jax.device_get(self.unread)
        self.unread, self.step = metrics, self.step + train.scan_steps
        return train.scan_steps * train.batch_size * self.config.model.block_size

    def wait(self) -> None:
        jax.block_until_ready(self.state)


class Footprint(Training):
    """`Training` that watches its first piece: `step_bytes` is what that took on a CPU, the state included."""

    def warm_up(self) -> None:
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        forgotten, before = forget_peak(), resident()  # the compiler's own memory is given back, or in `before`
        super().warm_up()
        most = resident(peak=True)
        self.about["step_bytes"] = most - before + held if forgotten and most and before else None


class Sampling(OnJax):
    """One generation of `n_tokens` for each of `batch_size` sequences a piece. Units are tokens."""

    def __init__(self, config: Any, batch_size: int, n_tokens: int, temperature: float, top_k: int):
        super().__init__()
        self.model, self.n_tokens = from_tree(config).model, n_tokens
        self.params = jax.jit(nn.init_params, static_argnums=0)(self.model, prng.key(0))
        self.prompt, self.draw = np.zeros((batch_size, 1), np.int32), {"temperature": temperature, "top_k": top_k}
        self.key = prng.key(1)
        jax.block_until_ready(self.params)
        began = time.perf_counter()
        self.run()
        self.about["first_seconds"] = time.perf_counter() - began

    def run(self) -> int:
        ids = generate(self.model, self.params, self.prompt, self.n_tokens, self.key, **self.draw)
        return int(np.asarray(ids).size)


class Product(OnJax):
    """A product of two (n, n) matrices a piece. Units are operations, 2 n³."""

    def __init__(self, n: int, dtype: str):
        super().__init__()
        self.x = jax.random.normal(prng.key(0), (n, n), jnp.dtype(dtype))
        self.product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
        self.run()

    def run(self) -> int:
        jax.block_until_ready(self.product(self.x))
        return 2 * self.x.shape[0] ** 3


class Stream(OnJax):
    """An array of `n` float32 numbers read, scaled and written a piece. Units are bytes, 8 n: as STREAM counts its
    "scale" (McCalpin 1995), without what a cache may fetch before it writes. It is written where it was read: on a CPU
    a fresh array costs a page fault every 4 kB, which is several times as slow as memory."""

    def __init__(self, n: int):
        super().__init__()
        self.x = jnp.ones(n, jnp.float32)
        self.scale = jax.jit(lambda x: -1 * x, donate_argnums=0)
        self.run()

    def run(self) -> int:
        self.x = jax.block_until_ready(self.scale(self.x))
        return 8 * self.x.size
