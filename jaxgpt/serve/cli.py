"""`jaxgpt serve`: a playground in the browser."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Checkpoint, RunsDir, parse
from jaxgpt.config import MissingExtraError
from jaxgpt.serve.limits import Limits


@dataclass(frozen=True)
class Serve:
    served: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FOLDER")] = None
    """Name of a run, or ./FOLDER of one or more. None: all runs in --runs-dir."""
    host: str = "127.0.0.1"
    """Address to listen on; any that other machines can reach (not loopback) requires a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token: str = ""
    """Token that clients must send. JAXGPT_TOKEN sets it too, hidden from other users of this machine."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Accept requests to this host name, besides localhost, IP addresses and --host; may be repeated."""
    checkpoint: Checkpoint = "best"
    limits: Limits = field(default_factory=Limits)
    runs_dir: RunsDir = Path("runs")


def run(args: list[str]) -> int:
    given = parse(Serve, args, "serve")
    try:
        from jaxgpt.serve.server import serve
    except ImportError as error:
        raise MissingExtraError("the playground", error.name or "starlette", "serve") from error
    use_compile_cache()
    import jax

    jax.devices()  # without a device, fail now, not at the first request
    serve(given)
    return 0
