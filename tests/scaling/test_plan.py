"""Plans for chips that are not attached, by the real compiler for TPUs."""

import importlib.util

import pytest

from jaxgpt.recipes import recipe
from jaxgpt.report import plans
from jaxgpt.scaling import plan
from jaxgpt.scaling.mesh import MeshError, Sizes
from jaxgpt.scaling.plan import PlanError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra: pip install 'jaxgpt[tpu-plan]'"
)


@pytest.fixture(scope="module")
def pod():
    return plan.topology("v5e:16x16")


@pytest.fixture
def gpt2(change):
    """A GPT-2 of four wide layers: what matters of a larger one, compiled in seconds."""
    config = recipe("gpt2-124m").config
    return change(config, n_layer=4, scan_layers=True, remat="blocks", batch_size=512, accumulate=1)


def test_parameters_are_gathered_and_gradients_scattered(pod, gpt2):
    chip, devices = pod
    found = plan.plan(gpt2, chip, devices, Sizes(fsdp=256))
    assert found.fits
    assert "tpu_custom_call" in found.kernels  # splash attention
    n_bytes = 4 * (50304 * 768 + 1024 * 768 + 4 * 12 * 768**2)
    gathered, scattered = (found.collectives[kind][1] for kind in ("all-gather", "reduce-scatter"))
    assert 0.5 * n_bytes < gathered < 4 * n_bytes
    assert 0.5 * n_bytes < scattered < 2 * n_bytes
    assert found.collectives.get("all-reduce", (0, 0))[1] < 0.5 * n_bytes
    # A chip holds a 256th of parameters and two moments, and its copy of the tokens.
    assert found.arguments - 2 * plan.TOKENS < 3 * n_bytes / 256 * 1.1 + 2**20


def test_a_plan_is_told(pod, gpt2):
    chip, devices = pod
    found = plan.plan(gpt2, chip, devices, Sizes(data=64, tensor=4))
    told = "\n".join(plans.lines(gpt2, "v5e:16x16", found))
    assert "on 256 chips of v5e:16x16, mesh data=64,tensor=4" in told
    assert "verdict: it fits" in told
    least, most = found.utilisation
    assert 0 < least < most <= 1


def test_what_cannot_be_planned_is_refused(pod, gpt2):
    chip, devices = pod
    with pytest.raises(MeshError, match="tensor = 256 does not divide 12 heads"):
        plan.plan(gpt2, chip, devices, Sizes(tensor=256))
    with pytest.raises(PlanError, match="wants 512 devices, the topology has 256"):
        plan.plan(gpt2, chip, devices, Sizes(data=512))
    with pytest.raises(PlanError, match="expected a chip and its arrangement"):
        plan.topology("tpu9:2x2")
    with pytest.raises(PlanError, match="--topology v5e:3x999"):
        plan.topology("v5e:3x999")
