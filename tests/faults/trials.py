"""Faults done to real runs, and what came of each: `scripts/faults` and the tests count the same things."""

import errno
import itertools
import multiprocessing
import os
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxgpt.checkpoint import Checkpoints, DamagedError
from jaxgpt.cli.runs import start
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.monitor.cost import n_params
from jaxgpt.run import Run, RunError
from jaxgpt.verify.resume import compare
from tests.faults import child

ROOT = Path(__file__).parents[2]

SMALL = Config(
    data=DataConfig(corpus="verse.txt"),
    model=ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1),
    optimizer=OptimizerConfig(warmup_steps=2, decay_steps=200),  # a run of another length is the same program
    train=TrainConfig(steps=100, batch_size=4, scan_steps=5, eval_every=5, eval_batches=2),
)
"""Saves every five steps, which take less time than the save: a save is under way nearly always."""


@dataclass
class Count:
    """How many faults there were, how many of them were met as promised, and what was not."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    good: int = 0

    def expect(self, ok: bool, what: str) -> None:
        """Count a fault that was met as promised, if `ok`."""
        self.tried += 1
        self.good += ok
        self.require(ok, what)

    def require(self, ok: bool, what: str) -> None:
        """Note what is no fault, and must be so all the same."""
        if not ok:
            self.failures.append(what)


def new_run(folder: Path, name: str, config: Config = SMALL) -> Run:
    """A run that has not begun, of a small text in `folder`."""
    verse = folder / "verse.txt"
    if not verse.exists():
        folder.mkdir(parents=True, exist_ok=True)
        verse.write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    config = Config(DataConfig(corpus=str(verse)), config.model, config.optimizer, config.train)
    return start(config, name, folder / "runs", folder / "data")[0]


def spawn(run: Run, target: object = child.resume) -> multiprocessing.process.BaseProcess:
    """A process that resumes `run`, forked from one that has only imported what it needs."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.child"])
    process = context.Process(target=target, args=(str(run.path), str(run.path.parents[1] / "data")))
    process.start()
    return process


# SIGKILL.


def kills(folder: Path, trials: int, seed: int) -> Count:
    """Kill a run at random moments, most of them in a save, until it is done; look at it after each; begin another.

    A trial is met as promised if every step that had been there before the kill and need not have made room is there
    and whole, what has a step's name is whole, and, when the run has come to its end, it is the unbroken one bit for
    bit.
    """
    count, dice, in_save = Count(), random.Random(seed), 0
    unbroken = new_run(folder, "unbroken")
    done = spawn(unbroken)
    done.join()
    count.require(done.exitcode == 0, f"the unbroken run ended with {done.exitcode}")
    for number in itertools.count():
        run = new_run(folder, f"killed-{number}")
        while True:
            process, checkpoints = spawn(run), Checkpoints(run.checkpoints)
            before = checkpoints.latest
            while process.is_alive() and checkpoints.latest == before:
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.5))
            if count.tried >= trials:  # enough: this one may end by itself
                process.join()
            newest = checkpoints.latest or 0
            process.kill()
            process.join()
            if process.exitcode == 0:
                difference = compare(unbroken, run).difference
                count.require(difference is None, f"{run.path.name}, at its end: {difference}")
                break
            in_save += any(run.checkpoints.glob(".*.part*"))
            problem = f"ended with {process.exitcode} by itself" if process.exitcode != -9 else wrong(run, newest)
            count.expect(problem is None, f"{run.path.name}, killed after step {newest}: {problem}")
            if count.tried > trials:  # it ended by itself, and would again
                break
        if count.tried >= trials:
            break
    count.notes.append(f"{in_save} in a save; {number + 1} runs to their ends, each equal to the unbroken one")
    return count


def wrong(run: Run, newest: int) -> str | None:
    """What a kill has harmed, None if nothing. `newest` was saved before it."""
    checkpoints = Checkpoints(run.checkpoints)
    if (checkpoints.latest or 0) < newest:
        return f"step {newest} is gone, the newest is {checkpoints.latest}"
    for step in checkpoints.steps:
        try:
            n_bytes = checkpoints.verify(step).about["metrics"]["bytes"]
        except DamagedError as error:
            return str(error)
        if run.metrics_file.stat().st_size < n_bytes:
            return f"lines up to step {step} are missing"
    steps = [line["step"] for line in run.metrics() if "loss" in line]
    return None if steps == list(range(1, len(steps) + 1)) else "a line is missing or there twice"


# Files that change behind the program's back.


def corruptions(folder: Path, trials: int, seed: int) -> Count:
    """Flip a bit of, shorten, or delete a file of a finished run, each file in turn, then at random; see if it is told.

    A checkpoint's harm must be named and the step before it taken; harm to the run's own files must be refused, and
    what was prepared from a text refused or prepared again, to the same bytes.
    """
    count, dice = Count(), random.Random(seed)
    run = new_run(folder, "whole", short(SMALL))
    process = spawn(run)
    process.join()
    count.require(process.exitcode == 0, f"the run ended with {process.exitcode}")
    newest = str(Checkpoints(run.checkpoints).latest)
    data = next((folder / "data").iterdir())
    os.truncate(run.metrics_file, Checkpoints(run.checkpoints).manifest(int(newest)).about["metrics"]["bytes"])
    files = [path for path in sorted((run.checkpoints / newest).rglob("*")) if path.is_file()]
    files += [run.path / name for name in ("config.json", "tokens.json", "metrics.jsonl")]
    files += [data / name for name in ("tokens.json", "tokens-00000.bin")]
    plan = [
        (path, harm)
        for path, harm in itertools.product(files, (flip, shorten, lengthen, delete))
        if (path.name, harm) != ("metrics.jsonl", lengthen)  # what is beyond the last save is dropped, and no harm
    ]
    plan = [*plan, *((dice.choice(files), flip) for _ in range(max(0, trials - len(plan))))]
    for path, harm in plan:
        whole = path.read_bytes()
        harm(path, dice)
        said = told(run, folder / "data", int(newest))
        if path.exists() and path.read_bytes() == whole:
            said = f"{path.name} was made again, the same"  # a prepared corpus, of the text it came from
        count.expect(path.name in said, f"{harm.__name__} of {path.relative_to(folder)}: {said or 'nothing was said'}")
        path.write_bytes(whole)
    count.require(told(run, folder / "data", int(newest)) == "", "a whole run is not found whole")
    return count


def short(config: Config) -> Config:
    train = TrainConfig(**{**vars(config.train), "steps": 20, "eval_every": 10})
    return Config(config.data, config.model, config.optimizer, train)


def told(run: Run, data_dir: Path, newest: int) -> str:
    """What a resume says that is wrong with `run`; it does all but train."""
    from jaxgpt.cli.runs import corpus_of
    from jaxgpt.start import find_newest, require_resumable

    run, said = Run(run.path), []
    aside = run.checkpoints / f"{newest}.damaged"
    try:
        require_resumable(run, run.config, run.config)
        corpus = corpus_of(run, data_dir)
        found = find_newest(
            run, run.config, corpus, Checkpoints(run.checkpoints), lambda event: said.append(event.text)
        )
        back = found is not None and (found.step < newest) == bool(said)
        if aside.exists():
            aside.rename(run.checkpoints / str(newest))
        return "; ".join(said) if back else f"it went on from {found}"
    except (RunError, ValueError) as error:
        return str(error)


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def shorten(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))] if data else b"x")


def lengthen(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def delete(path: Path, dice: random.Random) -> None:
    path.unlink()


# A long run.


def soak(folder: Path, steps: int = 2000, every: int = 20) -> Count:
    """Many steps and saves in one process: its memory and its open files must not grow after the first quarter.

    Memory comes and goes by some 20 MiB (buffers of a save under way, arenas of its threads), so the model is large
    enough for a leak to stand out: half a state a save is more than that, by the medians of the quarters.
    """
    count = Count()
    model = replace(SMALL.model, n_embd=256)
    train = TrainConfig(**{**vars(SMALL.train), "steps": steps, "scan_steps": every, "eval_every": every})
    run = new_run(folder, "soak", Config(SMALL.data, model, SMALL.optimizer, train))
    process, seen = spawn(run), []
    while process.is_alive():
        if sample := resources(process.pid, Checkpoints(run.checkpoints).latest or 0):
            seen.append(sample)
        time.sleep(0.05)
    process.join()
    count.expect(process.exitcode == 0, f"it ended with {process.exitcode}")
    saves = sum(event["event"] == "save" for event in run.events())
    count.expect(saves == steps // every, f"{saves} saves, expected {steps // every}")
    quarters = [[s for s in seen if steps * i // 4 < s[0] <= steps * (i + 1) // 4] for i in range(4)]
    memory = [statistics.median(rss for _, rss, _ in quarter) / 2**20 for quarter in quarters]
    files = [max(n for _, _, n in quarter) for quarter in quarters]
    grown = memory[3] - memory[1]
    leak = n_params(run.config.model) * 12 / 2 * (saves / 2) / 2**20
    told = f"resident memory grew by {grown:.1f} MiB between the second and the last quarter, expected below {leak:.0f}"
    count.expect(grown < leak, told)
    count.expect(files[3] <= files[1] + 2, f"open files by quarter: {files}")
    by_quarter = ", ".join(f"{x:.0f}" for x in memory)
    count.notes.append(f"{steps:,} steps, {saves} saves; MiB by quarter {by_quarter}; open files {files}")
    return count


def resources(pid: int | None, step: int) -> tuple[int, int, int] | None:
    """(step, resident bytes, open files) of a process; None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return None
        raise
