"""`jaxgpt serve`: runs to a playground in the browser."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Checkpoint, RunsDir, parse
from jaxgpt.serve.limits import Limits

Served = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN|FOLDER", help="A run's name, or ./FOLDER of one or more."),
]


@dataclass(frozen=True)
class Serve:
    served: Served = "runs"
    host: str = "127.0.0.1"
    """The address to listen on; beyond this machine a token is needed."""
    port: int = 8000
    """The port to listen on; 0 takes one that is free."""
    token: str = ""
    """What clients must show; the variable JAXGPT_TOKEN, which others on this machine cannot see, gives it too."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A name that this server is known by, beside localhost, addresses and --host; may be given several times."""
    checkpoint: Checkpoint = "best"
    limits: Limits = field(default_factory=Limits)
    runs_dir: RunsDir = Path("runs")


def run(args: list[str]) -> int:
    given = parse(Serve, args, "serve")
    from jaxgpt.serve.library import Library
    from jaxgpt.serve.server import serve

    use_compile_cache()
    import jax

    jax.devices()  # where there is none, the server fails now, not at the first request
    library, limits = Library.at(given.served, given.runs_dir), given.limits.check()
    token = given.token or os.environ.get("JAXGPT_TOKEN", "")

    def announce(address: str) -> None:
        print(f"{', '.join(library.names)}\nThe playground: {address}\nCtrl-C ends it.", flush=True)

    serve(library, given.host, given.port, limits, token, given.allow_host, given.checkpoint, announce)
    return 0
