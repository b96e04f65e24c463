"""A client of the playground that needs no socket."""

import asyncio
import json

JSON = {"content-type": "application/json"}


class Call:
    """One request to an ASGI application. With `leave`, the client disconnects after the first tokens."""

    def __init__(self, app, method, path, body=b"", headers=None, leave=False):
        headers = {"host": "127.0.0.1:8000"} | (headers or {})
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items() if value is not None]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {
            "headers": pairs,
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 8000),
            "root_path": "",
        }
        self.app, self.scope, self.leave = app, scope | {"client": ("127.0.0.1", 1), "asgi": {"version": "3.0"}}, leave
        self.body, self.sent, self.disconnected, self.status, self.data = body, False, asyncio.Event(), 0, b""

    async def receive(self):
        if not self.sent:
            self.sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.data += message.get("body", b"")
            if self.leave and b"event: tokens" in self.data:
                self.disconnected.set()

    async def run(self):
        await asyncio.wait_for(self.app(self.scope, self.receive, self.send), 60)
        return self

    @property
    def tree(self):
        return json.loads(self.data)

    @property
    def events(self):
        lines = [each.split("\n") for each in self.data.decode().split("\n\n")[:-1]]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]

    @property
    def ids(self):
        return [each["id"] for name, tree in self.events if name == "tokens" for each in tree["tokens"]]


def call(app, method, path, tree=None, headers=None, **kwargs):
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode() if tree is not None else b""
    headers = (JSON if method == "POST" else {}) | (headers or {})
    return asyncio.run(Call(app, method, path, body, headers, **kwargs).run())
