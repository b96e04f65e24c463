"""`jaxgpt verify-resume`: kill and resume a run, and compare it with one that was not killed."""

import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.cli.options import DataDir, parse, take_recipe
from jaxgpt.config import Config, UsageError
from jaxgpt.display.text import count
from jaxgpt.recipes import recipe


@dataclass(frozen=True)
class Verify:
    config: Config
    kills: int = 5
    """Times to kill the second run, counting only kills after which it computes steps again."""
    kill_seed: int = 0
    """Seed of the steps at which it is killed; the moment within a step still varies."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    from jaxgpt.signals import SIGNALS
    from jaxgpt.verify.resume import scaled_down, verify_resume

    name, args = take_recipe(Verify, args, "which recipe? jaxgpt verify-resume gpt-demo")
    default = Verify(scaled_down(recipe(name).config))
    about = (
        f"Train the first steps of {name} twice, in one process and in processes that are killed (SIGKILL) at random "
        "moments and resumed, and compare every line of metrics and every bit of the checkpoints. Takes any setting of "
        "the recipe. (On a GPU, cuDNN attention is not repeatable for contexts longer than 256: add --deterministic.)"
    )
    given = parse(Verify, args, "verify-resume", about, default, name)
    if given.kills < 1:
        raise UsageError(f"kills is {given.kills}, expected 1 or more")
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # such a signal would not clean up; an exit does
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="jaxgpt-verify-"))
    verdict = None
    try:
        verdict = verify_resume(given.config, folder, given.data_dir, given.kills, given.kill_seed, print)
    finally:
        if not (verdict and verdict.difference):
            shutil.rmtree(folder)
    if verdict.difference:
        print(f"DIFFERENT after {count(verdict.kills, 'kill')}: {verdict.difference}\nthe two runs are in {folder}")
        return 1
    if verdict.kills < given.kills:
        print(
            f"NOT SHOWN: only {verdict.kills} of {given.kills} kills made the run compute steps again; try fewer "
            "--kills, more --steps, or an --eval-every of several --scan-steps"
        )
        return 1
    print(
        f"IDENTICAL after {count(verdict.kills, 'kill')}: {verdict.lines:,} lines of metrics, and {verdict.arrays} "
        f"arrays of parameters and optimizer state at each of {verdict.checkpoints} saved steps, bit for bit"
    )
    return 0
