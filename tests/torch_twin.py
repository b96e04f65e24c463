"""The same GPT in PyTorch, written for these tests: what `jaxgpt.nn` is compared with on random configurations."""

import torch
import torch.nn.functional as F
from torch import nn

from jaxgpt.config import ModelConfig


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, self.H = config.n_embd, config.n_head
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.ln_1 = nn.LayerNorm(C, bias=config.bias)
        self.ln_2 = nn.LayerNorm(C, bias=config.bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(C, 3 * C, bias=config.bias), "c_proj": nn.Linear(C, C, bias=config.bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(C, 4 * C, bias=config.bias), "c_proj": nn.Linear(4 * C, C, bias=config.bias)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.H, C // self.H).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](out.transpose(1, 2).reshape(B, T, C))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.approximate)
        return x + self.mlp["c_proj"](hidden)


class Twin(nn.Module):
    """A GPT of `config`, without dropout; its parameters have GPT-2's names, its linear layers are (out, in)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = None if config.tie_weights else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        return F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)
