"""Refuses requests by host, origin and token, and adds security headers to every response."""

import hmac
import ipaddress
import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
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
"""Headers of every response. There is no Access-Control-Allow-Origin: other sites cannot read anything."""
OPEN = {"/", "/page.js", "/page.css", "/health"}
"""Served without a token: the page holds no data, and asks for the token."""


def json_response(tree: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`tree` as ASCII JSON, which can hold any string, even lone surrogates; starlette's JSONResponse cannot."""
    return Response(json.dumps(tree), status, headers, "application/json")


class Guard:
    """ASGI middleware that refuses requests which `app` must not see, and adds HEADERS to every response.

    Args:
      hosts: names of this server, besides localhost and IP addresses. Other names are refused: otherwise a site that
        points its own name at this machine (DNS rebinding) could read the responses.
      token: required as `Authorization: Bearer`, unless empty.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = (), token: str = ""):
        self.app, self.hosts, self.token = app, {"localhost", *(host.lower().rstrip(".") for host in hosts)}, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((n.encode(), v.encode()) for n, v in HEADERS.items())]
            await send(message)

        await (self.refusal(scope) or self.app)(scope, receive, guarded)

    def refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self.knows(hosts[0]):
            return json_response({"error": "unknown host name: to allow it, jaxgpt serve --allow-host NAME"}, 403)
        if origins and [origin.lower().partition("://")[2] for origin in origins] != [hosts[0].lower()]:
            return json_response({"error": "requests from other sites are refused"}, 403)
        given, expected = headers.get("authorization", "").encode("latin-1"), f"Bearer {self.token}".encode()
        if self.token and scope["path"] not in OPEN and not hmac.compare_digest(given, expected):
            error = {"error": "a token is required: Authorization: Bearer TOKEN"}
            return json_response(error, 401, {"WWW-Authenticate": "Bearer"})
        return None

    def knows(self, host: str) -> bool:
        """Whether a Host header (a name or an IP address, perhaps with a port) is valid and names this server."""
        try:
            parts = urlsplit(f"//{host}")
            name, _ = (parts.hostname or "").rstrip("."), parts.port  # a bad port raises ValueError
            return name in self.hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False
