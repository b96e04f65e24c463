"""The built wheel works on its own, in an environment without the checkout and in an empty folder."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZE = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 4"
TRAIN = "--steps 4 --scan-steps 2 --eval-every 4 --eval-batches 0 --warmup-steps 1"
RUN_COMMANDS = """
import sys
from jaxgpt.cli import run_command
for line in sys.argv[1:]:
    if code := run_command(line.split()):
        sys.exit(f"jaxgpt {line} ended with {code}")
"""


def clean_env():
    """The environment variables without those that lead to the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("COV")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The bin folder of a virtual environment with the wheel, and the dependencies but not the jaxgpt of this one."""
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
    site_packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # Python adds this folder to the path, but does not read its .pth files, one of which leads to the checkout.
    Path(site_packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_readme_of_the_wheel_has_absolute_links(environment):
    show = "from importlib.metadata import metadata as m; print(m('jaxgpt')['Project-URL'], m('jaxgpt').get_payload())"
    done = subprocess.run(
        [environment / "python", "-c", show], cwd="/", env=clean_env(), capture_output=True, text=True
    )
    url, readme = done.stdout.removeprefix("Repository, ").split(" ", 1)
    links = re.findall(r"\]\(([^)#]+)", readme)
    ours = [link.partition("/main/")[2] for link in links if link.startswith((f"{url}/raw/main/", f"{url}/blob/main/"))]
    assert all(link.startswith("https://") for link in links)
    assert ours == re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    assert re.findall(r"!\[.*?\]\((.*?)[\w-]+\.png", readme) == [f"{url}/raw/main/docs/images/"]


@pytest.mark.slow
def test_wheel_trains_samples_reports_exports_and_serves(environment, tmp_path, verse):
    pytest.importorskip("vl_convert", reason="a report needs the extra report")

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean_env(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    jaxgpt = environment / "jaxgpt"
    imported = run(environment / "python", "-c", "import jaxgpt; print(jaxgpt.__file__)")
    assert imported.startswith(str(environment.parent)), "the checkout is imported instead of the wheel"
    assert run(jaxgpt, "--version").startswith("jaxgpt 0.")
    lines = (
        f"train shakespeare-cpu --corpus {verse} --run one {SIZE} {TRAIN}",
        "report one",
        "export one --out exported",
    )
    run(environment / "python", "-c", RUN_COMMANDS, *lines)  # in one process, which imports JAX once
    assert run(jaxgpt, "sample", "one", "--prompt", "the ", "--tokens", "5").startswith("the ")
    assert "</html>" in (tmp_path / "runs" / "one" / "report.html").read_text("utf-8")
    assert (tmp_path / "exported" / "model.safetensors").exists()
    pytest.importorskip("uvicorn", reason="the playground needs the extra serve")
    command = [jaxgpt, "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=clean_env(), stdout=subprocess.PIPE, text=True) as server:
        try:
            (address,) = re.findall(r"http://\S+", "".join(server.stdout.readline() for _ in range(2)))
            with urllib.request.urlopen(f"{address.rstrip('/')}/api/runs", timeout=60) as answer:
                assert "one" in answer.read().decode()
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130, -signal.SIGINT)


def test_lock_file_names_the_public_index_and_the_current_dependencies():
    text = (ROOT / "uv.lock").read_text("utf-8")
    assert set(re.findall(r"\w+://[^/\"]*", text)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (locked,) = (each for each in tomllib.loads(text)["package"] if each["name"] == project["name"])
    wanted = [("", each) for each in project["dependencies"]]
    wanted += [
        (f"extra == '{name}'", each) for name, extra in project["optional-dependencies"].items() for each in extra
    ]
    split = [(marker, *re.fullmatch(r"([\w-]+)(?:\[(.*)\])?(.*)", each).groups("")) for marker, each in wanted]
    assert sorted(
        (marker, name.replace("_", "-"), extras, version) for marker, name, extras, version in split
    ) == sorted(
        (each.get("marker", ""), each["name"], ",".join(each.get("extras", [])), each.get("specifier", ""))
        for each in locked["metadata"]["requires-dist"]
    ), "write uv.lock again, as in CONTRIBUTING.md"
