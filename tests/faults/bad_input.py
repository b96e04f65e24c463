"""Bad command lines, each of which `jaxgpt` must refuse; used by `scripts/faults` and by the tests."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.trials import SMALL, Count, new_run, short, spawn

BAD_SETTINGS = [
    flags.split()
    for flags in (
        "--n-embd 65",
        "--n-embd -64",
        "--n-embd 99999999999999999999",
        "--n-head 0",
        "--n-layer -1",
        "--n-layer 1.5",
        "--n-layer many",
        "--block-size 100000",
        "--block-size 0",
        "--dropout 1",
        "--dropout nan",
        "--dropout -0.1",
        "--learning-rate nan",
        "--learning-rate inf",
        "--learning-rate -1",
        "--beta2 1",
        "--eps 0",
        "--weight-decay nan",
        "--steps 0",
        "--steps -5",
        "--batch-size 0",
        "--batch-size 5 --accumulate 2",
        "--seed -1",
        "--seed 4294967296",
        "--eval-every 7",
        "--warmup-steps 100000",
        "--val-fraction 0",
        "--val-fraction nan",
        "--vocab-size 3",
        "--tokenizer ascii --vocab-size 10",
        "--tokenizer bpe:0",
        "--tokenizer bpe:many",
        "--gelu wrong",
        "--kind rnn",
        "--sampling never",
        "--on-save-error pray",
        "--max-skipped 0",
        "--n-heads 4",
        "--no-such-option",
        "--n-embd 1000000 --n-layer 1000 --n-head 1",
    )
]
BAD_NAMES = ["..", "../up", "a/b", "/tmp/x", ".hidden", "", "a b", "-", "x" * 101, "~", "a\nb"]
BAD_RESUMES = [
    flags.split()
    for flags in (
        "--n-layer 2",
        "--seed 5",
        "--learning-rate 0.5",
        "--tokenizer byte",
        "--corpus file",
        "--batch-size 8",
        "--dropout 0.5",
        "--steps 5",
        "--steps 0",
        "--accumulate 2",
    )
]
BAD_SAMPLES = [
    ["--prompt", ""],
    ["--prompt", "THE CAT Ω"],
    ["--tokens", "-1"],
    ["--temperature", "nan"],
    ["--temperature", "-1"],
    ["--top-k", "-3"],
    ["--samples", "0"],
    ["--seed", "-1"],
    ["--checkpoint", "worst"],
]


def run_in_subprocess(args: list[str], folder: Path) -> tuple[int, str]:
    """Run `jaxgpt *args` in `folder`: the exit code and stderr."""
    command = [sys.executable, "-m", "jaxgpt", *args]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return -1, "still running after a minute"
    return done.returncode, done.stderr


def bad_inputs(folder: Path, call: Callable[[list[str], Path], tuple[int, str]] = run_in_subprocess) -> Count:
    """Run bad command lines: each must exit with 2 and an error without a traceback, and change no file."""
    count = Count()
    run = new_run(folder, "one", short(SMALL))
    process = spawn(run)
    process.join()
    (folder / "file").write_text("x")
    (folder / "latin").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (folder / "empty").write_text("")
    (folder / "bad.jsonl").write_text('{"text": 3}\n')
    (folder / "bad.parquet").write_text("PAR1")
    (folder / "runs" / "link").symlink_to(folder)
    shutil.copytree(run.path, folder / "runs" / "foreign")
    (folder / "runs" / "foreign" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    damaged = next((folder / "data").iterdir())
    shutil.copytree(damaged, folder / "prepared")
    with (folder / "prepared" / "tokens-00000.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    train = ["train", "gpt-demo", "--run", "new", "--corpus", "verse.txt"]
    command_lines = [
        *([*train, *flags] for flags in BAD_SETTINGS),
        *(["train", "gpt-demo", "--corpus", "verse.txt", "--run", name] for name in BAD_NAMES),
        *(["train", "--resume", "--run", name] for name in [*BAD_NAMES, "link", "foreign", "nothing"]),
        *(["train", "--resume", "--run", "one", *flags] for flags in BAD_RESUMES),
        *(["sample", "one", *flags] for flags in BAD_SAMPLES),
        *([command, name] for command in ("sample", "eval") for name in ("nothing", "foreign", "../one", "file", "")),
        *(["prepare", name] for name in ("nothing", "empty", "latin", "bad.jsonl", "bad.parquet", "/proc/self/mem")),
        ["prepare", "verse.txt", "--tokenizer", "nonsense"],
        ["prepare", "verse.txt", "--tokenizer", "prepared/tokens-00000.bin"],
        ["prepare", "verse.txt", "--data-dir", "file/x"],
        ["prepare", "verse.txt", "--data-dir", "/proc/x"],
        ["train", "gpt-demo", "--run", "new", "--corpus", "prepared"],
        [*train, "--runs-dir", "file/x"],
        [*train, "--runs-dir", "/proc/x"],
        [*train, "--data-dir", "/proc/x"],
        ["train", "gpt-dmo"],
        ["trian"],
        ["eval", "one", "--eval-batches", "-1"],
        ["export", "one", "--out", "file"],
        ["export", "nothing", "--out", "out"],
        ["import-gpt2", "runs", "--run", "new"],
        ["import-gpt2", "nothing at all", "--run", "new"],
        ["verify-resume", "gpt-dmo"],
    ]
    before = modification_times(folder)
    for args in command_lines:
        code, output = call(args, folder)
        changed = sorted(modification_times(folder).items() ^ before.items())
        clean = code == 2 and "Traceback" not in output and output.strip() and not changed
        changes = f", changed {changed[:3]}" if changed else ""
        count.expect(bool(clean), f"jaxgpt {' '.join(args)}: exit code {code}{changes}\n{output[-600:]}")
    return count


def modification_times(folder: Path) -> dict[str, float]:
    """Every file below `folder`, except locks, and when it was changed."""
    return {
        str(path): path.lstat().st_mtime_ns
        for path in folder.rglob("*")
        if not path.is_dir() and path.name not in (".lock",)
    }
