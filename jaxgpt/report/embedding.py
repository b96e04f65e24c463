"""The table of token embeddings as a person can look at it: who is near whom, and a plane through them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import ModelConfig
from jaxgpt.model import Params

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Projection:
    """Points in the plane in which they differ most."""

    points: Floats  # (N, 2)
    shares: tuple[float, float]
    """Of all variance, along the first and along the second axis."""


def table(config: ModelConfig, params: Params) -> Floats:
    """The embedding of each token, (V, C); for a bigram, whose table of logits it is, (V, V)."""
    rows = params["token_embedding_table" if config.kind == "bigram" else "wte"]["embedding"]
    return np.asarray(rows, np.float64)


def project(rows: Floats) -> Projection:
    """The two principal components of `rows` (N, C)."""
    centred = rows - rows.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    total = max(float(variances.sum()), np.finfo(float).tiny)
    first, second = axes[:, -1], axes[:, -2] if axes.shape[1] > 1 else np.zeros(1)
    points = centred @ np.stack([first, second], axis=1)
    points *= np.where(points[np.abs(points).argmax(axis=0), [0, 1]] < 0, -1, 1)  # a sign of its own has no axis
    return Projection(points, (float(variances[-1] / total), float(sum(variances[-2:-1]) / total)))


def neighbours(rows: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """The k nearest other rows of each of `rows` (N, C) by cosine, the nearest first: places and cosines, (N, k)."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(k, len(rows) - 1)]
    return nearest, np.take_along_axis(cosines, nearest, axis=1)
