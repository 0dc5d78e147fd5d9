"""Rungs 2 and 4 on small models: float32 equals diffusers', bfloat16 errs no more than theirs."""

import oracle
import pairs
import pytest
import small
import torch
from torch import nn

from sd3min import mmdit as mmdit_module
from sd3min.probes.precision import computing_in

SHORT_PROMPTS = ["a red circle", "", "a blue square on gray", "a pink star", "a cat"]
BUILDS = {
    **{
        variant: lambda dtype, _, config=config: pairs.mmdit_pair(
            small.mmdit(config).to(dtype), "small", 5
        )
        for variant, config in small.VARIANTS.items()
    },
    "autoencoder": lambda dtype, _: pairs.autoencoder_pair(small.autoencoder().to(dtype), 64, 5),
    "text encoders": lambda dtype, folder: pairs.text_pair(
        small.encoders(small.tokenizers(folder)).to(dtype), SHORT_PROMPTS
    ),
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("part", BUILDS)
def test_float32_equals_diffusers(part, tmp_path):
    for figures in BUILDS[part](torch.float32, tmp_path).figures():
        assert figures.apart <= figures.allowed, figures
        assert figures.double <= figures.double_allowed, figures
        assert figures.nudged > 10 * figures.allowed, "the comparison cannot fail"


@pytest.mark.parametrize("part", BUILDS)
def test_bfloat16_errs_no_more_than_diffusers(part, tmp_path):
    for figures in BUILDS[part](torch.bfloat16, tmp_path).half_figures():
        assert min(figures.ours) > 1e-4, "the comparison cannot fail"
        assert figures.ratio <= oracle.RUNG_4, figures


def test_a_rounding_too_many_shows_in_bfloat16(monkeypatch):
    """The sinusoid in the network's own precision: its arguments reach 1000."""
    whole = mmdit_module.sinusoid
    pair = BUILDS["SD3-medium"](torch.bfloat16, None)

    def rounded(timesteps, width=mmdit_module.SINUSOIDS):
        return whole(timesteps.bfloat16().float(), width)

    (exact,), (theirs,) = pair.exact().values(), pair.run_theirs(torch.bfloat16).values()
    monkeypatch.setattr(mmdit_module, "sinusoid", rounded)
    (ours,) = pair.run_ours(torch.bfloat16).values()
    errors = (pairs.distances(ours, exact), pairs.distances(theirs, exact))
    assert pairs.HalfFigures("", 0, *errors).ratio > oracle.RUNG_4


@pytest.mark.parametrize("whole", [0, 10**9])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_computing_in_float64_is_converting_and_leaves_no_trace(monkeypatch, whole, stored):
    monkeypatch.setattr("sd3min.probes.precision.WHOLE", whole)
    module = small.mmdit().to(stored)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = oracle.inputs(module)
    with computing_in(torch.float64, module):
        inside = module(*given)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == stored and torch.equal(tensor, before[name]), name
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    assert torch.equal(inside, module.double()(*given))


@pytest.mark.parametrize("whole", [0, 10**9])
def test_computing_in_another_type_ends_where_a_call_fails(monkeypatch, whole):
    monkeypatch.setattr("sd3min.probes.precision.WHOLE", whole)
    module = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2)]), "rest": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError), computing_in(torch.float64, module):
        module["list"][0](torch.ones(3, 3))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
