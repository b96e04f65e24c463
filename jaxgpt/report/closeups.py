"""The parts of a report that show what a run's weights say: texts, losses, attention, embeddings."""

from collections.abc import Iterable, Sequence

from jaxgpt.display.markup import Html, element, join
from jaxgpt.display.oneline import visible
from jaxgpt.display.style import Spec
from jaxgpt.report.facts import Facts
from jaxgpt.report.looks import Looks
from jaxgpt.report.sections import NOTHING, chart, section, table


def samples(runs: Sequence[Facts], looks: Sequence[Looks]) -> Html:
    """What each run wrote, by step; of several runs, the last text of each."""
    shown = []
    for facts, look in zip(runs, looks, strict=True):
        losses = {score.step: score.loss for score in facts.scores}
        for sample in look.samples if len(runs) == 1 else look.samples[-1:]:
            scored = f", validation loss {losses[sample.step]:.3f}" if sample.step in losses else ""
            name = "" if len(runs) == 1 else f"{facts.name}, "
            shown.append(element("h3", f"{name}after {sample.step:,} steps{scored}"))
            told = join(element("b", sample.prompt), sample.text)
            shown.append(element("div", told, class_="text scroll", tabindex=0, role="region", aria_label="text"))
    about = "The beginning, in bold, is given; the seed is the same each time, the temperature 0.8. "
    about += "From every checkpoint that is kept, and from the model before its first step."
    if len(runs) > 1:
        about = "The beginning, in bold, is given; the seed is the same, the temperature 0.8."
    return section("What it writes", element("p", about, class_="quiet"), *shown) if shown else NOTHING


def passage(looks: Looks, of: str) -> Html:
    """Validation text, each token coloured by its loss."""
    if not looks.passage:
        return NOTHING
    top = (looks.limits.uniform if looks.limits else max(looks.passage.losses)) or 1.0  # of one character, nothing
    pairs = zip(looks.passage.tokens, looks.passage.losses, strict=True)
    shown = tokens((token, f"--l:{min(1.0, loss / top):.2f}") for token, loss in pairs)
    mean = sum(looks.passage.losses) / len(looks.passage.losses)
    return section(
        f"What surprised it{of}",
        element("p", f"Text of the validation split that it never learnt from, {mean:.2f} nats a token here. The "
                "passage is, of 32 places evenly apart, the one with the most letters. Point at a character, or tap "
                "it, or walk with the arrow keys.", class_="quiet"),
        element("p", "0 nats ", element("i"), f" {top:.2f}: no better than guessing", class_="key quiet"),
        askable("passage", shown, "losses", "What was expected in its place is told here."),
    )  # fmt: skip


def attention(looks: Looks, of: str) -> Html:
    """Who looks at whom: a map for each head, and the text under the one that is chosen."""
    if not looks.attention:
        return NOTHING
    L, H, T, _ = looks.attention.weights.shape

    def button(layer: int, head: int) -> Html:
        said = f"layer {layer + 1}, head {head + 1}"
        canvas = element("canvas", width=T, height=T)
        return element("button", canvas, type="button", data_layer=layer, data_head=head, aria_label=said, title=said)

    top = element("tr", element("td"), *(element("th", f"head {head + 1}", scope="col") for head in range(H)))
    rows = [
        element("tr", element("th", f"layer {layer + 1}", scope="row"),
                *(element("td", button(layer, head)) for head in range(H)))
        for layer in range(L)
    ]  # fmt: skip
    many = "grid many" if L * H > 36 else "grid"
    return section(
        f"Where it looks{of}",
        element("p", "In each map a row is a token and a column is one that it takes from: its past, itself included. "
                "Choose a map, then a token of the text below; the shade is how much it takes from each.",
                class_="quiet"),
        element("div",
                element("div", element("table", top, *rows), class_=many, id="heads"),
                element("canvas", id="map", class_="map", width=T, height=T, role="img", aria_label="the chosen map"),
                class_="side"),
        askable("attention", tokens((token, "") for token in looks.attention.tokens), "weights", ""),
    )  # fmt: skip


def embedding(looks: Looks, charts: dict[str, Spec], of: str) -> Html:
    """The plane of the embeddings, and the neighbours of the most frequent tokens."""
    if not looks.embedding:
        return NOTHING
    pairs = zip(looks.embedding.tokens, looks.embedding.near, strict=True)
    rows = [
        (spaced(token), "   ".join(f"{spaced(name)} {cosine:.2f}" for name, cosine in near)) for token, near in pairs
    ]
    near = table(("token", "nearest by cosine"), rows[:60], class_="mono")
    caption = f"The {len(rows)} most frequent tokens, where the two principal components of their embeddings put them."
    return section(
        f"What is alike to it{of}",
        chart(charts, "embedding", caption),
        element("details", element("summary", "Nearest neighbours"), near),
    )


def tokens(pairs: Iterable[tuple[str, str]]) -> Html:
    """Tokens one after another as they read, each with a number and a style."""
    return join(
        *(
            element("span", token.replace("\n", "↵\n"), data_i=i, **({"style": style} if style else {}))
            for i, (token, style) in enumerate(pairs)
        )
    )


def spaced(token: str) -> str:
    """A token on one line, its blanks to be seen."""
    return visible(token).replace(" ", "␣")


def askable(name: str, shown: Html, class_: str, hint: str) -> Html:
    """A text whose tokens can be asked about, and the place where the answer stands while the text is in sight."""
    words = element("div", shown, class_=f"text tokens {class_}", id=name, role="group", aria_label=name)
    told = element("div", element("span", hint, class_="quiet"), class_="told", id=f"{name}-told", aria_live="polite")
    return element("div", told, words)
