"""A load generator: many clients at once, each of which checks that its texts are complete."""

import http.client
import json
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen


@dataclass
class Tally:
    """The results of all clients."""

    texts: int = 0
    """Complete texts."""
    tokens: int = 0
    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)
    """Seconds from each request to its first token."""
    by_seed: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)
    """The different texts for each seed: one, if requests do not influence each other."""
    errors: Counter[str] = field(default_factory=Counter)
    """Number of each error."""

    def __str__(self) -> str:
        wait = statistics.median(self.waits) if self.waits else float("nan")
        found = f"{self.texts} texts, {self.tokens / self.seconds:,.0f} tokens/s, first token after {1e3 * wait:.0f} ms"
        return found + "".join(f", {n} x {error}" for error, n in self.errors.items())


def run_clients(address: str, run: str, clients: int, seconds: float, tokens: int = 200) -> Tally:
    """Let a number of clients request one text after another for `seconds`, each with one of four seeds."""
    tally, lock, began = Tally(), threading.Lock(), time.perf_counter()

    def client(number: int) -> None:
        seed = number
        while time.perf_counter() - began < seconds:
            seed += 1
            request = {"run": run, "prompt": "\n", "tokens": tokens, "seed": seed % 4}
            start, wait = time.perf_counter(), 0.0
            ids: list[int] = []
            problem = ""
            try:
                for name, tree in write(address, request):
                    wait = wait or (time.perf_counter() - start) * (name == "tokens")
                    ids += [each["id"] for each in tree.get("tokens", [])]
                    problem = tree.get("error", "")
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if not problem and len(ids) != tokens:
                problem = f"{len(ids)} of {tokens} tokens"
            with lock:
                tally.texts += not problem
                tally.tokens += len(ids)
                tally.errors += Counter([problem] if problem else [])
                tally.waits.append(wait)
                if not problem:
                    tally.by_seed.setdefault(seed % 4, set()).add(tuple(ids))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.seconds = time.perf_counter() - began
    return tally


def write(address: str, request: dict[str, Any]) -> Any:
    """The events of one text, (name, data), as they arrive. Raises ValueError if the server refuses."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    try:
        connection.request("POST", "/api/write", json.dumps(request), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status}: {json.loads(response.read())['error']}")
        name = ""
        for line in response:
            kind, _, value = line.decode().rstrip("\n").partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                yield name, json.loads(value)
    finally:
        connection.close()


def first_run(address: str) -> str:
    """The newest run that can be sampled; raises ValueError if there is none."""
    with urlopen(f"{address}api/runs", timeout=120) as response:
        runs = [run["name"] for run in json.load(response)["runs"] if "problem" not in run]
    if not runs:
        raise ValueError("no run can be sampled: jaxgpt train gpt-demo makes one that can")
    return str(runs[0])


def resident_bytes(process: int) -> int:
    """Resident memory of a process in bytes, on Linux."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {process} reports no memory")
