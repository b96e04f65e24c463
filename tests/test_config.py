"""Config: validation, JSON, and configs of earlier versions."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import config as configs
from jaxgpt import files
from jaxgpt.config import Config, ConfigError, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_round_trip(name, tmp_path):
    config = RECIPES[name].config
    assert configs.problems(config) == []
    assert configs.from_tree(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    run_config = tmp_path / "config.json"
    resolved = configs.replaced(config, decay_steps=config.train.steps)
    run_config.write_text(files.seal(dataclasses.asdict(resolved)))
    assert recipe(str(run_config)).config == config


@given(
    st.builds(
        Config,
        data=st.builds(DataConfig, corpus=st.text(), val_fraction=st.floats(0.01, 0.99)),
        model=st.builds(
            ModelConfig,
            kind=st.sampled_from(["gpt", "bigram"]),
            n_head=st.sampled_from([1, 2, 4]),
            n_embd=st.sampled_from([4, 64]),
            dropout=st.floats(0, 0.9),
            bias=st.booleans(),
        ),
        optimizer=st.builds(
            OptimizerConfig,
            learning_rate=st.floats(0, 1e3),
            min_learning_rate=st.none() | st.floats(0, 1),
            beta2=st.floats(0, 0.999),
        ),
        train=st.builds(TrainConfig, seed=st.integers(0, 2**32 - 1), steps=st.integers(101, 10**6)),
    )
)
def test_json_round_trip(config):
    assert configs.from_tree(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("rate", [np.float32(0.25), np.array(0.25)])
def test_numpy_scalars_become_python_numbers(rate):
    config = configs.replaced(Config(), learning_rate=rate, seed=np.uint32(7), bias=np.bool_(True))
    assert config == configs.replaced(Config(), learning_rate=0.25, seed=7, bias=True)
    assert configs.from_tree(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ModelConfig, {"norm": "rmsnorm"}),  # unchecked, it would silently be LayerNorm
        (ModelConfig, {"precision": "bf16"}),
        (OptimizerConfig, {"schedule": "wsd"}),
        (ModelConfig, {"n_layer": 2.0}),
        (ModelConfig, {"bias": 1}),
        (OptimizerConfig, {"weight_decay": None}),
        (DataConfig, {"corpus": 7}),
    ],
)
def test_value_of_a_wrong_type_is_refused_on_construction(section, values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"{name}: expected .*, found {values[name]!r}"):
        section(**values)
    with pytest.raises(ConfigError):
        configs.replaced(Config(), **values)


def test_every_field_is_documented():
    source = Path(configs.__file__).read_text("utf-8").splitlines()
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory()):
            at = next(i for i, line in enumerate(source) if line.startswith(f"    {field.name}: "))
            assert source[at + 1].startswith('    """'), f"{field.name} has no documentation below it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 65}, "try --n-embd 64"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_layer": -1}, "n_layer is -1"),
        ({"block_size": 2**31}, "block_size"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"min_learning_rate": math.nan}, "min_learning_rate is nan"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5"),
        ({"beta2": 1.0}, "beta2"),
        ({"beta1": 0.99999999}, "beta1 is 0.99999999, expected a number from 0 up to, not including, 1 in float32"),
        (
            {"learning_rate": 4e38},
            "learning_rate is 4e+38, expected a number from 0 up to, not including, inf in float",
        ),
        ({"eps": 0.0}, "eps"),
        ({"eps": 1e300}, "eps is 1e+300"),
        ({"eval_batches": 2**30}, "eval_batches is 1073741824, expected at most 1398101, for 2**24 sequences"),
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"val_tokens": 64}, "val_tokens is 64, expected more than block_size (64), or 0"),
        ({"val_tokens": -1}, "val_tokens is -1"),
        ({"warmup_steps": 1000}, "fewer than the steps of the schedule (1000)"),
        ({"batch_size": 5, "accumulate": 2}, "a multiple of accumulate (2)"),
        ({"eval_every": 70}, "try --eval-every 50"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_invalid_setting_is_refused_by_name(change, changes, message):
    with pytest.raises(ConfigError) as caught:
        configs.check(change(Config(), **changes))
    assert message in str(caught.value)


def test_bounds_are_those_of_float32(change):
    below = {1.0: np.nextafter(np.float32(1), np.float32(0)), np.inf: np.finfo(np.float32).max}
    for bound, name in ((1.0, "dropout"), (1.0, "beta2"), (np.inf, "learning_rate"), (np.inf, "eps")):
        least = configs._ROUNDS_TO[bound]  # which float32 rounds to the bound
        with np.errstate(over="ignore"):
            assert np.float32(least) == bound
        assert np.float32(np.nextafter(least, 0)) == below[bound]
        assert configs.problems(change(Config(), **{name: float(np.nextafter(least, 0))})) == []
        assert len(configs.problems(change(Config(), **{name: least}))) == 1


def test_only_a_given_minimum_can_be_above_the_peak(change):
    assert configs.problems(change(Config(), min_lr_ratio=2.0), new=True) == [
        "min_lr_ratio is 2.0, expected a number from 0 to 1"
    ]


def test_rising_learning_rate_is_refused_only_in_new_runs(change):
    rising = change(Config(), learning_rate=1e-5, min_learning_rate=1e-4)
    with pytest.raises(ConfigError, match=r"min_learning_rate is 0.0001, expected at most learning_rate \(1e-05\)"):
        configs.check(rising, new=True)
    assert configs.from_tree(json.loads(json.dumps(dataclasses.asdict(rising)))) == rising
    configs.check(change(rising, schedule="constant"), new=True)
    configs.check(change(rising, min_learning_rate=1e-5), new=True)


def test_all_problems_are_reported_at_once(change):
    found = configs.problems(change(Config(), n_embd=65, steps=0, eval_every=70))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        (lambda tree: tree["model"].update(n_heads=4), "did you mean 'n_head'"),
        (lambda tree: tree["model"].update(n_head="4"), "model.n_head: expected int, found '4'"),
        (lambda tree: tree["model"].update(n_head=True), "model.n_head: expected int, found True"),
        (lambda tree: tree["model"].update(kind="rnn"), "model.kind: expected one of gpt, bigram"),
        (lambda tree: tree.update(train=None), "train: expected an object"),
        ("[" * 100_000, "not JSON"),
        (lambda tree: tree["optimizer"].update(eps=10**400), "optimizer.eps: expected float of at most 64 bits"),
        (lambda tree: tree["model"].update(n_embd=10**400 + 1), "model.n_embd: expected int of at most 64 bits"),
    ],
)
def test_invalid_json_is_refused_by_field(tmp_path, text, message):
    if callable(text):
        tree = dataclasses.asdict(Config())
        text(tree)
        text = json.dumps(tree)
    (tmp_path / "given.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipe(str(tmp_path / "given.json"))
    assert message in str(caught.value)


def test_missing_field_has_its_default(change):
    tree = dataclasses.asdict(change(Config(), n_layer=2))
    del tree["train"]["seed"], tree["model"]["dropout"]
    assert configs.from_tree(tree) == change(Config(), n_layer=2)


def test_config_without_val_tokens_keeps_its_whole_validation_split(change):
    tree = dataclasses.asdict(Config())
    del tree["data"]["val_tokens"]
    assert configs.from_tree(tree) == change(Config(), val_tokens=0) != Config()


def test_integer_is_accepted_as_float():
    tree = dataclasses.asdict(Config())
    tree["optimizer"]["weight_decay"] = 1
    assert configs.from_tree(json.loads(json.dumps(tree))).optimizer.weight_decay == 1.0


def test_a_misspelt_recipe_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'gpt-demo'"):
        recipe("gpt-dmo")


def test_a_recipe_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "best.json"
    path.write_text(json.dumps(dataclasses.asdict(Config())), "utf-8-sig")
    assert recipe(str(path)).config == Config()


@pytest.mark.parametrize(("data", "why"), [(None, "No such file"), (b"{\xff}", "can't decode byte 0xff")])
def test_a_recipe_file_that_cannot_be_read_is_refused(tmp_path, data, why):
    path = tmp_path / "best.json"
    if data:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"best.json cannot be read: .*{why}.*; expected a run's config.json"):
        recipe(str(path))


def test_a_schedule_of_its_own_does_not_follow_the_steps(change):
    config = change(Config(), steps=100, decay_steps=50)
    assert configs.unresolved(config) == config
    assert configs.unresolved(change(config, steps=50)).optimizer.decay_steps == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 100, "decay_steps": 50}, "fewer than the steps of the schedule .50.: try --warmup-steps 5"),
        ({"algorithm": "muon", "learning_rate": 0.0}, "learning_rate is 0.0, expected above 0 with muon"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, changes, message):
    with pytest.raises(ConfigError, match=message):
        configs.check(change(Config(), **changes))
