"""The contestants of `rates`, each in its own process: `python -m scripts.benchmarks.contestants SPEC`.

So the thread pools of PyTorch and of XLA never share a process. jaxgpt's side calls the functions of `jaxgpt train` and
`jaxgpt sample`; PyTorch's is the twin and transformers' GPT-2. Units of work are tokens.
"""

import json
import sys
import time
from typing import Any

import numpy as np

from jaxgpt.config import from_tree
from scripts.benchmarks.contest import Contestant, JaxContestant, answer_rounds, peak_resident_bytes


def build(task: str, config: Any, **settings: Any) -> Contestant:
    """A contestant; only its own libraries are imported."""
    make = {"train jaxgpt": jaxgpt_training, "sample jaxgpt": jaxgpt_sampling}
    make |= {"train torch": twin_training, "sample torch": twin_sampling}
    make |= {"sample transformers": transformers_sampling}
    return make[task](from_tree(config), **settings)


def random_tokens(vocab_size: int) -> Any:
    return np.random.default_rng(0).integers(vocab_size, size=1_000_000).astype(np.uint16)


def jaxgpt_training(config: Any) -> Contestant:
    """A piece of work is `scan_steps` steps, with batches loaded and metrics read as in `fit`."""
    import jax

    from jaxgpt.data import loader
    from jaxgpt.sharding import one_device
    from jaxgpt.step import jit_train_steps, sharded_init

    K = config.train.scan_steps

    class Training(JaxContestant):
        def __init__(self) -> None:
            super().__init__()
            mesh = one_device()
            self.load, self.step, self.unread = loader(config, random_tokens(config.model.vocab_size), mesh), 0, None
            self.train_steps = jit_train_steps(config, mesh)
            began = time.perf_counter()
            self.state = jax.block_until_ready(sharded_init(config, mesh))
            self.about["init_seconds"] = time.perf_counter() - began
            began = time.perf_counter()
            self.train_steps.lower(self.state, *self.load(0, K)).compile()
            self.about["compile_seconds"] = time.perf_counter() - began
            self.run()
            self.wait()

        def run(self) -> int:
            self.state, metrics = self.train_steps(self.state, *self.load(self.step, self.step + K))
            if self.unread:
                jax.device_get(self.unread)
            self.unread, self.step = metrics, self.step + K
            return K * config.train.batch_size * config.model.block_size

        def wait(self) -> None:
            jax.block_until_ready(self.state)

    return Training()


def jaxgpt_sampling(config: Any, batch_size: int, n_tokens: int, temperature: float, top_k: int) -> Contestant:
    """A piece of work is one `generate` of `n_tokens` for each of `batch_size` sequences."""
    import jax

    from jaxgpt import model
    from jaxgpt.sample import SamplingParams, generate

    class Sampling(JaxContestant):
        def __init__(self) -> None:
            super().__init__()
            self.params = jax.jit(model.init_params, static_argnums=0)(config.model, jax.random.key(0))
            self.prompt, self.key = np.zeros((batch_size, 1), np.int32), jax.random.key(1)
            jax.block_until_ready(self.params)
            began = time.perf_counter()
            self.run()
            self.about["first_seconds"] = time.perf_counter() - began

        def run(self) -> int:
            draw = SamplingParams(temperature, top_k)
            return np.asarray(generate(config.model, self.params, self.prompt, n_tokens, self.key, draw)).size

    return Sampling()


class TorchContestant:
    def __init__(self, device: str, way: Any) -> None:
        from scripts.benchmarks.twin import torch

        self.torch, self.device = torch, "cuda" if device == "gpu" else "cpu"
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        self.about: dict[str, Any] = {"device": name, "threads": torch.get_num_threads()}
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if way.tf32 else "highest")

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_resident_bytes()

    def first(self, run: Any) -> float:
        """Seconds that `run()` takes."""
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began


def twin_training(config: Any, way: str, device: str) -> Contestant:
    """A piece of work is `scan_steps` steps of the twin; then its last loss is read."""
    from scripts.benchmarks import twin

    train = config.train

    class Training(TorchContestant):
        def __init__(self) -> None:
            super().__init__(device, twin.WAYS[way])
            tokens = random_tokens(config.model.vocab_size)
            self.training = twin.Training(config, tokens, twin.WAYS[way], self.device)
            first = self.first(self.training.step)  # with torch.compile, the first forward and backward pass compile
            self.about["compile_seconds"] = first if twin.WAYS[way].compiled else 0.0
            self.run()

        def run(self) -> int:
            for _ in range(train.scan_steps):
                loss = self.training.step()
            loss.item()
            return train.scan_steps * train.batch_size * config.model.block_size

    return Training()


def twin_sampling(
    config: Any, batch_size: int, n_tokens: int, temperature: float, top_k: int, way: str, device: str
) -> Contestant:
    """A piece of work is one generation of the twin, without a KV cache, as in nanoGPT."""
    from scripts.benchmarks import twin

    class Sampling(TorchContestant):
        def __init__(self) -> None:
            super().__init__(device, twin.WAYS[way])
            self.twin = twin.Twin(config.model).to(self.device).eval()
            self.prompt = self.torch.zeros((batch_size, 1), dtype=self.torch.long, device=self.device)
            self.about["first_seconds"] = self.first(lambda: self.sample(min(8, n_tokens)))  # nothing here compiles

        def sample(self, n: int) -> Any:
            return twin.sample(self.twin, self.prompt, n, temperature, top_k, twin.WAYS[way])

        def run(self) -> int:
            self.sample(n_tokens)
            self.wait()
            return batch_size * n_tokens

    return Sampling()


def transformers_sampling(
    config: Any, batch_size: int, n_tokens: int, temperature: float, top_k: int, way: str, device: str
) -> Contestant:
    """A piece of work is one `GPT2LMHeadModel.generate` with its KV cache; for bfloat16 the weights are cast."""
    import transformers

    from scripts.benchmarks import twin

    m = config.model
    sizes = {"vocab_size": m.vocab_size, "n_positions": m.block_size, "n_embd": m.n_embd}
    gpt2 = transformers.GPT2Config(**sizes, n_layer=m.n_layer, n_head=m.n_head, bos_token_id=None, eos_token_id=None)

    class Sampling(TorchContestant):
        def __init__(self) -> None:
            super().__init__(device, twin.WAYS[way])
            dtype = self.torch.bfloat16 if twin.WAYS[way].bfloat16 else self.torch.float32
            self.gpt2 = transformers.GPT2LMHeadModel(gpt2).to(device=self.device, dtype=dtype).eval()
            self.prompt = self.torch.zeros((batch_size, 1), dtype=self.torch.long, device=self.device)
            self.about["first_seconds"] = self.first(self.run)

        def run(self) -> int:
            lengths = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens, "pad_token_id": 0}
            draw = {"do_sample": True, "temperature": temperature, "top_k": top_k, "use_cache": True}
            mask = self.torch.ones_like(self.prompt)
            ids = self.gpt2.generate(self.prompt, attention_mask=mask, **lengths, **draw)
            self.wait()
            return int(ids.shape[0] * (ids.shape[1] - 1))

    return Sampling()


if __name__ == "__main__":
    answer_rounds(lambda: build(**json.loads(sys.argv[1])))
