"""The strictest settings for every test: several devices, no silent rank promotion, warnings as errors."""

import dataclasses
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import jax  # noqa: E402 (after its environment)
import jaxlib.version  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jax._src import compiler  # noqa: E402 (compiler options for all programs that a test compiles, which JAX has no name for)

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402

QUICK: dict[str, Any] = {"xla_cpu_parallel_codegen_split_count": 1, "xla_backend_optimization_level": 0}
"""Options with which XLA compiles in half the time what is not optimized."""
if jaxlib.version.__version_info__ < (0, 11):  # newer ones have no other
    QUICK["xla_cpu_use_fusion_emitters"] = False
HASTY = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in QUICK.items()),
}
"""The same for processes."""
PLAIN_OPTIONS = compiler.get_compile_options

UNCOUNTED = ["activations", "architecture", "attention", "benchmarks", "bigram_limit", "browser", "cache"]
UNCOUNTED += ["checkpoint", "contest", "curvature", "docs", "evaluation", "generate", "goldens", "gpt2", "gradients"]
UNCOUNTED += ["landscape", "matmul", "memory", "mesh", "model", "model_options", "muon", "notebooks", "optimizer"]
UNCOUNTED += ["page", "program", "readme", "recovery", "start", "step", "torch_parity", "train", "twin", "write"]
"""Modules of tests whose lines of jaxgpt others run too. Python is a third slower where coverage counts lines."""

HOSTILE = "</script><script>alert('x')</script><b>\"&amp;"
"""Text that changes a page which takes it for markup."""

settings.register_profile("jaxgpt", deadline=None, max_examples=50)
settings.load_profile("jaxgpt")


def pytest_configure(config: pytest.Config) -> None:
    assert jax.device_count() == 8, "the tests ask for 8 CPU devices"
    if hasattr(config, "workerinput"):
        # A process takes a third longer where its lines are counted; those lines are run in the workers too.
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    # A suite in the background of a shell, or under nohup, is born deaf to these, and so would be what it starts.
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, so that no worker ends with one while the others have nothing left. In each
    module, what is optimized comes first: else programs would be compiled again at each change."""
    modules = {item.path: i for i, item in enumerate(reversed(items))}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -modules[item.path], not _as_a_user(item)))
    gc.freeze()  # a million objects of modules, which no collection needs to look at again
    gc.set_threshold(100_000)  # collections took 8% of the processor time


def _as_a_user(item: pytest.Item) -> bool:
    return item.get_closest_marker("optimized") is not None or item.config.option.markexpr == "smoke"


def quick_options(*args: Any, **kwargs: Any) -> Any:
    options = PLAIN_OPTIONS(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *QUICK.items()]
    return options


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a module, which compile most
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hundreds of small programs run once each: what LLVM would win in running them, it loses in compiling them. Tests
    marked optimized compile as a user's do, and so do smoke tests that run alone, and the processes of a test that asks
    for `as_a_user`."""
    as_a_user = _as_a_user(item)
    if jax.config.values["jax_disable_most_optimizations"] == as_a_user:
        jax.clear_caches()  # of what was compiled the other way
        jax.config.update("jax_disable_most_optimizations", not as_a_user)
    compiler.get_compile_options = PLAIN_OPTIONS if as_a_user else quick_options
    for name, value in HASTY.items():
        os.environ.pop(name, None)
        if not as_a_user:
            os.environ[name] = value


@pytest.fixture(autouse=True, scope="module")
def forget() -> Iterator[None]:
    """Let go of the programs of a module after it: together they would fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def uncounted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Counts no lines in UNCOUNTED modules."""
    if request.path.stem.removeprefix("test_") not in UNCOUNTED or not hasattr(request.config, "workerinput"):
        yield
        return
    here, threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    yield
    sys.settrace(here)
    threading.settrace(threads)


@pytest.fixture
def set_flags() -> Iterator[Callable[..., None]]:
    """set_flags(jax_enable_x64=True): flags of JAX for all threads, as its environment variables set them, until the
    test ends. What was compiled before is forgotten."""
    before = dict(jax.config.values)
    changed: set[str] = set()

    def change(**flags: Any) -> None:
        changed.update(flags)
        for name, value in flags.items():
            jax.config.update(name, value)
        jax.clear_caches()

    yield change
    change(**{name: before[name] for name in changed})


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that this test starts optimize what they compile: it is about their bits."""
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """A GPT that compiles in a second, on 13 ids, with everything on: dropout, biases, an untied head."""
    return Config(
        data=DataConfig(corpus="text.txt"),
        model=ModelConfig(
            vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1, bias=True, tie_weights=False
        ),
        optimizer=OptimizerConfig(warmup_steps=2, decay_steps=20),  # a run of another length is the same program
        train=TrainConfig(steps=20, batch_size=4, scan_steps=5, eval_every=10, eval_batches=2),
    )


@pytest.fixture
def tiny(tiny_config: Config) -> Config:
    return tiny_config


@pytest.fixture
def change() -> Callable[..., Config]:
    """change(config, n_layer=3, steps=5): a config with fields of any section replaced."""

    def changed(config: Config, **values: object) -> Config:
        sections = {}
        for section in dataclasses.fields(config):
            old = getattr(config, section.name)
            names = {field.name for field in dataclasses.fields(old)} & values.keys()
            sections[section.name] = dataclasses.replace(old, **{name: values.pop(name) for name in names})
        assert not values, f"no such fields: {values}"
        return Config(**sections)

    return changed


@pytest.fixture(scope="session")
def verse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text of 11 different characters, which no test changes. Its name is in the config; where that is equal, a
    module compiles a program once."""
    path = tmp_path_factory.mktemp("verse") / "text.txt"
    path.write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of 20 steps, and the folder of its tokens; its text contains HOSTILE."""
    from jaxgpt.cli.runs import start
    from jaxgpt.train import fit

    folder = tmp_path_factory.mktemp("report")
    text = folder / "text.txt"
    text.write_text(f"the cat sat on the mat\n{HOSTILE}\n" * 40)
    config = Config(
        data=DataConfig(corpus=str(text)),
        model=ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=16),
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
        train=TrainConfig(steps=20, batch_size=4, scan_steps=5, eval_every=10, eval_batches=0),
    )
    run, corpus = start(config, "hostile", folder / "runs", folder / "data")
    fit(run, corpus)
    return run, folder / "data"


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """Tiny Shakespeare, where a copy is given."""
    given = os.environ.get("JAXGPT_DATA")
    if not given:
        pytest.skip("needs Tiny Shakespeare: set JAXGPT_DATA to its file, or to the folder that holds it")
    path = Path(given)
    return path / "tinyshakespeare.txt" if path.is_dir() else path


@pytest.fixture
def jaxgpt(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `jaxgpt ARGS` as a process of its own, in tmp_path."""

    def run(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jaxgpt", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=300,
            **{"cwd": tmp_path, **kwargs},
        )

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts here, apt-get install chromium brings one: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
