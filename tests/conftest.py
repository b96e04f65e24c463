"""Settings and fixtures of all tests: eight CPU devices, no implicit rank promotion, fast compilation."""

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
os.environ["PJRT_NPROC"] = "1"  # threads of XLA that wait for each other cost the other workers 6% of the suite's time
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import jax  # noqa: E402 (reads the environment)
import jaxlib.version  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jax._src import compiler  # noqa: E402 (JAX has no public way to set compiler options for every program)

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402

QUICK: dict[str, Any] = {"xla_cpu_parallel_codegen_split_count": 1, "xla_backend_optimization_level": 0}
"""XLA options that halve the compile time of unoptimized programs."""
if jaxlib.version.__version_info__ < (0, 11):  # newer versions always use the fusion emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False
QUICK_ENV = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in QUICK.items()),
    "PJRT_NPROC": "1",
}
"""Environment variables that give subprocesses the same quick compilation, and one thread."""
DEFAULT_OPTIONS = compiler.get_compile_options

NO_COVERAGE = ["activations", "architecture", "attention", "benchmarks", "bigram_limit", "browser", "cache"]
NO_COVERAGE += ["checkpoint", "contest", "curvature", "docs", "evaluation", "generate", "goldens", "gpt2", "gradients"]
NO_COVERAGE += ["landscape", "matmul", "memory", "mesh", "model", "model_options", "muon", "notebooks", "optimizer"]
NO_COVERAGE += ["page", "program", "programs", "readme", "recovery", "scripts", "start", "step", "torch_parity"]
NO_COVERAGE += ["train", "twin", "write"]
"""Test modules that run without coverage, which slows Python by a third. Other modules cover their lines of jaxgpt."""

HOSTILE = "</script><script>alert('x')</script><b>\"&amp;"
"""Text that changes an HTML page if it is not escaped."""

settings.register_profile("jaxgpt", deadline=None, max_examples=50)
settings.load_profile("jaxgpt")


def pytest_configure(config: pytest.Config) -> None:
    assert jax.device_count() == 8, "the tests need 8 CPU devices"
    if hasattr(config, "workerinput"):
        # Coverage slows subprocesses by a third; the workers cover the same lines.
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    # A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. Subprocesses would inherit that.
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run modules with slow tests first, so that the workers finish at about the same time, and within a module the
    optimized tests first: each change between optimized and quick compilation clears the caches."""
    modules = {item.path: i for i, item in enumerate(reversed(items))}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -modules[item.path], not _is_optimized(item)))
    gc.freeze()  # a million objects of imported modules, which collections need not scan again
    gc.set_threshold(100_000)  # by default, collections take 8% of the processor time


def _is_optimized(item: pytest.Item) -> bool:
    return item.get_closest_marker("optimized") is not None or item.config.option.markexpr == "smoke"


def quick_options(*args: Any, **kwargs: Any) -> Any:
    options = DEFAULT_OPTIONS(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *QUICK.items()]
    return options


@pytest.hookimpl(tryfirst=True)  # before module fixtures, which compile most programs
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile quickly: most programs are small and run once, so optimizing them takes longer than it saves. Tests
    marked `optimized`, and smoke tests when only they are selected, compile with the default options. Subprocesses
    compile quickly too, in one thread, except in tests that use the fixture `optimized_subprocesses`."""
    optimized = _is_optimized(item)
    if jax.config.values["jax_disable_most_optimizations"] == optimized:
        jax.clear_caches()  # programs compiled with the other options
        jax.config.update("jax_disable_most_optimizations", not optimized)
    compiler.get_compile_options = DEFAULT_OPTIONS if optimized else quick_options
    for name, value in QUICK_ENV.items():
        os.environ.pop(name, None)
        if not optimized:
            os.environ[name] = value


@pytest.fixture(autouse=True, scope="module")
def clear_caches() -> Iterator[None]:
    """Free the compiled programs of each module: together they would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def without_coverage(request: pytest.FixtureRequest) -> Iterator[None]:
    """Stop coverage in the modules of NO_COVERAGE."""
    if request.path.stem.removeprefix("test_") not in NO_COVERAGE or not hasattr(request.config, "workerinput"):
        yield
        return
    trace, thread_trace = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    yield
    sys.settrace(trace)
    threading.settrace(thread_trace)


@pytest.fixture
def set_flags() -> Iterator[Callable[..., None]]:
    """set_flags(jax_enable_x64=True): set JAX flags for all threads, as environment variables do, until the test ends.
    Each call clears the compiled programs."""
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
def load(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The load averages of the machine so far: the last one is the current one."""
    found = [0.5]
    monkeypatch.setattr(os, "getloadavg", lambda: (found[-1], 0.0, 0.0), raising=False)
    return found


@pytest.fixture
def optimized_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subprocesses of this test compile with the default options and use all cores, as those of a user do."""
    for name in QUICK_ENV:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """A GPT that compiles in a second, on 13 ids, with everything on: dropout, biases, an untied head."""
    return Config(
        data=DataConfig(corpus="text.txt"),
        model=ModelConfig(
            vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1, bias=True, tie_weights=False
        ),
        optimizer=OptimizerConfig(warmup_steps=2, decay_steps=20),  # then runs of other lengths use the same program
        train=TrainConfig(steps=20, batch_size=4, scan_steps=5, eval_every=10, eval_batches=2),
    )


@pytest.fixture
def tiny(tiny_config: Config) -> Config:
    return tiny_config


@pytest.fixture
def change() -> Callable[..., Config]:
    """change(config, n_layer=3, steps=5): a copy of a config with fields of any section replaced."""

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
    """A small text of 11 different characters, which no test changes. All tests share its path, so that their configs
    are equal and a module compiles each program once."""
    path = tmp_path_factory.mktemp("verse") / "text.txt"
    path.write_text("the cat sat on the mat\nthat cat has a hat\n" * 20)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(run, data folder): a finished run of 20 steps on a text that contains HOSTILE."""
    from jaxgpt.cli.runs import start_run
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
    run, corpus = start_run(config, "hostile", folder / "runs", folder / "data")
    fit(run, corpus)
    return run, folder / "data"


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """The path of Tiny Shakespeare; skips the test if JAXGPT_DATA is not set."""
    given = os.environ.get("JAXGPT_DATA")
    if not given:
        pytest.skip("needs Tiny Shakespeare: set JAXGPT_DATA to its file, or to the folder that holds it")
    path = Path(given)
    return path / "tinyshakespeare.txt" if path.is_dir() else path


@pytest.fixture
def jaxgpt(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """jaxgpt(*args): run the command line in a subprocess, in tmp_path."""

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
    """A headless Chromium; skips the test if none is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"needs Chromium, apt-get install chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
