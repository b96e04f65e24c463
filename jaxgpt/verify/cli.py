"""`jaxgpt verify-resume`: kill and resume a run, and compare it with one that was not killed."""

import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.cli.options import DataDir, parse, take_recipe
from jaxgpt.config import Config, UsageError
from jaxgpt.recipes import recipe


@dataclass(frozen=True)
class Verify:
    config: Config
    kills: int = 5
    """How often to kill the second run; a kill counts if the run then computes steps again."""
    kill_seed: int = 0
    """Fixes the steps at which it is killed, though not the moments within them."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    from jaxgpt.verify.resume import scaled_down, verify_resume

    name, args = take_recipe(Verify, args, "which recipe? jaxgpt verify-resume gpt-demo")
    default = Verify(scaled_down(recipe(name).config))
    about = (
        f"Train the first steps of {name} twice, in one process and in processes that are killed (SIGKILL) at "
        "random moments and resumed, and compare every line and every bit. Any setting of the recipe can be given. "
        "(On a GPU, cuDNN attention is not repeatable for contexts longer than 256: give --deterministic.)"
    )
    given = parse(Verify, args, f"verify-resume {name}", about, default=default)
    if given.kills < 1:
        raise UsageError(f"kills is {given.kills}, expected 1 or more")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that children and folder are removed
    folder = Path(tempfile.mkdtemp(prefix="jaxgpt-verify-"))
    verdict = None
    try:
        verdict = verify_resume(given.config, folder, given.data_dir, given.kills, given.kill_seed, print)
    finally:
        if not (verdict and verdict.difference):
            shutil.rmtree(folder)
    if verdict.difference:
        print(f"DIFFERENT after {len(verdict.kills)} kills: {verdict.difference}\nthe two runs are in {folder}")
        return 1
    if len(verdict.kills) < given.kills:
        print(
            f"NOT SHOWN: only {len(verdict.kills)} of {given.kills} kills made the run compute steps again; try fewer "
            "--kills, more --steps, or an --eval-every of several --scan-steps"
        )
        return 1
    print(
        f"IDENTICAL after {len(verdict.kills)} kills: {verdict.lines:,} lines of metrics, and "
        f"{verdict.arrays} arrays of parameters and optimizer state at each of {verdict.checkpoints} saved steps, "
        "bit for bit"
    )
    return 0
