"""The decoder in strips equals the plain one."""

import copy
from pathlib import Path

import pytest
import small
import torch
import torch.nn.functional as F
import watched
from oracle import RUNG_1, RUNG_4, relative
from torch import nn

from sd3min.config import AutoencoderConfig
from sd3min.fast.decoder import FastDecoder, Map, Upsample, framed
from sd3min.fast.plan import STRIPS

SIZES = [(5, 7), (9, 4)]
CONFIGS = {
    "narrower above": small.AUTOENCODER,
    "wider above": AutoencoderConfig((96, 64, 64), 1),
    "one level": AutoencoderConfig((32,), 1),
}


def latents(h: int, w: int, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, 16, h, w, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module", params=CONFIGS)
def decoder(request):
    return small.autoencoder(CONFIGS[request.param]).decoder.double()


@pytest.fixture(scope="module")
def fast(decoder):
    return FastDecoder(decoder)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_strips_of_any_height_give_the_plain_pictures_in_float64(decoder, fast, h, w):
    expected = decoder(latents(h, w))
    for rows in (1, 2, 3, 8, None):
        assert relative(fast(latents(h, w), rows), expected) < RUNG_1, rows


def test_pictures_do_not_depend_on_their_neighbours(fast):
    together = fast(latents(5, 7))
    for picture, alone in zip(together, latents(5, 7), strict=True):
        assert torch.equal(picture, fast(alone[None])[0])


def test_the_plain_decoder_and_the_latents_stay_as_they_were(decoder):
    before, given = {k: v.clone() for k, v in decoder.state_dict().items()}, latents(5, 7)
    fast = FastDecoder(decoder)
    first = fast(given)
    assert torch.equal(first, fast(given)) and torch.equal(given, latents(5, 7))
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == before[name].stride(), name


def test_bfloat16_is_as_near_to_float64_as_the_plain_path():
    plain = small.autoencoder().decoder.bfloat16()
    exact = copy.deepcopy(plain).double()
    fast, errors = FastDecoder(plain), []
    for seed in range(5):
        given = torch.randn(1, 16, 9, 12, generator=torch.Generator().manual_seed(seed)).bfloat16()
        expected = exact(given.double())
        ours, theirs = ((path(given) - expected).norm() for path in (fast, plain))
        errors.append((ours / theirs).item())
    assert sorted(errors)[2] <= RUNG_4


def test_four_small_convolutions_are_one_after_upsampling():
    conv = small.randomise(nn.Conv2d(6, 6, 3, padding=1)).double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 6, 5, 4, generator=generator, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    for rows in (1, 2, 5):
        strips = Upsample(conv)(Map(x.split(rows, dim=2))).strips
        torch.testing.assert_close(torch.cat(strips, dim=2), expected)


def test_statistics_gathered_from_strips_are_those_of_the_whole_map():
    """Far from zero, where a difference of squares would lose its digits."""
    generator = torch.Generator().manual_seed(3)
    x = 1000 + torch.randn(1, 64, 7, 5, generator=generator).double()
    norm = small.randomise(nn.GroupNorm(32, 64, eps=1e-6)).double()
    for rows in (1, 3, 7):
        torch.testing.assert_close(Map(x.split(rows, dim=2)).normalisation(norm)(x), norm(x))


def test_a_frame_is_a_strip_between_its_neighbours_rows_or_zeros():
    x = torch.arange(1.0, 6.0).reshape(1, 1, 5, 1)
    frames = [frame.flatten().tolist() for _, frame in framed(list(x.split(2, dim=2)), torch.neg)]
    assert frames == [[0, -1, -2, -3], [-2, -3, -4, -5], [-4, -5, 0]]


DECODE = """
import re
import sys
from pathlib import Path
import torch
from sd3min.autoencoder import Autoencoder
from sd3min.config import AutoencoderConfig
from sd3min.fast.decoder import FastDecoder

with torch.device("meta"):
    plain = Autoencoder(AutoencoderConfig((128, 256, 512, 512), 2)).decoder
decoder = FastDecoder(plain.bfloat16().to_empty(device="cpu"))
for tensor in decoder.state_dict().values():
    tensor.copy_(torch.randn(tensor.shape) / 50)
del plain, tensor
decoder(torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16))  # what is made once
text = Path("/proc/self/smaps_rollup").read_text()
print(int(re.search(r"Anonymous: +([0-9]+) kB", text)[1]) << 10)
side = int(sys.argv[1]) // 8
decoder(torch.randn(1, 16, side, side, dtype=torch.bfloat16))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's counts")
@pytest.mark.parametrize("size", [512, 1024])
def test_decoding_takes_at_most_what_the_plan_says_and_a_gigabyte(size):
    peaks = watched.run(DECODE, size)
    above = peaks["private"] - int(peaks.printed)
    planned = STRIPS * size**2 * 256 * 2  # of the widest channels at full size, in bfloat16
    print(f"{size}: {above / 1e9:.2f} GB above the weights, {planned / 1e9:.2f} by the plan")
    assert 0.75 * planned < above < min(1e9, 1.05 * planned)
