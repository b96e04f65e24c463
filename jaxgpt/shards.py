"""Tokens in several arrays as if they were one: a corpus of many files, or the parts of a mixture."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from jaxgpt.tokenizer import Ids


class Joined:
    """Arrays of ids (n_0,), (n_1,), ... as one (N,), N their sum, without a copy: they may be memory maps.

    It is indexed by slices of step 1, which give another `Joined`, and by arrays of places, which give an array of the
    ids that stand there. `numpy.asarray` reads all of it.
    """

    def __init__(self, pieces: Sequence[Ids]):
        self.pieces = tuple(pieces)
        self.ends = np.cumsum([len(piece) for piece in self.pieces])
        self.dtype = self.pieces[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            begin, end, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of step 1 is expected, found {at}")
            firsts = self.ends - [len(piece) for piece in self.pieces]
            cut = [
                piece[max(0, begin - first) : max(0, end - first)]
                for piece, first in zip(self.pieces, firsts, strict=True)
            ]
            return joined([piece for piece in cut if len(piece)] or cut[:1])
        places = np.asarray(at)
        if places.size and not (places.min() >= 0 and places.max() < len(self)):
            raise IndexError(f"places from {places.min()} to {places.max()} of {len(self)} tokens")
        flat = places.reshape(-1)
        found, of = np.empty(flat.shape, self.dtype), np.searchsorted(self.ends, flat, side="right")
        # Sorted by piece once: to look for the places of each among all would cost their product.
        order = np.argsort(of, kind="stable")
        bounds = np.searchsorted(of[order], np.arange(len(self.pieces) + 1))
        for i in np.flatnonzero(np.diff(bounds)):
            here = order[bounds[i] : bounds[i + 1]]
            found[here] = self.pieces[i][flat[here] - (self.ends[i] - len(self.pieces[i]))]
        return found.reshape(places.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.concatenate(self.pieces).astype(dtype or self.dtype, copy=False)


def joined(pieces: Sequence[Ids]) -> Ids:
    """The pieces as one array, to be read like any other; a single one is itself."""
    return pieces[0] if len(pieces) == 1 else cast(Ids, Joined(pieces))


def pieces_of(tokens: Ids) -> Sequence[Ids]:
    """The arrays that `joined` made one of, to be gone through without reading all at once."""
    return tokens.pieces if isinstance(tokens, Joined) else [tokens]
