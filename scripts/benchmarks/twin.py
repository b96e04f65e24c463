"""The twin: the same GPT in PyTorch, as nanoGPT trains and samples it, to compare jaxgpt with.

Model, initialization, parameter groups, schedule, batches and sampling are those of nanoGPT's model.py, train.py and
sample.py, with fused AdamW. As a program, it trains as nanoGPT does, but evaluates only at the end:

    python -m scripts.benchmarks.twin --data TEXT --out FILE --steps 2000 --seed 1337
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from jaxgpt.config import Config, ModelConfig, UsageError, replaced
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.recipes import recipe as recipe_of
from jaxgpt.tokenizer import Ids
from scripts.benchmarks.shapes import Way

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise UsageError("the PyTorch twin needs torch, which is not installed: pip install --group bench") from error


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, self.H, self.p = config.n_embd, config.n_head, config.dropout
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.ln_1 = nn.LayerNorm(C, bias=config.bias)
        self.ln_2 = nn.LayerNorm(C, bias=config.bias)
        linear = partial(nn.Linear, bias=config.bias)
        self.attn = nn.ModuleDict({"c_attn": linear(C, 3 * C), "c_proj": linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": linear(C, 4 * C), "c_proj": linear(4 * C, C)})
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.H, C // self.H).transpose(1, 2) for part in qkv)
        p = self.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.drop(self.attn["c_proj"](out.transpose(1, 2).reshape(B, T, C)))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.approximate)
        return x + self.drop(self.mlp["c_proj"](hidden))


class Twin(nn.Module):
    """A GPT of `config`; its parameters have GPT-2's names, its linear layers are (out, in)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = None if config.tie_weights else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():  # nanoGPT's: biases zero, norms one, the rest normal
            residual = name.endswith("c_proj.weight")
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: torch.Tensor, last: bool = False) -> torch.Tensor:
        """(B, T) ids -> (B, T, V) logits, or with `last` those of the last position alone, (B, 1, V)."""
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device)))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x[:, -1:] if last else x)
        return F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)


def gpt2_tensors(
    twin: Twin, what: Callable[[nn.Parameter], torch.Tensor] = lambda p: p.detach()
) -> dict[str, NDArray[np.float32]]:
    """Copies of the twin's parameters (or `what` of each), by GPT-2's names and with linear layers as (in, out).

    `huggingface.gpt2.to_params` converts them to ours.
    """
    tensors = {name: what(p).cpu().numpy() for name, p in twin.named_parameters()}
    return {name: np.array(x.T if x.ndim == 2 and ".c_" in name else x, order="C") for name, x in tensors.items()}


def learning_rate(config: Config, step: int) -> float:
    """nanoGPT's get_lr: linear warm-up, cosine to final_learning_rate, constant after that."""
    opt = config.optimizer
    end = opt.decay_steps or config.train.steps
    if step < opt.warmup_steps:
        return opt.learning_rate * (step + 1) / (opt.warmup_steps + 1)
    if step > end:
        return opt.final_learning_rate
    share = (step - opt.warmup_steps) / (end - opt.warmup_steps)
    wave = 0.5 * (1.0 + math.cos(math.pi * share))
    return opt.final_learning_rate + wave * (opt.learning_rate - opt.final_learning_rate)


class Training:
    """nanoGPT's training loop, a step at a time, on `tokens` (N,) in memory."""

    def __init__(self, config: Config, tokens: Ids, way: Way = "float32", device: str = "cpu"):
        torch.manual_seed(config.train.seed)
        set_matmul_precision(way)
        self.config, self.tokens, self.device, self.steps = config, tokens, device, 0
        self.twin = Twin(config.model).to(device)
        self.forward = torch.compile(self.twin) if way.endswith("+compile") else self.twin
        self.autocast = autocast(way, device)
        opt, parameters = config.optimizer, list(self.twin.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": opt.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (opt.beta1, opt.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=opt.learning_rate, betas=betas, eps=opt.eps, fused=True)
        self.batch = self.next_batch()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows with replacement, inputs and targets (B, T), on the device or being copied to it."""
        T, B = self.config.model.block_size, self.config.train.batch_size
        starts = torch.randint(len(self.tokens) - T, (B,)).tolist()
        windows = torch.stack([torch.from_numpy(self.tokens[i : i + T + 1].astype(np.int64)) for i in starts])
        x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if self.device == "cpu":
            return x, y
        return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)

    def step(self) -> torch.Tensor:
        """One step: forward, backward, clipping, AdamW. Returns its loss without waiting for the device."""
        opt = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps)
        inputs, targets = self.batch
        A, total = self.config.train.accumulate, torch.zeros((), device=self.device)
        for x, y in zip(inputs.chunk(A), targets.chunk(A), strict=True):
            with self.autocast:
                logits = self.forward(x)
                loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)) / A
            loss.backward()
            total += loss.detach()
        self.batch = self.next_batch()  # while the device computes
        if opt.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.twin.parameters(), opt.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return total


def set_matmul_precision(way: Way) -> None:
    """TF32 but in the float32 ways, as nanoGPT sets it on CUDA."""
    torch.set_float32_matmul_precision("highest" if way.startswith("float32") else "high")


def autocast(way: Way, device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, dtype=torch.bfloat16) if way.startswith("bfloat16") else nullcontext()


@torch.inference_mode()
def sample(
    twin: Twin, idx: torch.Tensor, n_tokens: int, temperature: float = 0.8, top_k: int = 40, way: Way = "float32"
) -> torch.Tensor:
    """nanoGPT's `generate`, which runs the whole window for each token: (B, P) ids -> (B, P + n_tokens)."""
    for _ in range(n_tokens):
        with autocast(way, idx.device.type):
            logits = twin(idx[:, -twin.block_size :], last=True)[:, -1] / temperature
        kept, _ = torch.topk(logits, min(top_k, logits.size(-1)))
        logits[logits < kept[:, [-1]]] = -math.inf
        idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)), dim=1)
    return idx


def main(
    data: str,
    out: Path,
    recipe: str = "shakespeare-cpu",
    steps: int = 0,
    seed: int = 1337,
    way: Way = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    began: float = 0.0,
) -> None:
    """Train from a text to weights on disk, record the time, then let jaxgpt score them on the whole validation split.

    Args:
      data: the text: a file, or a named corpus
      out: JSON; the weights go beside it, as .safetensors
      recipe: its settings are nanoGPT's
      steps: of the optimizer; 0 for the recipe's
      began: time.monotonic() before this process was started; 0 for now
    """
    began = began or time.monotonic()
    config = recipe_of(recipe).config
    text = prepare_corpus(data, data_dir=out.parent / "data").corpus
    train_tokens, val_tokens = text.split(config.data)
    config = replaced(config, vocab_size=text.tokenizer.vocab_size, steps=steps or config.train.steps, seed=seed)
    training = Training(config, train_tokens, way, device)
    for step in range(config.train.steps):
        loss = training.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", file=sys.stderr)

    from safetensors.numpy import save_file

    weights = gpt2_tensors(training.twin)
    save_file(weights, out.with_suffix(".safetensors"))
    seconds = time.monotonic() - began

    import jax

    from jaxgpt.evaluation import evaluate
    from jaxgpt.huggingface.gpt2 import to_params

    jax.config.update("jax_platforms", "cpu")  # not beside PyTorch's CUDA libraries
    model = replaced(config, precision="float32").model
    loss = evaluate(model, to_params(model, weights), val_tokens, text.tokenizer).loss
    out.write_text(json.dumps({"seed": seed, "seconds": seconds, "loss": loss}) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
