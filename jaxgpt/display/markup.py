"""HTML by construction: whatever is put into an element is text, unless an element was made of it before."""

import html
import json
from typing import Any

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""What no page may hold, and the sign that stands for it."""


class Html(str):
    """Markup that is safe to put into a page."""


def text(value: object) -> Html:
    """Any text as it is to be read: nothing in it is markup, and half of a surrogate pair is U+FFFD."""
    if isinstance(value, Html):
        return value
    whole = str(value).translate(CONTROLS).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Html(html.escape(whole))


def join(*children: object) -> Html:
    """Elements and texts one after another."""
    return Html("".join(map(text, children)))


def element(name: str, *children: object, **attributes: object) -> Html:
    """An element; of an attribute's name, _ becomes -, and one at its end is dropped.

    >>> element("p", "a < b", class_="x", data_id=1)
    '<p class="x" data-id="1">a &lt; b</p>'
    """
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{said}>{join(*children)}</{name}>")


def data(value: Any, id: str) -> Html:
    """Values for a script to read, as a block that no text in them can end."""
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{text(id)}">{plain}</script>')
