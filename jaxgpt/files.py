"""Atomic writes, and JSON sealed with its SHA-256. Imports no jax."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from jaxgpt.config import shown


class SealError(ValueError):
    """A sealed file was changed, or was never sealed."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, then rename it: after a kill or a power loss, `path` is the old file or the
    new one, complete."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # not the partial file, or, on a full disk, none
        del error.filename2  # None would be printed
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(tree: dict[str, Any]) -> str:
    """`tree` as indented JSON, with the SHA-256 of the rest as its last value."""
    digest = hashlib.sha256((json.dumps(tree, indent=2) + "\n").encode()).hexdigest()
    return json.dumps({**tree, "seal": digest}, indent=2) + "\n"


def unseal(data: bytes) -> dict[str, Any]:
    """The inverse of `seal`, of a tree that is not empty; a SealError if a byte was changed, or there is no seal."""
    body, mark, digest = data.rpartition(b',\n  "seal": "')
    whole = body + b"\n}\n"
    if not mark:
        raise SealError("it has no seal: it was cut off, or jaxgpt did not write it")
    if digest != hashlib.sha256(whole).hexdigest().encode() + b'"\n}\n':
        raise SealError("it does not match its seal: it was damaged, or edited by hand")
    try:
        return json_object(whole, "it")
    except ValueError as error:  # someone computed the seal of something else
        raise SealError(str(error)) from error


def json_object(data: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`, called `name` in the ValueError that is raised for anything else."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{name} is {shown(tree)}, expected an object")
    return tree


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
