"""Published rates of accelerators, and model FLOPs utilization."""

import math
from dataclasses import dataclass

from jaxgpt.config import Config, ModelConfig
from jaxgpt.kernels import BLOCKED, queries_per_block
from jaxgpt.monitor import cost


@dataclass(frozen=True)
class Chip:
    """Published rates of one chip, per second."""

    flops: float  # bfloat16 FLOPs of dense matmuls
    float32: float  # FLOPs of float32 matmuls as JAX computes them by default: in TF32 on GPUs, in bfloat16 on TPUs
    memory: float  # bytes
    memory_rate: float  # bytes between the chip and its memory
    link_rate: float  # bytes to its neighbours, over all its links, one way
    torus: int  # dimensions of the torus of its links; 0: a switch connects all chips
    pod: int  # chips that these links connect: a TPU pod, or one GPU machine
    network_rate: float  # bytes to other pods, its share of the host's network; 0 if unknown

    @property
    def allocated(self) -> int:
        """Bytes that JAX allocates by default: three quarters of a GPU's memory, all of a TPU's."""
        return int(self.memory if self.torus else self.memory * 0.75)

    def rate(self, precision: str) -> float:
        """FLOP/s of matmuls in `precision`, a resolved compute dtype."""
        return self.float32 if precision == "float32" else self.flops

    def sending_rate(self, n: int, chips: int) -> float:
        """Bytes per second, one way, of a collective over `n` of `chips`. It uses the links of as few dimensions of the
        torus as hold `n` chips, where all sides have the same length."""
        if not self.torus or n <= 1:
            return self.link_rate
        side = chips ** (1 / self.torus)
        used = next(i for i in range(1, self.torus + 1) if i == self.torus or n <= side**i * 1.01)
        return self.link_rate * used / self.torus

    def slices(self, chips: int) -> int:
        """Pods that `chips` fill."""
        return math.ceil(chips / self.pod)


CHIPS = {
    "v4": Chip(275e12, 275e12, 32 * 2**30, 1200e9, 268e9, 3, 4096, 0),
    "v5e": Chip(197e12, 197e12, 16 * 2**30, 819e9, 200e9, 2, 256, 25e9 / 8),
    "v5p": Chip(459e12, 459e12, 95 * 2**30, 2765e9, 600e9, 3, 8960, 50e9 / 8),
    "v6e": Chip(918e12, 918e12, 32 * 2**30, 1638e9, 400e9, 2, 256, 100e9 / 8),
    "a100": Chip(312e12, 156e12, 80e9, 2039e9, 300e9, 0, 8, 25e9),
    "h100": Chip(989e12, 494.7e12, 80e9, 3350e9, 450e9, 0, 8, 50e9),
    "h100-pcie": Chip(756e12, 378e12, 80e9, 2000e9, 300e9, 0, 2, 0),
    "h100-nvl": Chip(835e12, 417.5e12, 94e9, 3900e9, 300e9, 0, 2, 0),
    "h200": Chip(989e12, 494.7e12, 141e9, 4800e9, 450e9, 0, 8, 50e9),
    "h200-nvl": Chip(835.5e12, 417.5e12, 141e9, 4800e9, 450e9, 0, 4, 0),
    "b200": Chip(2250e12, 1100e12, 180e9, 8000e9, 900e9, 0, 8, 50e9),
}
"""Sources: docs.cloud.google.com/tpu/docs/v4 and so on; www.nvidia.com/en-us/data-center/a100, h100, h200 and dgx-b200.
Link rates are half of the published ones, which count both directions; v4 has the pod's all-reduce rate per chip.
The network rates of v5e and v6e are the pod's divided by its chips; GPUs have one adapter each, as in a DGX."""


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX or PyTorch calls `device_kind`; None if its rates are unknown.

    >>> of_kind("NVIDIA H100 80GB HBM3") is CHIPS["h100"], of_kind("NVIDIA H100 PCIe") is CHIPS["h100-pcie"]
    (True, True)
    >>> of_kind("TPU v5 lite") is CHIPS["v5e"], of_kind("TPU v5") is CHIPS["v5p"], of_kind("cpu")
    (True, True, None)
    """
    kind = device_kind.lower().replace(" lite", "e").replace("-", " ")
    words = {"v5p" if word == "v5" else word for word in kind.split()}
    found = [name for name in CHIPS if set(name.split("-")) <= words]
    return CHIPS[max(found, key=len)] if found else None


def utilization(config: Config, device_kind: str, n_devices: int, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization: the share of the devices' bfloat16 FLOP/s that training uses, at 3 * `flops_per_token`
    per token; None if their rate is unknown."""
    chip = of_kind(device_kind)
    return 3 * flops_per_token(config.model) * tokens_per_second / (chip.flops * n_devices) if chip else None


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs of the matmuls of a forward pass, per token of a full context of T: L (24 C² + 4 T C) + 2 V C for GPT-2.

    (M, K) @ (K, N) takes 2 M K N: 24 C² for the kernels of a block, 4 T C for its attention scores and weighted values
    (with the masked half, which some kernels skip; for a window see `attended`), 2 V C for the head. Training takes
    three times as many, because the backward pass has two matmuls for each. Nothing else is counted, so a bigram, an
    embedding lookup, has 0.
    """
    C = config.n_embd
    if config.kind == "bigram":
        return 0
    block = 2 * sum(k * n for k, n in cost.kernels(config).values()) + 4 * attended(config) * C
    return config.n_layer * block + 2 * config.vocab_size * C


def attended(config: ModelConfig) -> int:
    """Keys of each query, whether masked or not: T, or with a window those of its block in `kernels.blocked`."""
    T = config.block_size
    return min(T, queries_per_block(T) + config.window - 1) if config.window and T >= BLOCKED else T
