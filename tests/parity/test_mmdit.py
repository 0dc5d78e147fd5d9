"""Rung 1: the MMDiT equals diffusers' in float64, in every variant."""

import oracle
import pytest
import small
import torch

from sd3min import formats

TOLERANCES = {
    "SD3-medium": oracle.RUNG_1,
    "SD3.5-medium": oracle.RUNG_1_QK_NORM,
    "SD3.5-large": oracle.RUNG_1_QK_NORM,
}


@pytest.fixture(scope="module", params=small.VARIANTS)
def pair(request):
    mmdit = small.mmdit(small.VARIANTS[request.param]).double()
    return request.param, mmdit, oracle.transformer(mmdit)


@torch.no_grad()
def test_velocity_equals_diffusers_in_float64(pair):
    variant, mmdit, model = pair
    given = oracle.inputs(mmdit)
    assert oracle.relative(mmdit(*given), oracle.velocity(model, *given)) < TOLERANCES[variant]


@torch.no_grad()
def test_velocity_equals_diffusers_with_exact_norms_to_rounding(pair):
    _, mmdit, _ = pair
    given, model = oracle.inputs(mmdit), oracle.with_exact_norms(oracle.transformer(mmdit))
    assert oracle.relative(mmdit(*given), oracle.velocity(model, *given)) < oracle.RUNG_1


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 2), (24, 24), (2, 14), (18, 4)])
def test_every_latent_shape_within_the_table_equals_diffusers(pair, shape):
    variant, mmdit, model = pair
    given = oracle.inputs(mmdit, 2, *shape)
    assert oracle.relative(mmdit(*given), oracle.velocity(model, *given)) < TOLERANCES[variant]


@torch.no_grad()
def test_moving_any_tensor_moves_both_outputs_alike(pair):
    """Each tensor is nudged in turn: a tensor that is not used, or used elsewhere, would show.

    Only the norm of the last text queries does nothing: nobody reads what they gather.
    """
    variant, mmdit, model = pair
    given = oracle.inputs(mmdit, 1, 4, 6)
    before, converted = mmdit(*given), model.state_dict()
    for name, tensor in mmdit.state_dict().items():
        original = tensor.clone()
        tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
        renamed = formats.to_diffusers({name: tensor}, mmdit.config)
        backups = {key: converted[key].clone() for key in renamed}
        for key, value in renamed.items():
            converted[key].copy_(value)
        ours, other = mmdit(*given), oracle.velocity(model, *given)
        unread = name == f"joint_blocks.{mmdit.config.depth - 1}.context_block.attn.ln_q.weight"
        assert unread or (ours - before).abs().max() > 1e-7, f"{name} is not used"
        assert oracle.relative(ours, other) < TOLERANCES[variant], name
        tensor.copy_(original)
        for key, value in backups.items():
            converted[key].copy_(value)


@torch.no_grad()
def test_names_go_to_diffusers_and_back_unchanged(pair):
    _, mmdit, model = pair
    back = small.from_diffusers(model.state_dict())
    assert back.keys() == mmdit.state_dict().keys()
    for name, tensor in mmdit.state_dict().items():
        assert torch.equal(back[name], tensor), name
