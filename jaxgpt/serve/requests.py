"""What a browser sends, checked: JSON to a `Request`, or a `BadRequestError` that says what was expected."""

import json
from typing import Any

from jaxgpt.config import UsageError, shown
from jaxgpt.run import RunError
from jaxgpt.sample import SamplingParams, bucket, checked
from jaxgpt.serve.library import Library, Served
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.writer import Request
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError, as_prepared

BODY = 2**20
"""Bytes of a request at most."""
MAPS = 2**28
"""Numbers, 1 GiB, that a look may hold on its way: the attention maps of all layers, and twice those of one more."""
FIELDS: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 1337,
    "tokens": 200,
}
"""What a request may say of how to write, and what is meant where it does not: the values of `jaxgpt sample`."""


class BadRequestError(UsageError):
    """A request cannot be done as asked."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def to_write(body: bytes, library: Library, limits: Limits) -> tuple[Served, Request]:
    """The request of `{"run": ..., "prompt": text or ids, "tokens": ..., ...}`, and the run that it names.

    Raises:
      BadRequestError: it is no such JSON, names no run, or asks for what cannot be or is too much.
    """
    tree = _tree(body, {"run", "prompt", *FIELDS})
    run = _run(tree, library)
    ids = _prompt(tree.get("prompt", ""), run.tokenizer, limits)
    given = {name: _number(name, tree.get(name, default), default) for name, default in FIELDS.items()}
    tokens, seed = given.pop("tokens"), given.pop("seed")
    if not 1 <= tokens <= limits.max_tokens:
        raise BadRequestError(f"tokens is {tokens}, expected 1 to {limits.max_tokens}")
    if not 0 <= seed < 2**32:
        raise BadRequestError(f"seed is {seed}, expected 0 to 2**32 - 1")
    if given["temperature"] > 1000:
        raise BadRequestError(f"temperature is {given['temperature']}, expected at most 1000")
    try:
        checked(SamplingParams(**given))
    except UsageError as error:
        raise BadRequestError(str(error)) from error
    return run, Request(run, ids, tokens, seed=seed, **given)


def to_look(body: bytes, library: Library) -> tuple[Served, list[int]]:
    """The run and the ids of `{"run": ..., "ids": [...]}`. Raises as `to_write`."""
    tree = _tree(body, {"run", "ids"})
    run = _run(tree, library)
    model = run.config.model
    ids = _ids(tree.get("ids"), run.tokenizer, "ids")
    if len(ids) > model.block_size:
        raise BadRequestError(f"{len(ids)} ids, expected at most {model.block_size}, which the model sees at once")
    if model.kind == "gpt" and (model.n_layer + 2) * model.n_head * bucket(len(ids), model.block_size) ** 2 > MAPS:
        raise BadRequestError(f"the attention maps of {len(ids)} tokens are too large: choose an earlier token")
    return run, list(ids)


def _tree(body: bytes, known: set[str]) -> dict[str, Any]:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the request is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise BadRequestError(f"the request is {shown(tree)}, expected an object")
    if unknown := sorted(tree.keys() - known):
        raise BadRequestError(f"no such field: {shown(unknown[0])}; there are {', '.join(sorted(known))}")
    return tree


def _run(tree: dict[str, Any], library: Library) -> Served:
    name = tree.get("run")
    if not isinstance(name, str):
        raise BadRequestError(f"run is {shown(name)}, expected the name of a run")
    try:
        return library.run(name)
    except RunError as error:
        raise BadRequestError(str(error), 404) from error
    except (UsageError, OSError, ValueError) as error:
        raise BadRequestError(f"run {shown(name)} cannot be read: {error}", 503) from error


def _prompt(prompt: Any, tokenizer: Tokenizer, limits: Limits) -> tuple[int, ...]:
    if isinstance(prompt, str):
        prompt = as_prepared(tokenizer, prompt)
    if not isinstance(prompt, str | list) or not prompt:
        raise BadRequestError(f"prompt is {shown(prompt)}, expected a text, or ids, of at least one token")
    if len(prompt) > limits.max_prompt:
        raise BadRequestError(f"the prompt is {len(prompt)} long, expected at most {limits.max_prompt}", 413)
    if isinstance(prompt, list):
        return _ids(prompt, tokenizer, "prompt")
    try:
        return tuple(tokenizer.encode(prompt).tolist())
    except UnknownCharacterError as error:
        said = f"character {error.character!r} at position {error.position} of the prompt is not in the vocabulary"
        raise BadRequestError(said) from error
    except (UsageError, ValueError) as error:
        raise BadRequestError(f"the prompt cannot be read: {error}") from error


def _ids(given: Any, tokenizer: Tokenizer, name: str) -> tuple[int, ...]:
    V = tokenizer.vocab_size
    if not isinstance(given, list) or not given:
        raise BadRequestError(f"{name} is {shown(given)}, expected a list of ids, at least one")
    for each in given:
        if type(each) is not int or not 0 <= each < V:
            raise BadRequestError(f"{name} holds {shown(each)}, expected whole numbers from 0 to {V - 1}")
    return tuple(given)


def _number(name: str, given: Any, default: Any) -> Any:
    """`given` as a number of the type of `default`; a float may be written as a whole number."""
    whole = isinstance(default, int)
    if type(given) is not int and (whole or type(given) is not float):
        raise BadRequestError(f"{name} is {shown(given)}, expected a {'whole ' * whole}number")
    try:
        return given if whole else float(given)
    except OverflowError as error:
        raise BadRequestError(f"{name} is {shown(given)}, expected a number") from error
