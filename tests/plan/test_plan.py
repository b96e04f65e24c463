"""Plans for chips that are not attached: by the TPU compiler if it is installed, for virtual devices, and estimates."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import jax
import pytest
from rich.filesize import decimal as size

from jaxgpt import loss, sharding
from jaxgpt.cli import options
from jaxgpt.cli.mesh import choose
from jaxgpt.config import UsageError
from jaxgpt.data import DEVICE_TOKENS
from jaxgpt.monitor.chips import CHIPS
from jaxgpt.plan import cli, plan, view
from jaxgpt.plan.estimate import estimate, sent
from jaxgpt.plan.topology import PlanError, topology
from jaxgpt.profile import hlo
from jaxgpt.recipes import recipe
from jaxgpt.sharding import MeshError, Sizes, make_mesh
from jaxgpt.step import abstract_state, init_state

tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra: pip install 'jaxgpt[tpu]'"
)
gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="needs the extra: pip install 'jaxgpt[cuda]'"
)


def bytes_of(step, kind):
    return sum(size for (one, _), (_, size) in step.collectives.items() if one == kind)


def bytes_sent(step):
    return sum(sent(kind, n, size) for (kind, n), (_, size) in step.collectives.items())


@pytest.mark.slow
@tpu
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("124m", "data=32,fsdp=4,tensor=2"),
        ("1.5b", "data=32,fsdp=4,tensor=2"),  # tensor does not divide its 25 heads
    ],
)
def test_gpt2_compiles_for_a_pod_and_fits(recipes, name, text):
    """Communication is counted by hand: each of L blocks has kernels of 12 C² elements, the head has V C."""
    config, sizes = recipes[name], Sizes.parse(text)
    C, V, L = config.model.n_embd, config.model.vocab_size, config.model.n_layer
    chip, devices = topology("v5e:16x16")
    found = plan.plan(config, chip, devices, sizes)
    step, compiled = found.step, found.compiled
    assert step.config == config
    assert step.fits
    assert "tpu_custom_call" in found.kernels  # splash attention
    assert found.matmuls == ["bf16 x bf16"]
    # A chip holds its shards of the parameters and of two moments, and the tokens.
    shards = sizes.fsdp * sizes.tensor
    assert step.arguments - 2 * DEVICE_TOKENS == pytest.approx(3 * 4 * (12 * L * C**2 + V * C) / shards, rel=0.05)
    # Kernels are gathered as bfloat16: once per pass, those of attention once more; the head is gathered once.
    gathered = 2 * ((2 + 4 / 12) * 12 * L * C**2 + V * C) / sizes.tensor
    divided = config.model.n_head % sizes.tensor == 0  # else some attention kernels are gathered whole
    found_gathered = step.collectives["all-gather", sizes.fsdp][1]
    assert found_gathered == pytest.approx(gathered, rel=0.1) if divided else gathered < found_gathered < 1.3 * gathered
    # Gradients are reduce-scattered as float32, once, in whole tiles; only shards are summed over the replicas.
    gradients = 4 * (12 * L * C**2 + V * C) / sizes.tensor
    assert bytes_of(step, "reduce-scatter") == pytest.approx(gradients, rel=0.1)
    summed = sum(size for (kind, n), (_, size) in step.collectives.items() if kind == "all-reduce" and n > sizes.tensor)
    assert summed < 1.5 * gradients / sizes.fsdp + 2**24
    # The second step compiles nothing: the state has the same layout as input and as output.
    (state, *_), _ = compiled.input_formats
    assert jax.tree.leaves(state) == jax.tree.leaves(compiled.output_formats[0])
    # The estimate is close.
    guess = estimate(config, chip, sizes)
    assert guess.memory == pytest.approx(step.memory, rel=0.2)
    assert bytes_sent(guess) == pytest.approx(bytes_sent(step), rel=0.2)


def test_the_plans_of_the_docs_use_all_chips():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    lines = [line for page in pages for line in re.findall(r"^jaxgpt plan (.*)", page.read_text("utf-8"), re.M)]
    compiled = [line.partition("#")[0].split() for line in lines if "--topology" in line]
    assert len(compiled) >= 3
    for name, *args in compiled:
        given = options.parse(cli.PlanOptions, args, "plan", default=cli.PlanOptions(recipe(name).config))
        chips = math.prod(map(int, given.topology.partition(":")[2].split("x")))
        asked = None if given.mesh == "auto" else Sizes.parse(given.mesh)
        assert plan.mesh(given.config, CHIPS["v5e"], [None] * chips, asked).devices == chips


@gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "text"), [("h100:1", "data=1"), ("a100:8", "data=2,fsdp=4")])
def test_a_step_with_dropout_compiles_for_gpus(shallow, change, name, text):
    chip, devices = topology(name)
    config = change(shallow, dropout=0.2, precision="bfloat16", n_head=2)
    found = plan.plan(config, chip, devices, sizes := Sizes.parse(text))
    assert found.kernels >= {"__gpu$xla.gpu.triton"}, "jaxgpt's own attention"
    assert found.matmuls == ["bf16 x bf16"]
    assert found.step.arguments == pytest.approx(estimate(config, chip, sizes).arguments, rel=0.01)
    reduced = {n for kind, n in found.step.collectives if kind == "all-reduce"}
    assert reduced == ({2, 4, 8} if sizes.devices == 8 else set())


def test_a_step_is_compiled_with_as_many_logits_at_once_as_the_chip_holds(tiny, monkeypatch):
    """As training does, which reads the memory from the device."""
    seen = []

    def compile_step(config, mesh):
        monkeypatch.setattr(sharding, "platform", lambda: "tpu")
        seen.append(loss.logits_at_once())
        raise PlanError("seen")

    monkeypatch.setattr(plan, "compile_step", compile_step)
    for chip in (CHIPS["v5e"], CHIPS["h100"]):
        with pytest.raises(PlanError, match="seen"):
            plan.plan(tiny, chip, jax.devices(), Sizes())
    assert seen == [16 * 2**30 // 64, 80e9 * 0.75 // 64]


def test_programs_for_absent_chips_are_not_cached(tiny, monkeypatch):
    """Another process could not read such cache entries."""
    name, seen = "jax_persistent_cache_min_compile_time_secs", []
    before = jax.config.values[name]

    def fail(*_):
        seen.append(jax.config.values[name])
        raise RuntimeError("seen")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(PlanError, match="the compiler failed: seen"):
        plan.plan(tiny, *topology("cpu:1"), Sizes())
    assert seen == [math.inf]
    assert jax.config.values[name] == before


@pytest.fixture
def shallow(tiny, change):
    """A config divisible by every mesh here, so wide that the kernels dominate communication."""
    sizes = dict(vocab_size=512, block_size=64, n_layer=2, n_head=4, n_embd=128, dropout=0.0, batch_size=16)
    return change(tiny, **sizes, scan_layers=True, remat="blocks", bias=False, tie_weights=True)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("data=4,fsdp=2", {}),
        ("data=2,fsdp=2,tensor=2", {}),
        ("data=4,fsdp=2", {"vocab_size": 128, "bigram_embed": True}),
        ("data=4,context=2", {"block_size": 512}),  # two blocks of queries on each chip
    ],
)
def test_the_estimate_agrees_with_the_program_for_virtual_devices(shallow, change, text, changes):
    chip, devices = topology("cpu:8")
    assert chip is None
    shallow = change(shallow, n_layer=1 if changes else 2, **changes)
    found = plan.plan(shallow, chip, devices, Sizes.parse(text)).step
    assert found.config == shallow
    guess = estimate(shallow, CHIPS["h100"], Sizes.parse(text))
    assert guess.memory - 2 * DEVICE_TOKENS == pytest.approx(found.memory - 2 * DEVICE_TOKENS, rel=0.4)
    # On CPUs, XLA reduces as many bytes, but with all-reduce instead of reduce-scatter.
    for kinds in (("all-gather",), ("all-reduce", "reduce-scatter")):
        reduced = [sum(bytes_of(step, kind) for kind in kinds) for step in (guess, found)]
        assert reduced[0] == pytest.approx(reduced[1], rel=0.3)


def test_the_estimate_counts_the_shards_of_every_parameter(shallow, change):
    """The position and bigram embeddings are not sharded over `tensor`."""
    config, sizes = change(shallow, bigram_embed=True, vocab_size=128), Sizes.parse("data=2,fsdp=2,tensor=2")
    state = abstract_state(config, make_mesh(sizes))
    shards = [4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)]
    step = estimate(config, CHIPS["v5e"], sizes)
    assert step.arguments - 2 * DEVICE_TOKENS == pytest.approx(sum(shards), rel=0.01)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_the_estimate_counts_the_moments_of_the_optimizer(shallow, change, algorithm):
    config = change(shallow, algorithm=algorithm)
    state = jax.eval_shape(init_state, config)
    params, moments = (sum(4 * leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state))
    step = estimate(config, CHIPS["v5e"], Sizes())
    assert step.arguments - 2 * DEVICE_TOKENS == pytest.approx(params + moments, abs=100)
    read, written = params + params + moments, params + moments  # the update also reads the gradients
    assert step.seconds["update"] == pytest.approx((read + written) / CHIPS["v5e"].memory_rate, rel=1e-4)
    _, why = choose(config, 1, None)
    assert why.startswith(f"parameters, gradients and moments take {size(2 * params + moments)}, whole")


@pytest.mark.parametrize(("remat", "algorithm"), [("none", "adamw"), ("matmuls", "muon"), ("blocks", "adamw")])
def test_estimated_flops_and_state_equal_those_of_the_program(shallow, change, remat, algorithm):
    """Including recomputed FLOPs. Without a scan over blocks, XLA recomputes nothing on CPUs."""
    config = change(shallow, remat=remat, algorithm=algorithm)
    found = plan.plan(config, *topology("cpu:1"), Sizes())
    assert found.step.computed == sum(each.flops for each in hlo.matmuls(found.compiled.as_text()))
    guess = estimate(config, CHIPS["h100"], Sizes())
    assert guess.arguments == pytest.approx(found.step.arguments, abs=200), "all but window starts and step counts"


def test_a_window_saves_flops_unless_chips_share_the_context(shallow, change):
    """Chips that share the context compute the scores of all keys."""
    whole = change(shallow, block_size=512)
    window = change(whole, window=64)
    for sizes, saves in ((Sizes(data=2), True), (Sizes(context=2), False)):
        ours, theirs = (estimate(config, CHIPS["v5e"], sizes).computed for config in (window, whole))
        assert (ours < theirs) == saves
        assert ours <= theirs


def test_the_command_plans_for_virtual_devices(capsys):
    sizes = "--vocab-size 64 --block-size 8 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 8"
    assert cli.run(["gpt-demo", *sizes.split(), "--topology", "cpu:2", "--mesh", "data=2"]) == 0
    out = capsys.readouterr().out
    assert " parameters, mesh data=2: steps of 8 x 8 tokens in 1 micro-batch, on 2 chips (cpu:2)" in out
    assert "  matmuls in the program: f32 x f32; custom kernels: none\n" in out
    assert "all-reduce among 2" in out
    assert "verdict: it compiles" in out


def test_short_times_are_not_rounded_to_zero(capsys):
    sizes = "--vocab-size 64 --block-size 8 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 8"
    for mesh in (["--mesh", "data=2"], []):
        assert cli.run(["gpt-demo", *sizes.split(), "--chips", "2", *mesh]) == 0
        out = capsys.readouterr().out
        assert " ms" in out
        assert not re.search(r" 0(\.0)?%? (ms|to|\|)", out)
    assert cli.run(["gpt-demo", *sizes.split(), "--chips", "1", "--mesh", "data=1"]) == 0
    out = capsys.readouterr().out
    assert "in 1 micro-batch, on 1 chip (v5e)" in out
    assert re.search(r"\n  a step in [\d.]+ ms, [\d,]+ tokens/s, utilization [\d.]+%\n", out), "nothing is communicated"
    assert "overlaps" not in out
    assert [view.ms(seconds, 1) for seconds in (0.1424, 0.0053, 36.082)] == ["142.4", "5.3", "36,082.0"]


def test_float32_is_estimated_at_the_rate_of_its_matmuls(recipes, change):
    config, sizes = change(recipes["1.5b"], precision="float32"), Sizes(fsdp=8)
    for name, slower in (("h100", 989 / 494.7), ("a100", 2), ("v5p", 1)):  # in TF32 on GPUs, in bfloat16 on TPUs
        steps = [estimate(each, CHIPS[name], sizes) for each in (config, recipes["1.5b"])]
        times = [step.seconds["matmuls"] for step in steps]
        assert times[0] == pytest.approx(slower * times[1])
        assert steps[0].utilization[0] == pytest.approx(steps[0].flops / steps[0].bounds[1] / CHIPS[name].float32)


def test_impossible_plans_are_refused(shallow, change):
    with pytest.raises(MeshError, match="tensor = 3 does not divide 128 channels"):
        plan.mesh(shallow, None, [None] * 3, Sizes(tensor=3))
    with pytest.raises(PlanError, match="needs 512 devices, the topology has 8"):
        plan.mesh(shallow, *topology("cpu:8"), Sizes(data=16, tensor=32))
    odd = change(shallow, batch_size=13)
    with pytest.raises(PlanError, match=r"255 of 256 devices stay idle.*rank all meshes by --sweep$"):
        plan.mesh(odd, CHIPS["v5e"], [None] * 256)
    with pytest.raises(PlanError, match=r"give another --batch-size or a --mesh$"):  # --sweep needs a chip's rates
        plan.mesh(odd, None, [None] * 256)
    with pytest.raises(PlanError, match="needs 26 devices"):  # which a batch of 26 would not change
        plan.mesh(odd, None, [None] * 8, Sizes(data=26))
    with pytest.raises(
        PlanError, match=r"expected a TPU \(v5e, v5p, v6e\) and its arrangement, as in v5e:16x16, a GPU"
    ):
        topology("tpu9:2x2")
    for name in ("h100-pcie:2", "v4:2x2x1", "h100:0", "cpu:0", "cpu:1025"):
        with pytest.raises(PlanError, match=f"--topology {name}: .* others can only be estimated, --chips 8 --chip v4"):
            topology(name)
    with pytest.raises(PlanError, match="--topology h100:12: expected up to 8 GPUs, or whole machines of 8"):
        topology("h100:12")
    with pytest.raises(PlanError, match="there are 8 devices"):
        topology("cpu:99")
    with pytest.raises(PlanError, match="no chip 'v9': expected one of v4"):
        cli.run(["gpt2-124m", "--chips", "8", "--chip", "v9"])
    with pytest.raises(PlanError, match="the rate between pods of this chip is unknown"):
        cli.run(["gpt2-124m", "--chips", "4", "--chip", "h100-pcie"])
    with pytest.raises(PlanError, match="257 chips span 2 pods of 256: their number, and data, must be multiples of 2"):
        cli.run(["gpt2-124m", "--chips", "257"])
    with pytest.raises(PlanError, match="no mesh of 2053 chips divides this model, batch and context"):
        cli.run(["gpt2-124m", "--chips", "2053", "--chip", "v5p", "--block-size", "1048576"])
    with pytest.raises(PlanError, match="has 4 chips: give --chips 4"):
        cli.run(["gpt2-1.5b", "--chips", "8", "--mesh", "data=4"])
    with pytest.raises(PlanError, match="512 chips span 2 pods of 256: their number, and data, must be multiples of 2"):
        cli.run(["gpt2-1.5b", "--chips", "512", "--mesh", "fsdp=64,context=8"])
    with pytest.raises(UsageError, match="bigram is a bigram: only a GPT can be planned"):
        cli.run(["bigram", "--chips", "4"])
    with pytest.raises(UsageError, match="--chips 0: expected 1 or more"):
        cli.run(["gpt2-124m", "--chips", "0"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chip h100", "--chip has no effect without --chips"),
        ("--chips 4 --topology v5e:2x2", "--topology has no effect with --chips"),
        ("--sweep --mesh data=4", "--mesh has no effect with --sweep"),
    ],
)
def test_an_option_without_effect_is_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        cli.run(["gpt2-124m", *flags.split()])


def test_a_step_too_large_for_the_compiler_prints_the_estimate_and_a_suggestion(monkeypatch, capsys):
    def refuse(*given):
        raise plan.TooLargeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm")

    monkeypatch.setattr("jaxgpt.plan.view.topology", lambda name: (CHIPS["v5e"], [None] * 256))
    monkeypatch.setattr(plan, "plan", refuse)
    assert cli.run(["gpt2-1.5b", "--mesh", "data=256"]) == 1
    out = capsys.readouterr().out
    assert "Used 20G of 16G hbm" in out
    assert "state and tokens 19.2 GB, temporaries" in out
    assert (
        "verdict: it does not fit: try another --mesh or a larger --accumulate (--sweep ranks them), or more chips"
        in out
    )


def test_bytes_that_a_chip_sends_for_a_collective():
    """Of n shards, each chip passes on all but its own; an all-reduce does so twice."""
    for kind, each in {"all-gather": 7, "reduce-scatter": 7, "all-reduce": 14, "all-to-all": 14}.items():
        assert sent(kind, 8, 8.0) == each, kind
    assert sent("all-to-all", 2, 8.0) == 4
    assert sent("collective-permute", 2, 8.0) == 8


def test_the_times_of_a_step_follow_from_its_bytes_and_rates(recipes):
    chip, sizes = CHIPS["v5e"], Sizes(data=4, fsdp=16, tensor=4)
    step = dataclasses.replace(estimate(recipes["1.5b"], chip, sizes), collectives={("all-gather", 16): (3, 10**9)})
    matmuls, update, communication = step.seconds.values()
    assert communication == pytest.approx(10**9 * (15 / 16) / (chip.link_rate / 2)), "16 of 256 chips are one side"
    params = 1.56e9
    assert update == pytest.approx(4 * 7 * params / 64 / chip.memory_rate, rel=0.01)
    assert step.bounds == (matmuls + update, matmuls + update + communication)
    slow = dataclasses.replace(step, collectives={("all-gather", 16): (3, 10**13)})
    assert slow.bounds[0] == slow.seconds["communication"] > matmuls + update
