"""Whole programs, from the start of their process to its end, as a person who types them waits for them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgpt.bench import ruler


@dataclass(frozen=True)
class Place:
    """A folder that holds all that a `jaxgpt` process reads and writes: its compile cache, its corpora, its runs."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """Nothing compiled is found but what an earlier process left in this very place."""
        caches = {"XDG_CACHE_HOME": "cache", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        return {name: str(self.folder / below) for name, below in caches.items()}

    def options(self, name: str) -> list[str]:
        """For `jaxgpt train`. Each run has a corpora folder of its own, so that each prepares its text."""
        return ["--run", name, "--runs-dir", str(self.folder / "runs"), "--data-dir", str(self.folder / f"data-{name}")]

    def scores(self, name: str) -> list[float]:
        """The losses over the whole validation split that a run wrote down, the untrained model's first."""
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [line["val_loss"] for line in map(json.loads, lines) if "val_loss" in line]


@dataclass
class Timed:
    """A process that is timed, by time.monotonic() of this one."""

    words: list[str]
    device: str
    env: Mapping[str, str]
    seconds: float = field(default=0.0, init=False)
    output: str = field(default="", init=False)
    others: float | None = field(default=None, init=False)
    """The share of the machine that other programs took meanwhile."""

    def run(self, until: Callable[[], bool] | None = None) -> "Timed":
        """Run it to its end, or, with `until`, until that holds, and end it then.

        Raises:
          WorkerError: it failed, with the last line that it printed.
        """
        before, own = ruler.machine_seconds(), _children_seconds()
        began = time.monotonic()
        words = [word.replace("{began}", repr(began)) for word in self.words]
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=ruler.environment(self.device) | dict(self.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            met = False
            while until and not met and process.poll() is None:
                time.sleep(0.005)
                met = until()
            self.seconds = time.monotonic() - began
            if met:
                process.terminate()
            self.output = process.communicate()[0]
            if not met:
                self.seconds = time.monotonic() - began
        finally:
            process.kill()
            process.wait()
        self.others = ruler.others(before, ruler.machine_seconds(), _children_seconds() - own)
        if not met and (until or process.returncode):
            last = (self.output.strip().splitlines() or [""])[-1]
            raise ruler.WorkerError(f"{' '.join(words)}: exit code {process.returncode}: {last[:300]}")
        return self


def _children_seconds() -> float:
    """The processor's seconds of all processes that were started here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def corpus_options(corpus: str | None) -> list[str]:
    """Names the corpus as an absolute path where it is one."""
    if not corpus:
        return []
    return ["--corpus", os.path.abspath(corpus) if os.path.exists(corpus) else corpus]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
