"""The results of diagnoses as lines of text and as JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from jaxgpt import cost
from jaxgpt.data import Ids
from jaxgpt.diagnostics.cli import Effort
from jaxgpt.diagnostics.derivatives import NoiseScale
from jaxgpt.diagnostics.diagnose import Attention, Curvature, Influence, Landscape, Lens, Subject
from jaxgpt.diagnostics.inside import Scores
from jaxgpt.display.text import token_texts, visible
from jaxgpt.tokenizer import Tokenizer

LONGEST = 20_000
"""Elements of an array, at most, that are written as JSON; of a larger array only the shape is."""


class Words:
    """The tokens of a subject as text on one line."""

    def __init__(self, tokenizer: Tokenizer, subject: Subject):
        self.subject, self.config = subject, subject.config
        self._texts = token_texts(tokenizer)

    def token(self, i: Any) -> str:
        """One token on one line; "?" for the padding of the vocabulary."""
        return visible(self._texts[int(i)]) if int(i) < len(self._texts) else "?"

    def text(self, ids: Ids) -> str:
        return "".join(map(self.token, ids))

    def window(self, start: Any) -> str:
        """A window of the training text."""
        return self.text(self.subject.train[int(start) : int(start) + self.config.model.block_size + 1])


def lines(name: str, found: Any, words: Words) -> Iterator[str]:
    """The result of a diagnosis in a few lines; the first begins with its name."""
    views: dict[str, Any] = dict(
        noise=_noise, curvature=_curvature, landscape=_landscape, influence=_influence, lens=_lens,
        attention=_attention, tokens=_tokens,
    )  # fmt: skip
    for i, line in enumerate(views[name](found, words)):
        yield f"  {'' if i else name:<10} {line}"


def _noise(found: NoiseScale, words: Words) -> Iterator[str]:
    T, B = words.config.model.block_size, words.config.train.batch_size
    if found.signal <= 0:
        yield f"the noise exceeds the gradient: more than {len(found.norms)} windows are needed (--windows)"
    else:
        yield (
            f"gradient noise scale {found.scale:,.0f} ± {found.standard_error:,.0f} windows of {T} tokens; "
            f"trained with batches of {B}"
        )
    yield f"gradient² {found.signal:.3g}, summed variance of a window's {found.noise:.3g} (nats/token)²"


def _curvature(found: Curvature, words: Words) -> Iterator[str]:
    values, errors = found.spectrum.values, found.spectrum.errors
    traces = np.asarray(found.traces)
    yield (
        f"Hessian eigenvalues from {values[0]:.3g} ± {errors[0]:.1g} to {values[-1]:.3g} ± {errors[-1]:.1g}, trace "
        f"{traces.mean():.3g} ± {traces.std(ddof=1) / math.sqrt(len(traces)):.2g}, nats/token"
    )
    stable = f"plain gradient descent is stable up to a learning rate of 2/{values[-1]:.3g} = {2 / values[-1]:.2g}"
    unstable = "none of them is above 0, so no learning rate is stable"
    yield f"over {cost.n_params(words.config.model):,} parameters; {stable if values[-1] > 0 else unstable}"


def _landscape(found: Landscape, words: Words) -> Iterator[str]:
    losses = np.asarray(found.losses)
    edge = np.concatenate([losses[0], losses[-1], losses[:, 0], losses[:, -1]])
    yield (
        f"loss {np.interp(1, found.shares, found.path):.3f} here, {edge.min():.3f} to {edge.max():.3f} at one filter "
        "norm along random directions"
    )
    first, least = np.interp(0, found.shares, found.path), int(np.argmin(found.path))
    yield (
        f"on the line from the initial parameters, at {first:.3f}: least at {found.shares[least]:.2f} of the way, "
        f"{found.path[least]:.3f}"
    )


def _influence(found: Influence, words: Words) -> Iterator[str]:
    order = np.argsort(np.asarray(found.products))
    window = words.text(words.subject.text[: words.config.model.block_size + 1])
    yield f"of training windows on the loss of {window[:64]!r}"
    for what, chosen in (("lowered most by", order[::-1][:3]), ("raised most by", order[:3])):
        for i in chosen:
            yield f"{what:<16} {found.products[i]:+8.3f}  {words.window(found.starts[i])[:64]!r}"
            what = ""


def _lens(found: Lens, words: Words) -> Iterator[str]:
    yield "depth      " + "".join(f"{depth:>8}" for depth in range(len(found.losses)))
    for name, row in (("loss", found.losses), ("KL to last", found.divergence), ("agreement", found.agreement)):
        yield f"{name:<11}" + "".join(f"{x:8.3f}" for x in row)


def _attention(found: Attention, words: Words) -> Iterator[str]:
    yield f"entropy in nats (uniform: {found.mean.uniform:.2f}) and mean distance in tokens, by head"
    for block, (entropies, distances) in enumerate(zip(found.mean.entropy, found.mean.distance, strict=True)):
        yield f"block {block:<3} " + "  ".join(f"{e:.2f}/{d:.0f}" for e, d in zip(entropies, distances, strict=True))


def _tokens(found: Scores, words: Words) -> Iterator[str]:
    text = words.subject.text
    yield f"mean loss {found.losses.mean():.4f} nats over {len(found.losses)} tokens; the least expected:"
    for i in np.argsort(found.losses)[::-1][:5]:
        before = words.text(text[max(0, i - 24) : i + 1])
        instead = ", ".join(
            f"{words.token(t)!r} {p:.2f}" for t, p in zip(found.ids[i, :3], found.probabilities[i], strict=False)
        )
        yield f"{found.losses[i]:6.2f}  {before!r} -> {words.token(text[i + 1])!r}; likelier: {instead}"


def to_json(found: dict[str, Any], run: str, step: int, effort: Effort) -> str:
    """All numbers of the diagnoses; of arrays of over 20,000 the shape, of non-finite values null."""
    return json.dumps({"run": run, "step": step, "effort": asdict(effort), **_plain(found)}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    array = np.asarray(value)
    if array.size > LONGEST:
        return {"shape": list(array.shape)}
    whole: Any = array.astype(object)
    whole[~np.isfinite(array)] = None
    return whole.tolist()
