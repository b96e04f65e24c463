"""Who may ask: the host that was meant, the origin of the page, the token; and what a browser may do with an answer."""

import hmac
import ipaddress
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer. There is no Access-Control-Allow-Origin: pages from elsewhere read nothing."""
OPEN = {"/", "/page.js", "/page.css", "/health"}
"""What is given without a token: the page, which holds nothing, asks for it."""


def answer(tree: Any, status: int = 200, **headers: str) -> Response:
    """`tree` as JSON in ASCII, whatever characters it holds."""
    return Response(json.dumps(tree), status, {name.replace("_", "-"): value for name, value in headers.items()},
                    "application/json")  # fmt: skip


class Guard:
    """Lets through to `app` what may ask, and adds HEADERS to what comes back.

    Args:
      hosts: the names that this server is known by. Addresses and localhost always are: a page that points a name of
        its own at this machine (DNS rebinding) gives itself away by the name.
      token: what requests must bring as `Authorization: Bearer`; "" for none.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = (), token: str = ""):
        self.app, self.hosts, self.token = app, {host.lower() for host in hosts}, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        refused = self.refusal(scope)
        await (refused or self.app)(scope, receive, guarded)

    def refusal(self, scope: Scope) -> Response | None:
        """Why a request is not let through; None if it is."""
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value.decode("latin-1"))
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        if len(hosts) != 1 or not self.knows(hosts[0]):
            return answer({"error": "this server does not go by that name: jaxgpt serve --allow-host NAME"}, 403)
        if origins and [urlsplit_netloc(origin) for origin in origins] != [hosts[0].lower()]:
            return answer({"error": "pages from elsewhere may not ask"}, 403)
        given = headers.get(b"authorization", [""])[0].encode("latin-1")
        if (
            self.token
            and scope["path"] not in OPEN
            and not hmac.compare_digest(given, b"Bearer " + self.token.encode())
        ):
            return answer({"error": "a token is needed: Authorization: Bearer TOKEN"}, 401, www_authenticate="Bearer")
        return None

    def knows(self, host: str) -> bool:
        """Whether a Host header, a name or an address and perhaps a port, means this server."""
        try:
            parts = urlsplit(f"//{host}")
            name, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            return False
        return name == "localhost" or name in self.hosts or is_address(name)


def is_address(name: str) -> bool:
    """Whether `name` is an IPv4 or IPv6 address.

    >>> is_address("::1"), is_address("127.0.0.1.example.org")
    (True, False)
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def urlsplit_netloc(origin: str) -> str:
    """The host and port of an Origin header; "" of one that is none.

    >>> urlsplit_netloc("http://localhost:8000"), urlsplit_netloc("null")
    ('localhost:8000', '')
    """
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
