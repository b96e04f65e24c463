"""The contestants of `rates`, each in its own process: `python -m scripts.benchmarks.contestants SPEC`.

jaxgpt's side calls the functions of `jaxgpt train` and `jaxgpt sample`; PyTorch's is the twin and transformers' GPT-2.
Units of work are tokens. Each function below imports its own libraries only.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import Config, from_tree
from jaxgpt.profile.timing import repeat

DRAW: dict[str, Any] = {"temperature": 0.8, "top_k": 40}
"""On every side; 40 is below the vocabulary sizes, so that each side must select the largest logits."""


class Contestant(NamedTuple):
    about: dict[str, Any]  # device, and seconds spent compiling
    run: Callable[[], int]  # does one piece of work, and returns its tokens; the device may still be computing
    wait: Callable[[], Any]  # waits until the device is done
    peak_bytes: Callable[[], int]  # of the device, or of the process on a CPU


def answer_rounds(make: Callable[[], Contestant]) -> None:
    """The main function of a contestant's process: writes a line of JSON about itself once it has compiled and warmed
    up, then answers each line of input, a number of seconds, with the work that it did in about that time.

    Libraries print to stderr, so that stdout holds answers only.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        contestant = make()
        print(json.dumps(contestant.about), file=answers, flush=True)
        for line in sys.stdin:
            computed = time.process_time()
            units, seconds = repeat(contestant.run, float(line), contestant.wait)
            done = {"units": units, "seconds": seconds, "cpu_seconds": time.process_time() - computed}
            print(json.dumps(done | {"peak_bytes": contestant.peak_bytes()}), file=answers, flush=True)


def peak_resident_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def random_tokens(config: Config) -> Any:
    return np.random.default_rng(0).integers(config.model.vocab_size, size=1_000_000).astype(np.uint16)


def tokens_per_scan(config: Config) -> int:
    return config.train.scan_steps * config.train.batch_size * config.model.block_size


def of_jax(run: Callable[[], int], wait: Callable[[], Any], **about: Any) -> Contestant:
    """A contestant on JAX's first device."""
    import jax

    device = jax.local_devices()[0]

    def peak_bytes() -> int:
        return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0)) or peak_resident_bytes()

    return Contestant({"device": device.device_kind, **about}, run, wait, peak_bytes)


def train_jaxgpt(config: Config) -> Contestant:
    """A piece of work is `scan_steps` steps, with batches loaded and metrics read as in `fit`."""
    import jax

    from jaxgpt.data import loader
    from jaxgpt.sharding import one_device
    from jaxgpt.step import jit_train_steps, sharded_init

    mesh, K, step, unread = one_device(), config.train.scan_steps, 0, None
    load, train_steps = loader(config, random_tokens(config), mesh), jit_train_steps(config, mesh)
    began = time.perf_counter()
    state = jax.block_until_ready(sharded_init(config, mesh))
    initialized = time.perf_counter()
    train_steps.lower(state, *load(0, K)).compile()
    compiled = time.perf_counter()

    def run() -> int:
        nonlocal state, step, unread
        state, metrics = train_steps(state, *load(step, step + K))
        if unread:
            jax.device_get(unread)
        unread, step = metrics, step + K
        return tokens_per_scan(config)

    def wait() -> None:
        jax.block_until_ready(state)

    repeat(run, 0.0, wait)
    return of_jax(run, wait, init_seconds=initialized - began, compile_seconds=compiled - initialized)


def sample_jaxgpt(config: Config, batch_size: int, n_tokens: int) -> Contestant:
    """A piece of work is one `generate` of `n_tokens` for each of `batch_size` sequences."""
    import jax

    from jaxgpt import model
    from jaxgpt.sample import SamplingParams, generate

    params = jax.jit(model.init_params, static_argnums=0)(config.model, jax.random.key(0))
    prompt, key = np.zeros((batch_size, 1), np.int32), jax.random.key(1)
    jax.block_until_ready(params)

    def run() -> int:
        return np.asarray(generate(config.model, params, prompt, n_tokens, key, SamplingParams(**DRAW))).size

    return of_jax(run, lambda: None, compile_seconds=repeat(run, 0.0)[1])


def of_torch(way: Any, device: str) -> tuple[str, dict[str, Any], Callable[[], Any], Callable[[], int]]:
    """PyTorch's name of the device, what a contestant on it reports, and its `wait` and `peak_bytes`."""
    from scripts.benchmarks.twin import set_matmul_precision, torch

    torch.manual_seed(0)
    set_matmul_precision(way)
    if device == "gpu":
        about = {"device": torch.cuda.get_device_name()}
        return "cuda", about, torch.cuda.synchronize, torch.cuda.max_memory_allocated
    return "cpu", {"device": "cpu"}, lambda: None, peak_resident_bytes


def train_torch(config: Config, way: Any, device: str) -> Contestant:
    """A piece of work is `scan_steps` steps of the twin; then its last loss is read."""
    from scripts.benchmarks import twin

    place, about, wait, peak_bytes = of_torch(way, device)
    training = twin.Training(config, random_tokens(config), way, place)

    def run() -> int:
        for _ in range(config.train.scan_steps):
            loss = training.step()
        loss.item()
        return tokens_per_scan(config)

    wait()
    began = time.perf_counter()
    training.step()
    wait()
    if way.endswith("+compile"):  # in the first forward and backward pass
        about["compile_seconds"] = time.perf_counter() - began
    run()
    return Contestant(about, run, wait, peak_bytes)


def sample_torch(config: Config, batch_size: int, n_tokens: int, way: Any, device: str) -> Contestant:
    """A piece of work is one generation of the twin, without a KV cache, as in nanoGPT."""
    from scripts.benchmarks import twin

    place, about, wait, peak_bytes = of_torch(way, device)
    model = twin.Twin(config.model).to(place).eval()
    prompt = twin.torch.zeros((batch_size, 1), dtype=twin.torch.long, device=place)

    def run(n: int = n_tokens) -> int:
        ids = twin.sample(model, prompt, n, way=way, **DRAW)
        wait()
        return int(ids[:, 1:].numel())

    run(min(8, n_tokens))  # warms up: nothing compiles
    return Contestant(about, run, wait, peak_bytes)


def sample_transformers(config: Config, batch_size: int, n_tokens: int, way: Any, device: str) -> Contestant:
    """A piece of work is one `GPT2LMHeadModel.generate` with its KV cache; for bfloat16 the weights are cast."""
    import torch
    import transformers

    place, about, wait, peak_bytes = of_torch(way, device)
    m, prompt = config.model, torch.zeros((batch_size, 1), dtype=torch.long, device=place)
    sizes = {"vocab_size": m.vocab_size, "n_positions": m.block_size, "n_embd": m.n_embd}
    gpt2 = transformers.GPT2Config(**sizes, n_layer=m.n_layer, n_head=m.n_head, bos_token_id=None, eos_token_id=None)
    dtype = torch.bfloat16 if way.startswith("bfloat16") else torch.float32
    model = transformers.GPT2LMHeadModel(gpt2).to(device=place, dtype=dtype).eval()
    how = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens, "pad_token_id": 0, "do_sample": True} | DRAW

    def run() -> int:
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **how)
        wait()
        return int(ids[:, 1:].numel())

    run()
    return Contestant(about, run, wait, peak_bytes)


def build(task: str, config: Any, **settings: Any) -> Contestant:
    """A contestant; `task` is "train" or "sample" and one of the libraries above."""
    tasks: dict[str, Callable[..., Contestant]] = {
        "train jaxgpt": train_jaxgpt,
        "train torch": train_torch,
        "sample jaxgpt": sample_jaxgpt,
        "sample torch": sample_torch,
        "sample transformers": sample_transformers,
    }
    return tasks[task](from_tree(config), **settings)


if __name__ == "__main__":
    answer_rounds(lambda: build(**json.loads(sys.argv[1])))
