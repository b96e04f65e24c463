"""The command scaling-fit: a family of runs, and the law fitted to them."""

import json
import sys
from functools import partial

import pytest

from jaxgpt import config as configs
from jaxgpt.cli import run_command
from jaxgpt.monitor import cost
from jaxgpt.scaling_law import family, law
from jaxgpt.scaling_law.cli import ScalingFit
from jaxgpt.sweep import program

TRUE = law.Law(E=1.1, A=40.0, B=60.0, a=0.42, b=0.31)


def test_family_combines_every_size_with_every_number_of_tokens():
    base = configs.replaced(family.BASE, vocab_size=103)
    sizes = [family.parse_size(text) for text in ScalingFit().sizes]
    members = family.family(base, sizes, (125_000, 250_000, 500_000, 1_000_000))
    counts = sorted({cost.n_params(member.config.model) for member in members})
    assert 5_000 < counts[0] < 12_000
    assert 900_000 < counts[-1] < 1_100_000
    for member, asked in zip(members, (125_000, 250_000, 500_000, 1_000_000) * 6, strict=True):
        assert family.tokens_seen(member.config) == pytest.approx(asked, rel=0.05)
        assert member.config.optimizer.decay_steps == member.config.train.steps
    with pytest.raises(configs.UsageError, match="LAYERSxCHANNELS"):
        family.parse_size("4x100")
    with pytest.raises(configs.UsageError, match="LAYERSxCHANNELS"):
        family.parse_size("4x0")


def test_scaling_fit_finds_the_law_that_its_runs_follow(tmp_path, verse, monkeypatch, capsys):
    def run(members, corpus, devices, at_once, finished):
        for i, (config, setting) in enumerate(members):
            if i not in finished:
                loss = TRUE.loss(cost.n_params(config.model), family.tokens_seen(config)) if i != 5 else None
                figures = (loss, None, None, None)
                yield [program.Score(i, setting, 1337, config.train.steps, *figures, None, loss is None, done=True)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(law, "fit", partial(law.fit, resamples=3))
    assert run_command(["scaling-fit", "--corpus", str(verse), "--flops", "1e13"]) == 0
    out = capsys.readouterr().out
    N, D = TRUE.optimum(1e13)
    assert f"{N:,.0f} parameters" in out
    assert f"{D:,.0f} tokens" in out
    assert "1 of 24 runs diverged: left out of the fit" in out
    found = json.loads((tmp_path / "sweeps/scaling/law.json").read_text())
    assert law.Law(**found["law"]) == pytest.approx(TRUE, rel=1e-5)
    assert (tmp_path / "sweeps/scaling/law.png").read_bytes().startswith(b"\x89PNG")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vl_convert", None)
        assert run_command(["scaling-fit", "--corpus", str(verse), "--flops", "1e13", "--name", "bare"]) == 0
    assert "no plots were drawn: a chart needs vl-convert-python, which is not installed" in capsys.readouterr().out
    for flops in (["nan"], ["1e400"], ["1", "0"]):
        assert run_command(["scaling-fit", "--corpus", str(verse), "--flops", *flops]) == 2
        assert "expected finite numbers above 0" in capsys.readouterr().err
    assert run_command(["scaling-fit", "--corpus", str(verse), "--tokens", "--flops"]) == 2
    assert "0 amounts of --tokens" in capsys.readouterr().err
    assert run_command(["scaling-fit", "--corpus", str(verse), "--sizes", "2x16", "2x32"]) == 2
    assert run_command(["scaling-fit", "--corpus", str(verse), "--tokens", "1000", "2000", "4000"]) == 2
    assert "6 --sizes and 1 amounts of --tokens (15360, in whole scans" in capsys.readouterr().err
    assert run_command(["scaling-fit", "--corpus", str(verse), "--sizes", "2x16", "2x32", "02x16", "2x48"]) == 2
    assert "3 --sizes and 4 amounts" in capsys.readouterr().err
    assert run_command(["scaling-fit", "--corpus", str(verse), "--tokens", "1000", "2000", "40000", "80000"]) == 2
    assert "3 amounts of --tokens (15360, 46080, 76800, in whole" in capsys.readouterr().err


def test_head_size_is_fixed_and_the_learning_rate_falls_with_the_width():
    small, large = (member.config for member in family.family(family.BASE, [(1, 16), (2, 256)], [10**5]))
    assert (small.model.n_head, large.model.n_head) == (1, 16)
    assert (small.optimizer.learning_rate, large.optimizer.learning_rate) == (5e-3, 1.25e-3)


def test_an_unfinished_member_is_no_point():
    members = family.family(configs.replaced(family.BASE, vocab_size=103), [(1, 16)], [10**5])
    score = program.Score(0, members[0].setting, 1337, 20, 3.0, 0.1, 4.0, 4.0, 3.0, diverged=False, done=False)
    assert family.points(members, [score]) == []
    assert len(family.points(members, [score._replace(done=True)])) == 1


def test_each_run_of_a_size_has_its_own_seed_and_warms_up_for_a_tenth_of_its_steps():
    members = family.family(family.BASE, [(1, 16), (1, 32)], [153_600], seeds=2)
    assert [member.config.train.seed for member in members] == [1337, 1338] * 2
    assert [member.config.model.n_embd for member in members] == [16, 16, 32, 32]
    assert {(each.config.train.steps, each.config.optimizer.warmup_steps) for each in members} == {(200, 20)}


def test_the_amount_of_tokens_is_the_nearest_whole_number_of_scans():
    scan = 12 * 64 * 20
    members = family.family(family.BASE, [(1, 16)], [scan // 9, 14 * scan // 10, 16 * scan // 10])
    assert [family.tokens_seen(member.config) for member in members] == [scan, scan, 2 * scan]
