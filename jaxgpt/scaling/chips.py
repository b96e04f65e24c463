"""What chips can do, by their makers' pages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Published rates of one chip."""

    flops: float
    """Products of bfloat16 per second, dense."""
    memory: float
    """Bytes."""
    memory_rate: float
    """Bytes per second to and from it."""
    link_rate: float
    """Bytes per second that a chip sends to its neighbours, over all its links, one way."""
    source: str


TPUS = "https://cloud.google.com/tpu/docs/"
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 150e9, TPUS + "v4"),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 100e9, TPUS + "v5e"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 300e9, TPUS + "v5p"),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 224e9, TPUS + "v6e"),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, "https://www.nvidia.com/en-us/data-center/a100/"),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, "https://www.nvidia.com/en-us/data-center/h100/"),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, "https://www.nvidia.com/en-us/data-center/h200/"),
}
"""The link rates are half of the published ones, which count both ways. Those of GPUs hold inside one machine."""
