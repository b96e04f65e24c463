"""Checks JSON requests and makes a `Job` of each."""

from typing import Any

from starlette.exceptions import HTTPException

from jaxgpt.config import UsageError, shown
from jaxgpt.files import json_object
from jaxgpt.run import Run, RunError
from jaxgpt.sample import SamplingParams, bucket, checked
from jaxgpt.serve.batch import DEFAULT, Settings
from jaxgpt.serve.library import Library
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.writer import Job
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError, normalize_line_ends

MAX_BODY = 2**20
"""Bytes of a request, at most."""
MAX_MAPS = 2**28
"""Floats that `batch.look` may hold (1 GiB): the attention maps of all layers, and two more copies of one layer's."""


def defaults(limits: Limits) -> dict[str, Any]:
    """Optional fields of /api/write; the sampling settings and the seed are those of `jaxgpt sample`."""
    return DEFAULT._asdict() | {"seed": 1337, "tokens": min(200, limits.max_tokens)}


def to_write(body: bytes, library: Library, limits: Limits) -> Job:
    """The job of `{"run": ..., "prompt": text or ids, "tokens": ..., ...}`.

    Raises:
      HTTPException: the JSON is invalid, the run does not exist, or a value is out of range.
    """
    optional = defaults(limits)
    tree, run = _parse(body, {"run", "prompt", *optional}, library)
    prompt = tree.get("prompt", "")
    if isinstance(prompt, list):
        ids = _ids("prompt", prompt, run, limits.max_prompt)
    else:
        ids = _encoded(prompt, run.tokenizer, limits.max_prompt)
    ranges = {"tokens": (1, limits.max_tokens), "seed": (0, 2**32 - 1)}
    ranges |= {"temperature": (0, 1000), "top_k": (0, 2**31 - 1), "top_p": (0, 1), "min_p": (0, 1)}
    given = dict[str, Any]()
    for name, (low, high) in ranges.items():
        value, kind = tree.get(name, optional[name]), type(optional[name])
        if type(value) not in (int, kind) or not low <= value <= high:  # an int is accepted as a float
            number = "whole number" if kind is int else "number"
            raise HTTPException(400, f"{name} is {shown(value)}, expected a {number} from {low} to {high}")
        given[name] = kind(value)
    settings = Settings(*(given[name] for name in Settings._fields))
    try:
        checked(SamplingParams(*settings))
    except UsageError as error:
        raise HTTPException(400, str(error)) from error
    return Job(run, ids, given["tokens"], settings, given["seed"])


def to_look(body: bytes, library: Library) -> Job:
    """The job of `{"run": ..., "ids": [...]}`: a look at the last id. Raises as `to_write`."""
    tree, run = _parse(body, {"run", "ids"}, library)
    model = run.config.model
    ids = _ids("ids", tree.get("ids"), run, model.block_size)
    maps = (model.n_layer + 2) * model.n_head * bucket(len(ids), model.block_size) ** 2
    if model.kind == "gpt" and maps > MAX_MAPS:
        raise HTTPException(400, f"the attention maps of {len(ids)} tokens are too large: choose an earlier token")
    return Job(run, ids)


def _parse(body: bytes, known: set[str], library: Library) -> tuple[dict[str, Any], Run]:
    """The JSON object of a request, with fields among `known`, and its run."""
    try:
        tree = json_object(body, "the request")
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    if unknown := sorted(tree.keys() - known):
        raise HTTPException(400, f"no such field: {shown(unknown[0])}; expected {', '.join(sorted(known))}")
    if not isinstance(name := tree.get("run"), str):
        raise HTTPException(400, f"run is {shown(name)}, expected the name of a run")
    try:
        return tree, library.run(name)
    except RunError as error:
        raise HTTPException(404, str(error)) from error
    except UsageError as error:
        raise HTTPException(503, f"run {shown(name)} cannot be read: {error}") from error


def _encoded(prompt: Any, tokenizer: Tokenizer, most: int) -> list[int]:
    prompt = normalize_line_ends(tokenizer, prompt) if isinstance(prompt, str) else prompt
    if not isinstance(prompt, str) or not prompt:
        raise HTTPException(400, f"prompt is {shown(prompt)}, expected text or ids of at least one token")
    if len(prompt) > most:
        raise HTTPException(413, f"the prompt has {len(prompt)} characters, expected at most {most}")
    try:
        ids: list[int] = tokenizer.encode(prompt).tolist()
    except UnknownCharacterError as error:
        where = f"character {error.character!r} at position {error.position} of the prompt"
        raise HTTPException(400, f"{where} is not in the vocabulary") from error
    except (UsageError, ValueError) as error:
        raise HTTPException(400, f"the prompt cannot be encoded: {error}") from error
    return ids


def _ids(name: str, given: Any, run: Run, most: int) -> list[int]:
    V = run.tokenizer.vocab_size
    if not isinstance(given, list) or not given:
        raise HTTPException(400, f"{name} is {shown(given)}, expected a list of at least one id")
    if len(given) > most:
        raise HTTPException(413, f"{name} has {len(given)} ids, expected at most {most}")
    for each in given:
        if type(each) is not int or not 0 <= each < V:
            raise HTTPException(400, f"{name} holds {shown(each)}, expected whole numbers from 0 to {V - 1}")
    return given
