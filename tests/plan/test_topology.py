"""Topologies of devices that are not attached: TPUs, GPUs and virtual CPU devices."""

import importlib.util
import types

import pytest

from jaxgpt.monitor.chips import CHIPS
from jaxgpt.plan.topology import PlanError, topology
from tests.plan.test_plan import tpu


@tpu
def test_topologies_that_the_compiler_cannot_target_are_refused():
    with pytest.raises(PlanError, match="--topology v5e:3x999"):
        topology("v5e:3x999")
    for name in ("v5e:3", "v5e:16x16:2", "v5e:3x1"):
        with pytest.raises(PlanError, match="expected an arrangement as in v5e:4x4") as error:
            topology(name)
        assert "pip install" not in str(error.value)


@tpu
@pytest.mark.parametrize(
    ("name", "chips"), [("v5e:1x1", 1), ("v5e:2x1", 2), ("v5e:2x2", 4), ("v5p:2x2x2", 8), ("v6e:4x4", 16)]
)
def test_a_topology_has_a_device_for_each_chip_and_may_be_smaller_than_a_host(name, chips):
    assert len(topology(name)[1]) == chips


@pytest.fixture
def compiler(monkeypatch):
    """A fake TPU compiler. The list holds the devices to find; each call appends its arguments."""
    from jax.experimental import topologies

    found = []

    def describe(**kwargs):
        if not found:
            raise RuntimeError("INVALID_ARGUMENT")
        found.append(kwargs)
        return types.SimpleNamespace(devices=found[:-1])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    return found


@pytest.mark.parametrize(
    ("name", "bounds"), [("v5e:1x1", (1, 1, 1)), ("v5e:2x1", (2, 1, 1)), ("v5e:16x16", (2, 2, 1)), ("v5e:3", None)]
)
def test_the_compiler_gets_smaller_hosts_for_small_topologies(compiler, name, bounds):
    compiler.append("a device")
    topology(name)
    assert compiler[-1].get("chips_per_host_bounds") == bounds


@pytest.mark.parametrize(
    ("name", "arrangement", "said"),
    [
        ("h100:1", "1x1x1", ("major: 9 ", "core_count: 132", "device_memory_size: 80000000000", "optin: 232448")),
        ("a100:16", "1x2x8", ("major: 8 ", "core_count: 108", "device_memory_size: 80000000000", "optin: 166912")),
        ("b200:8", "1x1x8", ("major: 10 ", "core_count: 148", "device_memory_size: 180000000000", "optin: 232448")),
    ],
)
def test_the_compiler_gets_a_description_of_gpus(compiler, name, arrangement, said):
    compiler.append("a device")
    chip, devices = topology(name)
    assert (chip, devices) == (CHIPS[name.partition(":")[0]], ["a device"])
    assert (compiler[-1]["platform"], compiler[-1]["topology"]) == ("cuda", arrangement)
    assert all(words in compiler[-1]["target_config"] for words in said)
    kind = name.partition(":")[0].upper()
    assert f'device_description_str: "NVIDIA {kind}"' in compiler[-1]["target_config"], "as Pallas looks it up"


@pytest.mark.parametrize(("name", "expected", "extra"), [("v5p:3", "v5p:4x4x4", "tpu"), ("h100:16", "h100:8", "cuda")])
def test_only_a_missing_compiler_gets_the_install_hint(compiler, monkeypatch, name, expected, extra):
    for installed, hint in (
        (True, f"expected an arrangement as in {expected}$"),
        (False, rf"pip install 'jaxgpt\[{extra}\]"),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: found or None)
        with pytest.raises(PlanError, match=f"--topology {name}: INVALID_ARGUMENT; {hint}"):
            topology(name)
