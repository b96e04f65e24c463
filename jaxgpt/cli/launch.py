"""`jaxgpt launch`: one run in several processes on this machine."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxgpt.cli.options import parse
from jaxgpt.config import UsageError


@dataclass(frozen=True)
class Launch:
    processes: Annotated[int, tyro.conf.arg(help="How many; each takes one GPU, where there are some.")] = 2


def run(args: list[str]) -> int:
    ours, words = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    given = parse(Launch, ours, "launch")
    if words[:1] != ["train"] or given.processes < 1:
        raise UsageError("expected how many processes and what they train: jaxgpt launch --processes 2 -- train RECIPE")

    from jaxgpt import launch

    return launch.group(words, given.processes)
