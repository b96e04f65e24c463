"""The ranking of meshes and batch sizes, which steps fit, and what to try if a step does not fit."""

import dataclasses

import pytest
from rich.filesize import decimal as size

from jaxgpt.monitor.chips import CHIPS
from jaxgpt.plan import cli, plan
from jaxgpt.plan import view as plans
from jaxgpt.plan.estimate import estimate
from jaxgpt.sharding import Sizes


def test_the_ranking_is_by_time_and_has_only_divisible_batches(recipes):
    config, chip = recipes["124m"], CHIPS["v5p"]
    found = plan.ranked(config, chip, 24)
    assert all(step.sizes.devices == 24 for step in found)
    times = [step.bounds[1] / step.config.train.batch_size for step in found if step.fits]
    assert times == sorted(times)
    assert {step.config.train.batch_size for step in found} == {512, 528}
    for step in found:
        train = step.config.train
        assert train.batch_size % (step.sizes.data * step.sizes.fsdp * train.accumulate) == 0
    for step in found[:5]:
        assert estimate(step.config, chip, step.sizes) == step


def test_a_sweep_also_tries_batch_sizes(recipes, change, capsys):
    alone = plan.ranked(change(recipes["1.5b"], batch_size=6), CHIPS["v5p"], 1, sweep=True)
    assert sorted({step.config.train.batch_size for step in alone}) == [3, 6, 12, 24]
    config, chip = change(recipes["1.5b"], batch_size=12), CHIPS["v5e"]
    found = plan.ranked(config, chip, 16, sweep=True)
    assert {step.config.train.batch_size for step in found} == {3, 6, 12, 16, 24, 32, 48}
    rates = [step.config.train.batch_size / step.bounds[1] for step in found if step.fits]
    assert rates == sorted(rates, reverse=True)
    assert [step.fits for step in found] == sorted((step.fits for step in found), reverse=True)
    batches = []
    for sweep in ([], ["--sweep"]):
        assert cli.run(["gpt2-1.5b", "--chips", "256", *sweep]) == 0
        rows = capsys.readouterr().out.splitlines()[2:]
        batches.append({row.split(" | ")[2] for row in rows})
    assert batches[0] == {"512"}
    assert len(batches[1]) > 1


def test_a_sweep_compiles_the_best_of_all_batch_sizes(monkeypatch, capsys):
    tried = []

    def refuse(config, chip, devices, sizes):
        tried.append((config.train.batch_size, sizes))
        raise plan.TooLargeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("jaxgpt.plan.view.topology", lambda name: (CHIPS["v5e"], [None] * 256))
    monkeypatch.setattr(plan, "plan", refuse)
    cli.run(["gpt2-1.5b", "--sweep"])
    row = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert [(str(batch), str(sizes)) for batch, sizes in tried] == [(row[2], row[1])]
    assert tried[0][0] == 2048


def test_more_chips_are_faster_until_communication_dominates(recipes, change):
    config = change(recipes["1.5b"], batch_size=4096)
    steps = [estimate(config, CHIPS["v5e"], Sizes(fsdp=n)) for n in (16, 64, 256)]
    assert steps[0].seconds["matmuls"] == pytest.approx(16 * steps[2].seconds["matmuls"])
    assert steps[0].bounds[1] > steps[1].bounds[1] > steps[2].bounds[1]
    assert steps[0].utilization[0] > steps[2].utilization[0]
    one, two = (estimate(config, CHIPS["v5e"], Sizes(data=4 * n, fsdp=64)) for n in (1, 2))
    assert one.network == 0
    # Between two pods, each chip sends twice its share of half of the summed shard.
    assert two.network == pytest.approx(2 * 4 * 1.6e9 / 64 / 4 / 2, rel=0.05)
    within = dataclasses.replace(two, network=0).seconds["communication"]
    assert two.seconds["communication"] == pytest.approx(within + two.network / (25e9 / 8))


def test_the_command_ranks_by_estimate(capsys):
    assert cli.run(["gpt2-1.5b", "--chips", "256", "--chip", "v5e"]) == 0
    one = capsys.readouterr().out.splitlines()
    assert len(one) == 2 + plans.SHOWN
    assert cli.run(["gpt2-1.5b", "--chips", "1", "256", "4096"]) == 1  # one chip has too little memory
    several = capsys.readouterr().out.splitlines()
    assert cli.run(["gpt2-1.5b", "--chips", "256", "1"]) == 1, "whatever the order"
    capsys.readouterr()
    assert [line.split(" | ")[0] for line in several[2:]] == ["| 1", "| 256", "| 4096"]
    assert several[3] == one[2]
    assert cli.run(["gpt2-1.5b", "--chips", "256", "--mesh", "data=64,fsdp=4"]) == 0
    assert "verdict: it fits" in capsys.readouterr().out


def test_a_step_that_does_not_fit_names_what_to_try(recipes, change):
    """256 chips with a copy of 1.5B parameters each, then with half of one in a memory that is hardly larger."""
    config, chip = recipes["1.5b"], CHIPS["v5e"]
    for copied, remat, begins, more in (
        (Sizes(data=256), "none", "it does not fit, by ", " --remat blocks,"),
        (Sizes(data=256), "blocks", "it does not fit, by ", ""),
        (Sizes(data=128, fsdp=2), "blocks", "it may not fit: the estimate is ", ""),
    ):
        step = estimate(change(config, remat=remat), chip, copied)
        if copied.fsdp > 1:
            step = dataclasses.replace(step, chip=dataclasses.replace(chip, memory=step.memory / 0.9))
        assert not step.fits
        advice = f": try another --mesh or a larger --accumulate (--sweep ranks them),{more} or more chips"
        assert plans.verdict(step).startswith(begins)
        assert plans.verdict(step).endswith(advice)
        refused = list(plans.estimated("v5e", step, refused="RESOURCE_EXHAUSTED"))
        assert refused[-1] == f"verdict: it does not fit{advice}"


def test_what_a_verdict_names_leads_to_a_step_that_fits(capsys):
    for flags, code in (
        ("--chips 16 --mesh data=16", 1),
        ("--chips 16 --mesh fsdp=16", 0),
        ("--chips 16 --sweep", 0),
        ("--chips 16 --mesh fsdp=16 --batch-size 2048", 1),
        ("--chips 16 --mesh fsdp=16 --batch-size 2048 --accumulate 8", 0),
        ("--chips 64 --mesh fsdp=64 --batch-size 2048", 0),
    ):
        assert cli.run(["gpt2-1.5b", *flags.split()]) == code, flags
        assert ("try another --mesh" in capsys.readouterr().out) == bool(code)


def test_a_step_fits_up_to_four_fifths_of_the_memory(recipes, change):
    """With one or two sequences per chip, the compiler needs at most a quarter more than estimated (test_plan.py)."""
    config, sizes = recipes["1.5b"], Sizes(data=64, fsdp=4)
    step = estimate(config, CHIPS["v5e"], sizes)
    assert step.fits
    for share, fits in ((0.75, True), (0.9, False)):
        chip = dataclasses.replace(CHIPS["v5e"], memory=step.memory / share)
        found = estimate(config, chip, sizes)
        assert found.fits == fits
        assert plans.verdict(found).startswith("it fits" if fits else "it may not fit: the estimate is 90%")
    assert "too much or nearly" in list(plans.table([found]))[-1]


def test_a_step_that_jax_leaves_no_room_for_by_default_fits_a_gpu_with_a_setting(recipes):
    for name, needs_setting in (("h100", True), ("v5e", False)):
        chip = CHIPS[name]
        for share, needs in ((0.7, False), (0.8, needs_setting)):
            step = estimate(recipes["1.5b"], chip, Sizes(fsdp=8))
            step = dataclasses.replace(step, arguments=0, temporaries=int(chip.memory * share), room=1.0)
            assert ("XLA_PYTHON_CLIENT_MEM_FRACTION" in plans.verdict(step)) == needs
            assert plans.verdict(step).startswith("it fits")


def test_each_figure_of_a_plan_is_in_its_place(recipes, change):
    """Two pods: 512 sequences of 1024 tokens in 4 micro-batches."""
    step = estimate(change(recipes["1.5b"], accumulate=4), CHIPS["v5e"], Sizes(data=8, fsdp=64))
    (least, most), tokens = step.bounds, 512 * 1024
    assert least < most
    assert plans.about(step, "v5e").endswith(
        ", mesh data=8,fsdp=64: steps of 512 x 1024 tokens in 4 micro-batches, on 512 chips (v5e)"
    )
    text = "\n".join(plans.costs(step, "estimated"))
    held = f"state and tokens {size(step.arguments)}, temporaries {size(step.temporaries)}: {size(step.memory)}"
    assert f"  {held} of 17.2 GB\n" in text
    assert f"  between pods: {size(int(step.network))}\n" in text
    assert f"({step.flops:.3g} FLOPs, {step.computed / step.flops:.2f} times with recomputation)" in text
    assert step.computed > step.flops
    slow, fast = (step.flops / seconds / 197e12 for seconds in (most, least))
    used = f"utilization {slow:.0%} to {fast:.0%}"
    assert f" ms, {tokens / most:,.0f} to {tokens / least:,.0f} tokens/s, {used}\n" in text
    for (kind, n), (times, n_bytes) in step.collectives.items():
        among = f" among {n}" if kind != "collective-permute" else ""
        assert f"  {kind}{among}: {times:,} per step, {size(n_bytes)}\n" in text
    row = list(plans.table([step]))[-1].strip("| ").split(" | ")
    assert dict(zip(plans.COLUMNS, row, strict=True)) == {
        "chips": "512",
        "mesh": "data=8,fsdp=64",
        "batch": "512",
        "accumulate": "4",
        "memory per chip": size(step.memory),
        "ms per step": plans.ms(most),
        "tokens/s": f"{tokens / most:,.0f}",
        "utilization": f"{slow:.0%}",
    }


def test_a_step_too_large_for_a_gpu_lacks_what_exceeds_all_of_its_memory(recipes):
    step = estimate(recipes["1.5b"], CHIPS["h100"], Sizes(fsdp=8))
    step = dataclasses.replace(step, arguments=5 * 10**9, temporaries=80 * 10**9)
    assert plans.verdict(step).startswith("it does not fit, by 5.0 GB: ")
    assert "state and tokens 5.0 GB, temporaries 80.0 GB: 85.0 GB of 80.0 GB\n" in "\n".join(plans.costs(step, ""))
