"""`jaxgpt verify-resume`: that a kill costs nothing, shown."""

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
    """How often to kill the second run; only kills count after which it resumes and computes steps again."""
    kill_seed: int = 0
    """Fixes the steps at which it is killed; the moments in them are left to chance."""
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    from jaxgpt.verify.resume import scaled_down, verify_resume

    name, args = take_recipe(Verify, args, "which recipe? jaxgpt verify-resume gpt-demo")
    default = Verify(scaled_down(recipe(name).config))
    about = (
        f"Train the first steps of {name} twice, once in one process and once in one that is killed (SIGKILL) at "
        "random moments and resumed, and compare every line and every bit. Any setting of the recipe can be given. "
        "(On a GPU the two may differ where attention is cuDNN's and contexts are longer than 256: not repeatable.)"
    )
    given = parse(Verify, args, f"verify-resume {name}", about, default=default)
    if given.kills < 1:
        raise UsageError(f"kills is {given.kills}, expected 1 or more")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was begun is cleaned up
    folder = Path(tempfile.mkdtemp(prefix="jaxgpt-verify-"))
    try:
        verdict = verify_resume(given.config, folder, given.data_dir, given.kills, given.kill_seed, print)
    except BaseException:
        shutil.rmtree(folder)
        raise
    if verdict.difference:
        print(f"DIFFERENT after {len(verdict.kills)} kills: {verdict.difference}\nthe two runs are in {folder}")
        return 1
    shutil.rmtree(folder)
    if len(verdict.kills) < given.kills:
        print(
            f"NOT SHOWN: {len(verdict.kills)} of {given.kills} kills made the run compute steps again before it ended; "
            "fewer --kills, more --steps, or an --eval-every of several --scan-steps leave more room for them"
        )
        return 1
    saves = sum(kill.saving for kill in verdict.kills)
    print(
        f"IDENTICAL after {len(verdict.kills)} kills ({saves} in a save): {verdict.lines:,} lines of metrics, and "
        f"{verdict.arrays} arrays of parameters and optimizer state at each of {verdict.checkpoints} saved steps, "
        "bit for bit"
    )
    return 0
