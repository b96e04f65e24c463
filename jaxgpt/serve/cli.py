"""`jaxgpt serve`: runs to a playground in the browser."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Checkpoint, RunsDir, parse
from jaxgpt.config import MissingExtraError
from jaxgpt.serve.limits import Limits

Served = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN|FOLDER", help="Name of a run, or ./FOLDER of one or more."),
]


@dataclass(frozen=True)
class Serve:
    served: Served = "runs"
    host: str = "127.0.0.1"
    """Address to listen on; other machines can reach any but a loopback address, which needs a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token: str = ""
    """The token that clients must send. JAXGPT_TOKEN sets it out of sight of other users of this machine."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Accept requests to this host name, besides localhost, IP addresses and --host; may be repeated."""
    checkpoint: Checkpoint = "best"
    limits: Limits = field(default_factory=Limits)
    runs_dir: RunsDir = Path("runs")


def run(args: list[str]) -> int:
    given = parse(Serve, args, "serve")
    from jaxgpt.serve.library import Library

    try:
        from jaxgpt.serve.server import serve
    except ImportError as error:
        raise MissingExtraError("the playground", error.name or "starlette", "serve") from error
    use_compile_cache()
    import jax

    jax.devices()  # without a device, fail now and not at the first request
    library, limits = Library.at(given.served, given.runs_dir), given.limits.check()
    token = given.token or os.environ.get("JAXGPT_TOKEN", "")
    serve(library, given.host, given.port, limits, token, given.allow_host, given.checkpoint)
    return 0
