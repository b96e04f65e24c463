"""The built wheel works by itself: in an environment without the checkout, in an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZE = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 4"
TRAIN = "--steps 4 --scan-steps 2 --eval-every 4 --eval-batches 0 --warmup-steps 1"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel, whose dependencies are those of this one, without its jaxgpt."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode and any(word in built.stderr for word in ("No module named pip", "hatchling")):
        pytest.skip(f"no wheel can be built here, without pip or its build backend: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("jaxgpt-*.whl")

    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # A path alone: the .pth files there, of which one leads to the checkout, are not read.
    Path(own, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.slow
def test_the_wheel_trains_samples_reports_and_exports_in_an_empty_folder(environment, tmp_path, verse):
    pytest.importorskip("vl_convert", reason="a report needs the extra report")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("COV")}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    jaxgpt = environment / "jaxgpt"
    where = run(
        environment / "python", "-c", "import jaxgpt, jaxgpt.serve.cli, jaxgpt.serve.server; print(jaxgpt.__file__)"
    )
    assert where.startswith(str(environment.parent)), "not the checkout"
    assert run(jaxgpt, "--version").startswith("jaxgpt 0.")
    run(jaxgpt, "train", "shakespeare-cpu", "--corpus", verse, "--run", "one", *SIZE.split(), *TRAIN.split())
    assert run(jaxgpt, "sample", "one", "--prompt", "the ", "--tokens", "5").startswith("the ")
    run(jaxgpt, "report", "one")
    assert "</html>" in (tmp_path / "runs" / "one" / "report.html").read_text("utf-8")
    run(jaxgpt, "export", "one", "--out", "exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()
