"""A whole text in memory, as `prepare` reads it."""

import hashlib
from collections import Counter
from typing import NamedTuple

from jaxgpt.prepare.sources import open_text


class Read(NamedTuple):
    name: str
    text: str
    origin: str
    notes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read(corpus: str, column: str = "text") -> Read:
    text, changes = open_text(corpus, column), Counter[str]()
    pieces = "".join(piece for _, piece in text.numbered("", changes))
    return Read(text.name, pieces, text.origin, tuple(text.notes(changes)))
