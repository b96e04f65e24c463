"""What the server answers: the page, its runs, texts as they are written, and what a token looked at."""

import asyncio
import codecs
import json
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.serve import limits, requests
from jaxgpt.serve.guard import Guard, answer
from jaxgpt.serve.library import Library
from jaxgpt.serve.requests import BadRequestError
from jaxgpt.serve.scheduler import BusyError, Looked, Scheduler, StoppedError
from jaxgpt.serve.writer import End, Piece
from jaxgpt.serve.writer import Request as Wanted
from jaxgpt.tokenizer import Tokenizer

FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def application(library: Library, scheduler: Scheduler, hosts: Iterable[str] = (), token: str = "") -> ASGIApp:
    """The ASGI application; `hosts` and `token` as `Guard` takes them."""

    async def runs(request: Request) -> Response:
        return answer({"runs": library.summaries(), "limits": vars(scheduler.limits), "defaults": requests.FIELDS})

    async def write(request: Request) -> ASGIApp:
        run, wanted = requests.to_write(await _body(request), library, scheduler.limits)
        return Stream(scheduler, wanted, run.tokenizer)

    async def look(request: Request) -> Response:
        run, ids = requests.to_look(await _body(request), library)
        told, put = _mailbox()
        asked = scheduler.look(run, ids, put)
        try:
            looked = await _while_there(told.get(), request.receive)
        finally:
            scheduler.cancel(asked)
        if looked is None:
            raise ClientDisconnect
        if not isinstance(looked, Looked):
            return answer({"error": looked.why}, 503)
        told_of = likely(run.tokenizer, looked.likely, looked.chances)
        return answer({"attention": _rounded(looked.weights), "likely": told_of})

    async def health(request: Request) -> Response:
        state = scheduler.state
        return answer(state, 200 if state["status"] == "ok" else 503)

    routes = [Route(path, _file(name, kind)) for path, (name, kind) in FILES.items()]
    routes += [Route("/health", health), Route("/api/runs", runs)]
    routes += [Route("/api/write", write, methods=["POST"]), Route("/api/look", look, methods=["POST"])]
    handlers: Any = {
        ClientDisconnect: lambda request, error: answer({"error": "the request broke off"}, 400),
        HTTPException: lambda request, error: answer({"error": error.detail}, error.status_code),
        BadRequestError: lambda request, error: answer({"error": str(error)}, error.status),
        BusyError: lambda request, error: answer({"error": str(error)}, 429, retry_after="1"),
        StoppedError: lambda request, error: answer({"error": str(error)}, 503),
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, hosts, token)


class Stream:
    """A text while it is written, as server-sent events: `start`, `tokens`, `tokens`, ..., `end`.

    When the client leaves, or its connection is broken off because it takes nothing, its place is given up.
    """

    def __init__(self, scheduler: Scheduler, wanted: Wanted, tokenizer: Tokenizer):
        self.scheduler, self.wanted, self.tokenizer = scheduler, wanted, tokenizer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told, put = _mailbox()
        job = self.scheduler.write(self.wanted, put)
        try:
            await _while_there(self._write(told, scope, receive, send), receive)
        finally:
            self.scheduler.cancel(job)

    async def _write(self, told: asyncio.Queue[Any], scope: Scope, receive: Receive, send: Send) -> None:
        piece = await told.get()
        if isinstance(piece, End):  # before the first token: it could not begin
            return await answer({"error": piece.why}, 503)(scope, receive, send)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(name: str, tree: Any, more: bool = True) -> None:
            body = f"event: {name}\ndata: {json.dumps(tree)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        token_bytes = self.tokenizer.token_bytes
        prompt = [[i, decoder.decode(token_bytes[i])] for i in self.wanted.ids]
        await event("start", {"prompt": prompt})
        while isinstance(piece, Piece):
            drawn = piece.drawn
            tokens = [
                {"id": i, "text": decoder.decode(token_bytes[i]), "p": p, "likely": likely} | _part(token_bytes[i])
                for i, p, likely in zip(drawn.token.tolist(), _rounded(drawn.chance), self._likely(drawn), strict=True)
            ]
            await event("tokens", {"from": piece.first, "tokens": tokens})
            piece = await told.get()
        await event("end", {"text": decoder.decode(b"", final=True), "error": piece.why}, more=False)

    def _likely(self, drawn: Any) -> list[Any]:
        return [likely(self.tokenizer, *each) for each in zip(drawn.likely, drawn.chances, strict=True)]


def likely(tokenizer: Tokenizer, ids: Any, chances: Any) -> list[dict[str, Any]]:
    """(K,) ids and probabilities as a browser is told of them."""
    token_bytes = tokenizer.token_bytes
    return [
        {"id": i, "text": token_bytes[i].decode("utf-8", "ignore"), "p": p} | _part(token_bytes[i])
        for i, p in zip(ids.tolist(), _rounded(chances), strict=True)
    ]


def _part(token: bytes) -> dict[str, str]:
    r"""How a token that holds a part of a character is `shown`, as \xNN; of others there is nothing to say."""
    shown = token.decode("utf-8", "backslashreplace")
    return {} if shown.encode() == token else {"shown": shown}


def _rounded(x: Any) -> list[Any]:
    """As plain numbers: JSON knows no nan, which a model that went astray may say."""
    return np.nan_to_num(np.asarray(x, np.float64)).round(6).tolist()


def _mailbox() -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
    """A queue of this event loop, and a way to fill it from any thread."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(told: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(queue.put_nowait, told)

    return queue, put


async def _while_there(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """What `work` gives; None where the client leaves before, which ends it."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_leaving(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()


async def _leaving(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """The body of a request, if it is JSON of no more than `requests.BODY` bytes and comes in time."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequestError("expected Content-Type: application/json", 415)
    body = b""
    try:
        async with asyncio.timeout(limits.PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > requests.BODY:
                    raise BadRequestError(f"the request is longer than {requests.BODY} bytes", 413)
    except TimeoutError as error:
        raise BadRequestError(f"the request did not come within {limits.PATIENCE:g} s", 408) from error
    return body


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    data = (Path(__file__).parent / name).read_bytes()

    async def file(request: Request) -> Response:
        return Response(data, media_type=f"{kind}; charset=utf-8")

    return file
