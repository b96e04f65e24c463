"""PyTorch's side of a contest: the twin, and transformers' GPT-2."""

import time
from typing import Any

import numpy as np

from jaxgpt.bench import twin
from jaxgpt.bench.twin import WAYS, torch
from jaxgpt.bench.worker import peak_resident_bytes
from jaxgpt.config import MissingExtraError, from_tree


class _OnTorch:
    def __init__(self, device: str) -> None:
        self.device = "cuda" if device == "gpu" else "cpu"
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        threads = torch.get_num_threads()
        self.about: dict[str, Any] = {"device": name, "torch": torch.__version__, "threads": threads}

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_resident_bytes()


class Training(_OnTorch):
    """`scan_steps` steps of the twin a piece, then a look at the last one's loss. Units are tokens."""

    def __init__(self, config: Any, way: str, device: str):
        super().__init__(device)
        self.config = from_tree(config)
        vocab_size = self.config.model.vocab_size
        tokens = np.random.default_rng(0).integers(vocab_size, size=1_000_000).astype(np.uint16)
        self.training = twin.Training(self.config, tokens, WAYS[way], self.device)
        self.wait()
        began = time.perf_counter()
        self.training.step()  # with torch.compile, the first forward and backward pass compile
        self.wait()
        self.about["first_seconds"] = time.perf_counter() - began
        self.about["compile_seconds"] = self.about["first_seconds"] if WAYS[way].compiled else 0.0
        self.run()

    def run(self) -> int:
        train = self.config.train
        for _ in range(train.scan_steps):
            loss = self.training.step()
        loss.item()
        return train.scan_steps * train.batch_size * self.config.model.block_size


class Sampling(_OnTorch):
    """One generation of the twin a piece, which has no cache, as nanoGPT has none. Units are tokens."""

    def __init__(
        self, config: Any, batch_size: int, n_tokens: int, temperature: float, top_k: int, way: str, device: str
    ):
        super().__init__(device)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if WAYS[way].tf32 else "highest")
        self.way, self.n_tokens, self.draw = WAYS[way], n_tokens, (temperature, top_k)
        self.twin = twin.Twin(from_tree(config).model).to(self.device).eval()
        self.prompt = torch.zeros((batch_size, 1), dtype=torch.long, device=self.device)
        began = time.perf_counter()
        twin.sample(self.twin, self.prompt, min(8, n_tokens), *self.draw, self.way)  # nothing here compiles
        self.wait()
        self.about["first_seconds"] = time.perf_counter() - began

    def run(self) -> int:
        ids = twin.sample(self.twin, self.prompt, self.n_tokens, *self.draw, self.way)
        self.wait()
        return ids.shape[0] * self.n_tokens


class Transformers(_OnTorch):
    """One `GPT2LMHeadModel.generate` a piece, with its cache of keys and values. Units are tokens."""

    def __init__(
        self, config: Any, batch_size: int, n_tokens: int, temperature: float, top_k: int, way: str, device: str
    ):
        try:
            import transformers
        except ImportError as error:
            raise MissingExtraError("comparing with GPT2LMHeadModel", "transformers", "torch") from error
        super().__init__(device)
        self.about["transformers"] = transformers.__version__
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if WAYS[way].tf32 else "highest")
        model, self.n_tokens = from_tree(config).model, n_tokens
        gpt2 = transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.block_size,
            n_embd=model.n_embd,
            n_layer=model.n_layer,
            n_head=model.n_head,
            bos_token_id=None,
            eos_token_id=None,
        )
        dtype = torch.bfloat16 if WAYS[way].bfloat16 else torch.float32
        self.model: Any = transformers.GPT2LMHeadModel(gpt2).to(device=self.device, dtype=dtype).eval()  # type: ignore[call-arg,unused-ignore]
        self.draw = {"do_sample": True, "temperature": temperature, "top_k": top_k, "use_cache": True}
        self.prompt = torch.zeros((batch_size, 1), dtype=torch.long, device=self.device)
        began = time.perf_counter()
        self.run()
        self.about["first_seconds"] = time.perf_counter() - began

    def run(self) -> int:
        ids = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            min_new_tokens=self.n_tokens,
            max_new_tokens=self.n_tokens,
            pad_token_id=0,
            **self.draw,
        )
        self.wait()
        return int(ids.shape[0] * (ids.shape[1] - 1))


class Product(_OnTorch):
    """A product of two (n, n) matrices a piece. Units are operations, 2 n³."""

    def __init__(self, n: int, dtype: str, device: str):
        super().__init__(device)
        self.x = torch.randn(n, n, device=self.device).to(getattr(torch, dtype))
        self.run()

    def run(self) -> int:
        torch.mm(self.x, self.x)
        self.wait()
        return 2 * self.x.shape[0] ** 3
