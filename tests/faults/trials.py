"""Kill and damage real runs, and count how many faults are handled; used by `scripts/faults` and the tests."""

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
from jaxgpt.cli.runs import start_run
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.monitor.cost import n_params
from jaxgpt.run import Run, RunError
from jaxgpt.verify.resume import compare
from tests.faults import child

ROOT = Path(__file__).parents[2]

SMALL = Config(
    data=DataConfig(corpus="verse.txt"),
    model=ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1),
    optimizer=OptimizerConfig(warmup_steps=2, decay_steps=200),  # then runs of other lengths use the same program
    train=TrainConfig(steps=100, batch_size=4, scan_steps=5, eval_every=5, eval_batches=2),
)
"""Saves every five steps, which take less time than a save, so that a save is nearly always in progress."""


@dataclass
class Count:
    """The number of faults tried, the number handled as promised, failures and notes."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    good: int = 0

    def expect(self, ok: bool, failure: str) -> None:
        """Count a fault, which was handled as promised if `ok`."""
        self.tried += 1
        self.good += ok
        self.require(ok, failure)

    def require(self, ok: bool, failure: str) -> None:
        """Note a failure unless `ok`, without counting a fault."""
        if not ok:
            self.failures.append(failure)


def new_run(folder: Path, name: str, config: Config = SMALL) -> Run:
    """Create a run on a small text in `folder`, without training it."""
    verse = folder / "verse.txt"
    if not verse.exists():
        folder.mkdir(parents=True, exist_ok=True)
        verse.write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    config = Config(DataConfig(corpus=str(verse)), config.model, config.optimizer, config.train)
    return start_run(config, name, folder / "runs", folder / "data")[0]


def spawn(run: Run, target: object = child.resume) -> multiprocessing.process.BaseProcess:
    """Start a process that resumes `run`, forked from a server that has imported the package."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *paths]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.child"])
    process = context.Process(target=target, args=(str(run.path), str(run.path.parents[1] / "data")))
    process.start()
    return process


# SIGKILL.


def kills(folder: Path, trials: int, seed: int) -> Count:
    """Kill runs at random moments, mostly during a save, and check and resume them after each kill until they finish.

    A trial passes if the newest saved step is not lost, every checkpoint verifies, and no line of metrics is missing. A
    finished run must equal an uninterrupted run bit for bit.
    """
    count, rng, in_save, equal = Count(), random.Random(seed), 0, 0
    uninterrupted = new_run(folder, "uninterrupted")
    done = spawn(uninterrupted)
    done.join()
    count.require(done.exitcode == 0, f"the uninterrupted run exited with {done.exitcode}")
    for number in itertools.count():
        run = new_run(folder, f"killed-{number}")
        while True:
            process, checkpoints = spawn(run), Checkpoints(run.checkpoints)
            before = checkpoints.latest
            while process.is_alive() and checkpoints.latest == before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            if count.tried >= trials:  # enough kills: let this run finish
                process.join()
            newest = checkpoints.latest or 0
            process.kill()
            process.join()
            if process.exitcode == 0:
                difference = compare(uninterrupted, run).difference
                count.require(difference is None, f"{run.path.name}, finished: {difference}")
                equal += difference is None
                break
            in_save += any(run.checkpoints.glob(".*.part*"))
            problem = f"exited with {process.exitcode}" if process.exitcode != -9 else find_damage(run, newest)
            count.expect(problem is None, f"{run.path.name}, killed after step {newest}: {problem}")
            if count.tried > trials:  # it exited with an error, and would again
                break
        if count.tried >= trials:
            break
    count.notes.append(f"{in_save} during a save; {equal} of {number + 1} runs ended equal to the uninterrupted run")
    return count


def find_damage(run: Run, newest: int) -> str | None:
    """The damage that a kill did to `run`, None if there is none; step `newest` was saved before the kill."""
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
    return None if steps == list(range(1, len(steps) + 1)) else "a line is missing or duplicated"


# Damaged files.


def corruptions(folder: Path, trials: int, seed: int) -> Count:
    """Damage the files of a finished run, each in every way, then flip random bits; count how often it is detected.

    A damaged checkpoint must be named, and the step before it restored. Damaged files of the run must be refused. A
    damaged corpus must be refused or prepared again, with the same bytes.
    """
    count, rng = Count(), random.Random(seed)
    run = new_run(folder, "whole", short(SMALL))
    process = spawn(run)
    process.join()
    count.require(process.exitcode == 0, f"the run exited with {process.exitcode}")
    newest = str(Checkpoints(run.checkpoints).latest)
    data = next((folder / "data").iterdir())
    os.truncate(run.metrics_file, Checkpoints(run.checkpoints).manifest(int(newest)).about["metrics"]["bytes"])
    files = [path for path in sorted((run.checkpoints / newest).rglob("*")) if path.is_file()]
    files += [run.path / name for name in ("config.json", "tokens.json", "metrics.jsonl")]
    files += [data / name for name in ("tokens.json", "tokens-00000.bin")]
    plan = [
        (path, damage)
        for path, damage in itertools.product(files, (flip, shorten, lengthen, delete))
        if (path.name, damage) != ("metrics.jsonl", lengthen)  # a resume drops lines after the last save
    ]
    plan = [*plan, *((rng.choice(files), flip) for _ in range(max(0, trials - len(plan))))]
    for path, damage in plan:
        whole = path.read_bytes()
        damage(path, rng)
        report = report_of_resume(run, folder / "data", int(newest))
        if path.exists() and path.read_bytes() == whole:
            report = f"{path.name} was prepared again from the text, with the same bytes"
        count.expect(path.name in report, f"{damage.__name__} {path.relative_to(folder)}: {report or 'not detected'}")
        path.write_bytes(whole)
    count.require(report_of_resume(run, folder / "data", int(newest)) == "", "an undamaged run is reported as damaged")
    return count


def short(config: Config) -> Config:
    """`config` with 20 steps and two saves."""
    train = TrainConfig(**{**vars(config.train), "steps": 20, "eval_every": 10})
    return Config(config.data, config.model, config.optimizer, train)


def report_of_resume(run: Run, data_dir: Path, newest: int) -> str:
    """The warnings or the error of a resume that does all but train; empty if it reports nothing."""
    from jaxgpt.cli.runs import corpus_of
    from jaxgpt.start import find_newest, require_resumable

    run, warnings = Run(run.path), []
    aside = run.checkpoints / f"{newest}.damaged"
    try:
        require_resumable(run, run.config, run.config)
        corpus_of(run, data_dir)
        found = find_newest(run, run.config, Checkpoints(run.checkpoints), lambda event: warnings.append(event.text))
        expected = found is not None and (found.step < newest) == bool(warnings)
        if aside.exists():
            aside.rename(run.checkpoints / str(newest))
        return "; ".join(warnings) if expected else f"resumed from {found}"
    except (RunError, ValueError) as error:
        return str(error)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def shorten(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if data else b"x")


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


# A long run.


def soak(folder: Path, steps: int = 2000, every: int = 20) -> Count:
    """Many steps and saves in one process: memory and open files must not grow after the first quarter.

    Memory varies by some 20 MiB (buffers of the current save, arenas of its threads). The model is so large that a leak
    of half a state per save is more than that, in the medians of the quarters.
    """
    count = Count()
    model = replace(SMALL.model, n_embd=256)
    train = TrainConfig(**{**vars(SMALL.train), "steps": steps, "scan_steps": every, "eval_every": every})
    run = new_run(folder, "soak", Config(SMALL.data, model, SMALL.optimizer, train))
    process, seen = spawn(run), []
    while process.is_alive():
        if sample := resources(process.pid, Checkpoints(run.checkpoints).latest or 0):
            seen.append(sample)
        time.sleep(0.005)  # else it may miss the files of a save
    process.join()
    count.expect(process.exitcode == 0, f"the run exited with {process.exitcode}")
    saves = sum(event["event"] == "save" for event in run.events())
    count.expect(saves == steps // every, f"{saves} saves, expected {steps // every}")
    quarters = [[s for s in seen if steps * i // 4 < s[0] <= steps * (i + 1) // 4] for i in range(4)]
    memory = [statistics.median(rss for _, rss, _ in quarter) / 2**20 for quarter in quarters]
    files = [max(n for _, _, n in quarter) for quarter in quarters]
    grown = memory[3] - memory[1]
    leak = n_params(run.config.model) * 12 / 2 * (saves / 2) / 2**20
    failure = f"resident memory grew by {grown:.1f} MiB from the second to the last quarter, expected below {leak:.0f}"
    count.expect(grown < leak, failure)
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
