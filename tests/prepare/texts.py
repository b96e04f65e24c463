"""A whole text in memory, as `prepare` reads it."""

import hashlib
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
    text, notes = open_text(corpus, column), list[str]()
    return Read(text.name, "".join(text.pieces(notes=notes)), text.origin, tuple(notes))
