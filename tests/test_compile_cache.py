"""JAX's compile cache in the user's cache folder: private, bounded, optional."""

import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt.cli.compile_cache import private_cache, prune, use_compile_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder. JAX's settings are restored at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    yield tmp_path / "jaxgpt"
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_cache_is_private(cache):
    use_compile_cache()
    (folder,) = cache.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_folder_writable_by_others_and_symlink_are_not_used(cache, capsys):
    use_compile_cache()
    (folder,) = cache.iterdir()
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o770)
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "others may write to it, or own it: chmod 700 it" in capsys.readouterr().err
    folder.rmdir()
    (cache / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(cache / "elsewhere")
    with pytest.raises(PermissionError):
        private_cache(folder.name)


def test_failure_to_create_the_cache_is_only_a_warning(cache, capsys):
    cache.write_text("a file where the folder should be")
    before = jax.config.jax_compilation_cache_dir
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert "are not kept" in capsys.readouterr().err


@pytest.fixture
def no_home(monkeypatch):
    """A user without $HOME and without an entry in the password database, as in a container."""
    pwd = pytest.importorskip("pwd", reason="user ids need POSIX")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.getpwnam("no-such-user"))


@pytest.mark.parametrize("xdg_cache_home", [None, ""])
def test_without_a_home_folder_nothing_is_cached(no_home, tmp_path, monkeypatch, capsys, cache, xdg_cache_home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if xdg_cache_home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg_cache_home)
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert capsys.readouterr().err == ("jaxgpt: compiled programs are not kept: no home folder; set XDG_CACHE_HOME\n")
    assert list(tmp_path.iterdir()) == []


def test_empty_xdg_cache_home_counts_as_unset(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(cache.parent))
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir.startswith(str(cache.parent / ".cache" / "jaxgpt"))


def test_jax_compilation_cache_dir_takes_precedence(cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/named")
    use_compile_cache()
    assert not cache.exists()


def test_least_recently_used_programs_are_deleted(cache, monkeypatch):
    use_compile_cache()
    (folder,) = cache.iterdir()
    other = cache / "compiled-of-another-processor"
    tuned = folder / "xla_gpu_per_fusion_autotune_cache_dir"
    for each in (other, tuned):
        each.mkdir()
    (cache / "gpt2").write_bytes(b"x" * 1000)  # a download, not a program
    paths = [folder / f"jit_{i}-cache" for i in range(3)] + [
        other / "jit_3-cache",
        tuned / "fusion",
        folder / "jit_5-cache",
    ]
    for i, path in enumerate(paths):
        path.write_bytes(b"x" * 100)
        os.utime(path, (i, i))
    os.utime(paths[0], (9, 0))  # the oldest was read last
    monkeypatch.setattr("jaxgpt.cli.compile_cache.MAX_BYTES", 300)
    use_compile_cache()
    assert [path.exists() for path in paths] == [True, False, False, False, True, True]
    assert (cache / "gpt2").exists()


def test_concurrent_pruning(cache):
    folder = cache / "compiled-x"
    folder.mkdir(parents=True)
    for i in range(500):
        (folder / f"jit_{i}-cache").write_bytes(b"x" * 10)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(prune, cache, 1000) for _ in range(4)]:
            done.result()
    assert len(list(folder.iterdir())) <= 100


def test_processors_with_other_features_do_not_share_programs(cache, monkeypatch):
    for flags in ("avx2", "avx2 avx512f", "avx2"):
        monkeypatch.setattr("jaxgpt.cli.compile_cache.cpu_info", lambda flags=flags: f"cpu MHz: 2\nflags\t: {flags}\n")
        use_compile_cache()
    assert len(list(cache.iterdir())) == 2


def test_a_folder_of_another_user_is_not_used(cache, monkeypatch):
    assert private_cache("mine") == cache / "mine"
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(PermissionError):
        private_cache("mine")


def test_truncated_entry_is_written_again(cache):
    """A full disk cuts entries off. JAX itself would keep them, and warn at every start."""
    function = jax.jit(lambda x: x + 1)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        use_compile_cache()
        compilation_cache.reset_cache()
        try:
            function(1.0)
            (entry,) = (path for path in cache.glob("*/*") if "lambda" in path.name)
            whole = entry.read_bytes()
            entry.write_bytes(whole[: len(whole) // 2])
            jax.clear_caches()
            function(1.0)
            assert len(shown) == 1
            assert len(entry.read_bytes()) > len(whole) // 2
        finally:
            compilation_cache.reset_cache()
