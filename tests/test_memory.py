import dataclasses
import os
import re
import types

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.cli import memory
from jaxgpt.config import ModelConfig, UsageError, check
from jaxgpt.sharding import Sizes, make_mesh, one_device
from jaxgpt.step import abstract_state, init_state, jit_train_steps

N_TOKENS = 500


def lowered(config, mesh):
    tokens, starts = jnp.zeros(N_TOKENS, jnp.uint16), jnp.zeros((2, config.train.batch_size), jnp.int32)
    return jit_train_steps(config, mesh).lower(abstract_state(config, mesh), tokens, starts)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"dropout": 0.0, "batch_size": 16},
        {"accumulate": 2},
        {"kind": "bigram", "vocab_size": 65, "block_size": 64, "batch_size": 16, "accumulate": 1},
        {"kind": "bigram", "vocab_size": 512},
        {"n_layer": 1, "n_embd": 128, "batch_size": 1, "dropout": 0.0},
        {"n_layer": 1, "block_size": 128, "batch_size": 4},
        {"n_layer": 1, "vocab_size": 4096, "tie_weights": True},
        {"n_layer": 24, "n_head": 2, "block_size": 128, "remat": "matmuls", "scan_layers": True},
    ],
    ids=str,
)
def test_estimate_is_a_close_lower_bound(tiny, change, shape):
    config = change(tiny, **shape)
    arguments, further = memory.compiled_bytes(lowered(config, one_device()).compile())
    assert 1.0 <= (arguments + further) / memory.needed(config, N_TOKENS).total <= 2.2


@pytest.mark.parametrize("text", ["data=2,tensor=4", "data=2,context=4"])
def test_estimate_per_device_of_a_mesh_is_a_lower_bound(tiny, change, text):
    """Even if each data shard has a single sequence, which the other axis shards."""
    sizes = dict(vocab_size=16, block_size=64, n_layer=8, n_head=4, n_kv_head=4, n_embd=32, batch_size=2)
    config, mesh = change(tiny, **sizes, scan_layers=True), make_mesh(Sizes.parse(text))
    with jax.set_mesh(mesh):
        arguments, further = memory.compiled_bytes(lowered(config, mesh).compile())
    assert 1.0 <= (arguments + further) / memory.needed(config, N_TOKENS, Sizes(**mesh.shape)).total <= 2.5


@pytest.mark.parametrize(("vocab_size", "n_bytes"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_are_as_wide_as_the_largest_id(tiny, change, vocab_size, n_bytes):
    assert memory.needed(change(tiny, vocab_size=vocab_size), N_TOKENS).tokens == n_bytes * N_TOKENS


def test_muon_has_one_moment_for_each_kernel_of_a_block(tiny, change):
    config = change(tiny, algorithm="muon", n_layer=2)
    state = jax.eval_shape(init_state, config)
    found = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert memory.n_moments(config) == found
    bigram = change(config, kind="bigram")
    assert memory.n_moments(bigram) == sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(init_state, bigram).opt_state) if x.ndim
    )


def test_bytes_of_the_state_are_exact(tiny):
    state, counted = jax.eval_shape(init_state, tiny), memory.needed(tiny, N_TOKENS)
    n_bytes = [sum(4 * leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state)]
    assert [counted.parameters, counted.optimizer_state + 4] == n_bytes  # 4 bytes: the step count of Adam
    assert counted.tokens == 2 * N_TOKENS


def test_gradients_add_to_activations_only_with_micro_batches(tiny, change):
    one, two = memory.needed(tiny, 0), memory.needed(change(tiny, accumulate=2), 0)
    assert one.total == 3 * one.parameters + max(one.parameters, one.activations)
    assert two.total == 4 * two.parameters + two.activations
    assert two.activations == one.activations // 2


def require(config, free, sizes=memory.ONE_DEVICE, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available", lambda: free)
        memory.require(config, N_TOKENS, sizes, **kwargs)


def refusal(config, free, *args, **kwargs):
    """The message with which `memory.require` refuses."""
    with pytest.raises(memory.OutOfMemoryError) as caught:
        require(config, free, *args, **kwargs)
    assert isinstance(caught.value, UsageError)
    return str(caught.value)


def test_exact_fit_is_accepted(tiny):
    total = memory.needed(tiny, 0).total  # on a CPU, the corpus is memory-mapped
    require(tiny, total)
    refusal(tiny, total - 1)


def test_refusal_states_the_numbers(tiny, change):
    message = refusal(change(tiny, n_layer=24, n_embd=2048, n_head=16, block_size=1024), 22_100_000_000)
    assert message.startswith("a training step needs at least 27.5 GB: parameters 4.8 GB, optimizer state 9.7 GB")
    assert "activations 13.0 GB or, after them, gradients 4.8 GB, tokens 0 bytes; 22.1 GB are free: try " in message


@pytest.mark.parametrize(
    ("shape", "changed", "expected"),
    [
        ({"batch_size": 12}, {"accumulate": 3}, "--accumulate 3"),
        ({"batch_size": 12, "accumulate": 2}, {"accumulate": 6}, "--accumulate 6"),
        ({"batch_size": 13}, {"accumulate": 13}, "--accumulate 13"),
    ],
)
def test_refusal_suggests_the_fewest_micro_batches(tiny, change, shape, changed, expected):
    config = change(tiny, **shape)
    free = memory.needed(change(config, **changed), 0).total
    message = refusal(config, free)
    assert message.endswith(expected)
    options = re.findall(r"--([a-z-]+) (\d+)", message)
    suggested = check(change(config, **{name.replace("-", "_"): int(value) for name, value in options}))
    require(suggested, free)


def test_suggested_micro_batches_are_divisible_among_the_shards_of_a_batch(tiny, change):
    config, sizes = change(tiny, batch_size=36), Sizes(data=4)
    halved = memory.needed(change(config, accumulate=2), 0, sizes).total  # 18 sequences on 4 devices
    assert refusal(config, 4 * halved, sizes).endswith("--accumulate 3")


def test_the_devices_of_a_cpu_share_its_memory(tiny):
    sizes = Sizes(fsdp=2, context=2)
    total, each = memory.needed(tiny, 0).total, memory.needed(tiny, 0, sizes).total
    for needed, how in ((4 * total, {"copies": 4}), (4 * each, {"sizes": sizes})):
        require(tiny, needed, **how)
        assert "are free for all 4 devices" in refusal(tiny, needed - 1, **how)


def test_suggested_micro_batches_fit_on_all_devices_that_share_a_memory(tiny, change):
    config = change(tiny, batch_size=12)
    free = 4 * memory.needed(change(config, accumulate=3), 0).total
    assert refusal(config, free, copies=4).endswith("--accumulate 3")


def test_refusal_if_no_number_of_micro_batches_fits(tiny):
    assert refusal(tiny, 100).endswith("try a smaller --batch-size, --block-size or model (--n-embd, --n-layer)")
    assert refusal(tiny, 100, new=False).endswith(memory.ELSEWHERE)


def test_accelerators_count_tokens_and_only_matmul_results(tiny, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lean = memory.needed(tiny, N_TOKENS, recomputed=True)
    assert lean.total < memory.needed(tiny, N_TOKENS).total
    require(tiny, lean.total)
    require(tiny, lean.total, copies=4)  # each has its own memory
    refusal(tiny, lean.total - 1)


def test_shards_of_a_mesh(tiny, change):
    config = change(tiny, batch_size=32)
    one, eighth = memory.needed(config, N_TOKENS), memory.needed(change(config, batch_size=4), N_TOKENS)
    for sizes, state, whole in (
        (Sizes(data=2, fsdp=2, context=2), 2, memory.needed(change(config, batch_size=8), 0).activations // 2),
        (Sizes(fsdp=2, tensor=4), 8, memory.needed(change(config, batch_size=16), 0).activations // 4),
        (Sizes(data=8), 1, eighth.activations),
    ):
        found = memory.needed(config, N_TOKENS, sizes)
        state_bytes = (one.parameters // state, one.optimizer_state // state, one.tokens)
        assert (found.parameters, found.optimizer_state, found.tokens) == state_bytes
        assert found.activations == whole


def test_a_corpus_too_large_for_a_device_counts_by_the_windows_of_a_chunk(tiny, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    n_tokens = memory.DEVICE_TOKENS + 1
    chunk = tiny.train.scan_steps * tiny.train.batch_size * (tiny.model.block_size + 1)
    total = memory.needed(tiny, chunk, recomputed=True).total
    monkeypatch.setattr(memory, "available", lambda: total)
    memory.require(tiny, n_tokens)
    monkeypatch.setattr(memory, "available", lambda: total - 1)
    with pytest.raises(memory.OutOfMemoryError):
        memory.require(tiny, n_tokens)


def test_unknown_free_memory_refuses_nothing(tiny, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.require(tiny, N_TOKENS)


def test_activations_by_hand():
    C, T, H, L, V = 16, 8, 2, 2, 13
    small = ModelConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C)
    assert memory.activation_bytes(small, 3) == 4 * 3 * T * (L * (16 * C + 2 * H * T) + 2 * C + V)
    dropped = dataclasses.replace(small, dropout=0.1)
    assert memory.activation_bytes(dropped, 3) == memory.activation_bytes(small, 3)  # masks are recomputed
    assert memory.activation_bytes(small, 3, recomputed=True) == 4 * 3 * T * (L * (10 * C + H * T) + V)
    assert memory.activation_bytes(dataclasses.replace(small, kind="bigram"), 3) == 2 * 4 * 3 * T * V
    squared = dataclasses.replace(small, mlp="relu2")
    assert memory.activation_bytes(squared, 3) == 4 * 3 * T * (L * (12 * C + 2 * H * T) + 2 * C + V)
    low = dataclasses.replace(small, precision="bfloat16")
    assert memory.activation_bytes(low, 3) == 2 * 3 * T * (L * 16 * C + 2 * C + V)
    long = dataclasses.replace(small, block_size=256)
    assert memory.activation_bytes(long, 3) == 4 * 3 * 256 * (L * 16 * C + 2 * C + V), "weights by blocks"


def host_available(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return memory.host_available(path / "proc", path / "cgroup")


MEMINFO = {"proc/meminfo": "MemTotal:  4000 kB\nMemAvailable:   3000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 3000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.max": "max\n"}, 3000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/memory.max": "9000\n",
                "cgroup/a/memory.current": "8000\n",
                "cgroup/a/memory.stat": "file 700\ninactive_file 500\nactive_file 70\n",
            },
            1570,
        ),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/a/memory.max": "9\n", "cgroup/a/memory.current": "10\n"}, 0),
    ],
    ids=["meminfo", "no limit", "limit of a parent", "above the limit"],
)
def test_host_available_is_the_tightest_limit(tmp_path, files, expected):
    assert host_available(tmp_path, MEMINFO | files) == expected


def test_host_without_proc_has_its_physical_memory(tmp_path):
    assert host_available(tmp_path, {}) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_available_reads_the_memory_stats_of_the_device(monkeypatch):
    def device(stats):
        return lambda: [types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)]

    def unsupported():
        raise NotImplementedError

    for stats, free in (
        ({"bytes_limit": 1000, "bytes_in_use": 300}, 700),
        ({"bytes_limit": 1000}, 1000),
        ({"bytes_limit": 1000, "bytes_in_use": 1200}, 0),
        ({"bytes_in_use": 300}, None),
        (None, None),
    ):
        monkeypatch.setattr(jax, "local_devices", device(stats))
        assert memory.available() == free
    without = types.SimpleNamespace(platform="gpu", memory_stats=unsupported)
    monkeypatch.setattr(jax, "local_devices", lambda: [without])
    assert memory.available() is None


@pytest.mark.parametrize("text", ["data=1", "data=2,tensor=4"])
def test_estimate_with_remat_is_a_close_lower_bound(tiny, change, text):
    sizes = dict(vocab_size=64, block_size=64, n_layer=8, n_head=4, n_kv_head=4, n_embd=32, batch_size=8, dropout=0.0)
    config, mesh = change(tiny, **sizes, remat="blocks", scan_layers=True), make_mesh(Sizes.parse(text))
    with jax.set_mesh(mesh):
        arguments, further = memory.compiled_bytes(lowered(config, mesh).compile())
    assert 1.0 <= (arguments + further) / memory.needed(config, N_TOKENS, Sizes(**mesh.shape)).total <= 2.0
