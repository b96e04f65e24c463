"""The ASGI application: the page, the list of runs, texts as server-sent events, and a look at one token."""

import asyncio
import codecs
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.serve import limits, requests
from jaxgpt.serve.guard import Guard, json_response
from jaxgpt.serve.library import Library
from jaxgpt.serve.scheduler import Scheduler
from jaxgpt.serve.writer import End, Job, Piece
from jaxgpt.tokenizer import Tokenizer

FILES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}


def application(library: Library, scheduler: Scheduler, hosts: Iterable[str] = (), token: str = "") -> ASGIApp:
    """The whole application; `hosts` and `token` as in `Guard`."""

    async def runs(request: Request) -> Response:
        found = [library.summary(name) for name in library.names]
        limits = scheduler.limits
        return json_response({"runs": found, "limits": vars(limits), "defaults": requests.defaults(limits)})

    async def write(request: Request) -> ASGIApp:
        job = requests.to_write(await _body(request), library, scheduler.limits)
        events = _events(job, job.ids, _submit(scheduler, job))

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await StreamingResponse(events, media_type="text/event-stream")(scope, receive, send)
            finally:
                scheduler.cancel(job)  # the client may have disconnected

        return stream

    async def look(request: Request) -> Response:
        job = requests.to_look(await _body(request), library)
        messages = _submit(scheduler, job)
        try:
            while messages.empty():
                if await request.is_disconnected():
                    raise ClientDisconnect
                await asyncio.sleep(0.02)
        finally:
            scheduler.cancel(job)
        looked = messages.get_nowait()
        if isinstance(looked, End):
            return json_response({"error": looked.error}, 503)
        likely = described(job.run.tokenizer, looked.likely, looked.likely_p)
        attention = np.nan_to_num(np.asarray(looked.attention, np.float64)).round(6).tolist()
        return json_response({"attention": attention, "likely": likely})

    async def health(request: Request) -> Response:
        state = scheduler.state
        return json_response(state, 200 if state["status"] == "ok" else 503)

    async def file(request: Request) -> Response:
        return FileResponse(Path(__file__).parent / FILES[request.url.path])

    routes = [Route(path, file) for path in FILES]
    routes += [Route("/health", health), Route("/api/runs", runs)]
    routes += [Route("/api/write", write, methods=["POST"]), Route("/api/look", look, methods=["POST"])]
    handlers: Any = {
        HTTPException: lambda request, error: json_response({"error": error.detail}, error.status_code, error.headers),
        ClientDisconnect: lambda request, error: json_response({"error": "the client disconnected"}, 400),
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, hosts, token)


async def _events(job: Job, prompt: list[int], messages: asyncio.Queue[Any]) -> AsyncIterator[str]:
    """A text while it is generated, as server-sent events: `start`, `tokens`, `tokens`, ..., `end`."""

    def event(name: str, data: Any) -> str:
        return f"event: {name}\ndata: {json.dumps(data)}\n\n"

    tokenizer, decoder = job.run.tokenizer, codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield event("start", {"prompt": [[i, decoder.decode(tokenizer.token_bytes[i])] for i in prompt]})
    while isinstance(message := await messages.get(), Piece):
        tokens = []
        for token, p, likely, likely_p in zip(*message.drawn, strict=True):
            drawn, *others = described(tokenizer, [token, *likely], [p, *likely_p])
            tokens.append(drawn | {"text": decoder.decode(tokenizer.token_bytes[token]), "likely": others})
        yield event("tokens", {"from": message.first, "tokens": tokens})
        await asyncio.sleep(0)  # notice a client that has disconnected, even where many pieces wait
    yield event("end", {"text": decoder.decode(b"", final=True), "error": message.error})


def described(tokenizer: Tokenizer, ids: Any, probabilities: Any) -> list[dict[str, Any]]:
    r"""The text of each id, and its probability to six significant digits, 0 for NaN (from a diverged model); for a
    token that is not UTF-8 by itself also `shown`, with its bytes as \xNN."""
    found = []
    for i, x in zip(np.asarray(ids).tolist(), np.nan_to_num(np.asarray(probabilities, np.float64)), strict=True):
        token, p = tokenizer.token_bytes[i], float(f"{x:.6g}")
        text, shown = (token.decode("utf-8", errors) for errors in ("ignore", "backslashreplace"))
        found.append({"id": i, "text": text, "p": p} | ({} if text.encode() == token else {"shown": shown}))
    return found


def _submit(scheduler: Scheduler, job: Job) -> asyncio.Queue[Any]:
    """The queue that receives the messages of `job` from the scheduler's thread. Raises as `Scheduler.submit`."""
    queue, loop = asyncio.Queue[Any](), asyncio.get_running_loop()

    def put(message: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(queue.put_nowait, message)

    job.put = put
    scheduler.submit(job)
    return queue


async def _body(request: Request) -> bytes:
    """The JSON body, of at most MAX_BODY bytes, if it arrives within TIMEOUT."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")
    body = b""
    try:
        async with asyncio.timeout(limits.TIMEOUT):
            async for part in request.stream():
                body += part
                if len(body) > requests.MAX_BODY:
                    raise HTTPException(413, f"the request is longer than {requests.MAX_BODY} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"the request did not arrive within {limits.TIMEOUT:g} s") from error
    return body
