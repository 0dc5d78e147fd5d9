"""Rung 1: the autoencoder equals diffusers' in float64."""

import oracle
import pytest
import small
import torch

from sd3min import formats
from sd3min.config import AutoencoderConfig

CONFIGS = {"four levels": small.AUTOENCODER, "three levels": AutoencoderConfig((64, 96, 96), 1)}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    autoencoder = small.autoencoder(CONFIGS[request.param]).double()
    return autoencoder, oracle.vae(autoencoder)


def images(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, 3, 48, 80, generator=generator, dtype=torch.float64) * 2 - 1


@torch.no_grad()
def test_moments_equal_diffusers_in_float64(pair):
    autoencoder, vae = pair
    mean, logvar = autoencoder.moments(images())
    posterior = vae.encode(images()).latent_dist
    assert oracle.relative(mean, posterior.mean) < oracle.RUNG_1
    assert oracle.relative(logvar, posterior.logvar) < oracle.RUNG_1


@torch.no_grad()
def test_encoded_mode_is_diffusers_mode_scaled_and_shifted(pair):
    autoencoder, vae = pair
    mode = vae.encode(images()).latent_dist.mode()
    expected = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    assert oracle.relative(autoencoder.encode(images()), expected) < oracle.RUNG_1


@torch.no_grad()
def test_seeded_sample_is_diffusers_sample_in_float32(pair):
    autoencoder, vae = pair
    autoencoder, vae, pictures = autoencoder.float(), vae.float(), images().float()
    sample = vae.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(9))
    expected = (sample - vae.config.shift_factor) * vae.config.scaling_factor
    ours = autoencoder.encode(pictures, torch.Generator().manual_seed(9))
    autoencoder.double(), vae.double()
    assert oracle.relative(ours, expected) < 1e-5  # rung 2: float32


@torch.no_grad()
def test_decoded_pictures_equal_diffusers_in_float64(pair):
    autoencoder, vae = pair
    latents = torch.randn(3, 16, 6, 10, generator=torch.Generator().manual_seed(4)).double()
    unscaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    assert oracle.relative(autoencoder.decode(latents), vae.decode(unscaled).sample) < oracle.RUNG_1


@torch.no_grad()
def test_logvar_is_clamped_as_in_diffusers(pair):
    autoencoder, vae = pair
    bright = images() * 1e4
    with torch.no_grad():
        for module in (autoencoder.encoder.conv_out, vae.encoder.conv_out):
            module.bias[16:] += 100
        ours, theirs = autoencoder.moments(bright)[1], vae.encode(bright).latent_dist.logvar
        for module in (autoencoder.encoder.conv_out, vae.encoder.conv_out):
            module.bias[16:] -= 100
    assert ours.max() == 20.0
    assert oracle.relative(ours, theirs) < oracle.RUNG_1


@torch.no_grad()
def test_moving_any_tensor_moves_both_outputs_alike(pair):
    autoencoder, vae = pair
    pictures = images()[:1, :, :16, :32]
    latents = autoencoder.encode(pictures)

    def outputs():
        ours = torch.cat([part.flatten() for part in autoencoder.moments(pictures)])
        other = vae.encode(pictures).latent_dist
        other = torch.cat([other.mean.flatten(), other.logvar.flatten()])
        unscaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = autoencoder.decode(latents).flatten(), vae.decode(unscaled).sample.flatten()
        return torch.cat([ours, decoded[0]]), torch.cat([other, decoded[1]])

    before, converted = outputs()[0], vae.state_dict()
    for name, tensor in autoencoder.state_dict().items():
        original = tensor.clone()
        tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
        renamed = formats.to_diffusers({name: tensor}, autoencoder.config)
        for key, value in renamed.items():
            converted[key].copy_(value)
        ours, theirs = outputs()
        if not name.endswith("attn_1.k.bias"):  # adds the same to every score of a row
            assert (ours - before).abs().max() > 1e-7, f"{name} is not used"
        assert oracle.relative(ours, theirs) < oracle.RUNG_1, name
        tensor.copy_(original)
        for key, value in formats.to_diffusers({name: original}, autoencoder.config).items():
            converted[key].copy_(value)


@torch.no_grad()
def test_names_go_to_diffusers_and_back_unchanged(pair):
    autoencoder, vae = pair
    back = small.from_diffusers(vae.state_dict())
    assert back.keys() == autoencoder.state_dict().keys()
    for name, tensor in autoencoder.state_dict().items():
        assert torch.equal(back[name], tensor), name
