"""Token embeddings: their two principal components, and nearest neighbours."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import ModelConfig
from jaxgpt.model import Params

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Projection:
    """Points in the plane of the two principal components."""

    points: Floats  # (N, 2)
    shares: tuple[float, float]
    """Share of the variance along each axis."""


def table(config: ModelConfig, params: Params) -> Floats:
    """The embedding of each token, (V, C); for a bigram its table of logits, (V, V)."""
    rows = params["token_embedding_table" if config.kind == "bigram" else "wte"]["embedding"]
    return np.asarray(rows, np.float64)


def project(rows: Floats) -> Projection:
    """The two principal components of `rows` (N, C)."""
    centred = rows - rows.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    total = max(float(variances.sum()), np.finfo(float).tiny)
    first, second = axes[:, -1], axes[:, -2] if axes.shape[1] > 1 else np.zeros(1)
    points = centred @ np.stack([first, second], axis=1)
    points *= np.where(
        points[np.abs(points).argmax(axis=0), [0, 1]] < 0, -1, 1
    )  # the sign of an axis is arbitrary: fix it
    return Projection(points, (float(variances[-1] / total), float(sum(variances[-2:-1]) / total)))


def neighbours(rows: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """The k nearest other rows of each of `rows` (N, C) by cosine, the nearest first: indices and cosines, (N, k)."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(k, len(rows) - 1)]
    return nearest, np.take_along_axis(cosines, nearest, axis=1)
