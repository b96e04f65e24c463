"""The parameters of a model, module by module."""

import math
import re
from typing import Any, NamedTuple

import jax

from jaxgpt import model as nn
from jaxgpt import prng
from jaxgpt.config import ModelConfig


class Row(NamedTuple):
    """An array of parameters, or one in each block."""

    module: str  # its path; h_* is every block
    shape: tuple[int, ...]
    times: int  # in how many blocks
    size: int  # numbers in all of these together


def rows(config: ModelConfig) -> list[Row]:
    """Every parameter of `nn.init_params`; equal ones of all blocks in one row."""
    params = jax.eval_shape(lambda key: nn.init_params(config, key), prng.key(0))
    arrays: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape, times in _arrays(params, config):
        arrays[name, shape] = arrays.get((name, shape), 0) + times
    return [Row(name, shape, times, times * math.prod(shape)) for (name, shape), times in arrays.items()]


def _arrays(params: Any, config: ModelConfig) -> list[tuple[str, tuple[int, ...], int]]:
    """(path with h_* for a block, shape in one block, blocks that an array holds) of each leaf."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(step.key for step in path)
        stacked = config.scan_layers and name.startswith("h/")
        name = re.sub(r"^h(_\d+)?/", "h_*/", name)
        found.append((name, leaf.shape[1:] if stacked else leaf.shape, leaf.shape[0] if stacked else 1))
    return found
