"""What chips can do, by their makers' pages."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Published rates of one chip."""

    flops: float
    """Products of bfloat16 per second, dense."""
    float32: float
    """Those of float32 as JAX does them by default: of TF32, dense, on GPUs, and of bfloat16 on TPUs."""
    memory: float
    """Bytes."""
    memory_rate: float
    """Bytes per second to and from it."""
    link_rate: float
    """Bytes per second that a chip sends to its neighbours, over all its links, one way."""
    torus: int
    """Dimensions of the torus of its links; 0 where a switch links all."""
    pod: int
    """Chips that are linked so: of a slice, or in one machine."""
    network_rate: float
    """Bytes per second that it sends beyond, its share of the host's network: 0 if not known."""
    source: str

    def rate(self, precision: str) -> float:
        """Products per second of operands of a resolved precision."""
        return self.float32 if precision == "float32" else self.flops

    def sending_rate(self, n: int, chips: int) -> float:
        """Bytes per second, one way, of a collective of n chips out of so many: neighbours along one dimension of the
        torus use its links alone, more chips those of more dimensions. All its sides are taken as equal."""
        if not self.torus or n <= 1:
            return self.link_rate
        side = chips ** (1 / self.torus)
        used = next(i for i in range(1, self.torus + 1) if i == self.torus or n <= side**i * 1.01)
        return self.link_rate * used / self.torus

    def slices(self, chips: int) -> int:
        """How many pods it takes."""
        return math.ceil(chips / self.pod)


TPUS = "https://docs.cloud.google.com/tpu/docs/"
DGX = "https://www.nvidia.com/en-us/data-center/"
CHIPS = {
    "v4": Chip(275e12, 275e12, 32 * 2**30, 1200e9, 268e9, 3, 4096, 0, TPUS + "v4"),
    "v5e": Chip(197e12, 197e12, 16 * 2**30, 819e9, 200e9, 2, 256, 25e9 / 8, TPUS + "v5e"),
    "v5p": Chip(459e12, 459e12, 95 * 2**30, 2765e9, 600e9, 3, 8960, 50e9 / 8, TPUS + "v5p"),
    "v6e": Chip(918e12, 918e12, 32 * 2**30, 1638e9, 400e9, 2, 256, 0, TPUS + "v6e"),
    "a100": Chip(312e12, 156e12, 80e9, 2039e9, 300e9, 0, 8, 25e9, DGX + "a100/"),
    "h100": Chip(989e12, 494.7e12, 80e9, 3350e9, 450e9, 0, 8, 50e9, DGX + "h100/"),
    "h100-pcie": Chip(756e12, 378e12, 80e9, 2000e9, 300e9, 0, 2, 0, DGX + "h100/"),
    "h100-nvl": Chip(835e12, 417.5e12, 94e9, 3900e9, 300e9, 0, 2, 0, DGX + "h100/"),
    "h200": Chip(989e12, 494.7e12, 141e9, 4800e9, 450e9, 0, 8, 50e9, DGX + "h200/"),
}
"""Link rates are half of the published ones, which count both ways; that of v4 is its pod's rate of all-reduce by its
chips. The network of v5e is its pod's by its chips; of GPUs, one adapter each, as in a DGX."""


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX or PyTorch calls so, None where its rates are not known here.

    >>> of_kind("NVIDIA H100 80GB HBM3") is CHIPS["h100"], of_kind("NVIDIA H100 PCIe") is CHIPS["h100-pcie"]
    (True, True)
    >>> of_kind("TPU v5 lite") is CHIPS["v5e"], of_kind("TPU v5") is CHIPS["v5p"], of_kind("cpu")
    (True, True, None)
    """
    said = device_kind.lower().replace(" lite", "e").replace("-", " ").split()
    said = [{"v5": "v5p"}.get(word, word) for word in said]
    found = [name for name in CHIPS if set(name.split("-")) <= set(said)]
    return CHIPS[max(found, key=len)] if found else None
