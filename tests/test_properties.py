"""Properties that hold for whatever hypothesis thinks of: sizes, schedules, names, seeds, texts."""

import warnings
from itertools import pairwise

import files
import numpy as np
import oracle
import pytest
import small
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import PatchEmbed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5Tokenizer

from sd3min import flow, formats, text_encoders
from sd3min.config import AutoencoderConfig, MMDiTConfig
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline

quick = settings(deadline=None, max_examples=30, derandomize=True)
slow = settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ONE_ULP = 1.2e-7  # of a time near 1 in float32
BATCHED = 1  # levels of 255 by which a picture may differ when others share its batch

sides = st.integers(1, 192)  # of a picture in patches, 16 to 3072 pixels
shifts = st.floats(0.01, 100)
mmdit_configs = st.builds(
    MMDiTConfig,
    depth=st.integers(1, 3),
    context_width=st.integers(1, 9),
    pooled_width=st.integers(1, 9),
    grid=st.integers(1, 6),
    qk_norm=st.booleans(),
    dual_blocks=st.integers(0, 1),
)
autoencoder_configs = st.builds(
    AutoencoderConfig,
    widths=st.lists(st.sampled_from([32, 64]), min_size=1, max_size=4).map(tuple),
    blocks=st.integers(1, 2),
)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Pipeline:
    return small.pipeline(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large_grid() -> MMDiT:
    """One block of width 64 with the official table's 192x192 positions."""
    return small.mmdit(MMDiTConfig(depth=1, context_width=8, pooled_width=8))


@quick
@given(st.integers(2, 300), st.floats(0.5, 100), st.sampled_from(list(flow.SCHEDULES)))
def test_schedules_fall_from_one_to_zero(steps, shift, name):
    times = flow.sigmas(steps, shift, name)
    assert len(times) == steps + 1 and times[-1] == 0
    assert times[0].item() == pytest.approx(1, abs=1e-6)  # float32, twice shifted
    assert all(above > below for above, below in pairwise(times.tolist()))


@quick
@given(st.integers(1, 300), shifts)
def test_official_schedule_equals_diffusers_for_any_steps_and_shift(steps, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(flow.sigmas(steps, shift), theirs.sigmas, rtol=0, atol=ONE_ULP)


@quick
@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=20, unique=True).map(
        lambda times: [t / 10_000 for t in sorted(times, reverse=True)]
    ),
    shifts,
)
def test_own_times_keep_their_order_and_equal_diffusers(times, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=times)
    ours = flow.sigmas(times, shift)
    torch.testing.assert_close(ours, theirs.sigmas, rtol=0, atol=ONE_ULP)
    assert (ours.diff() <= 0).all() and ours[-1] == 0


@quick
@given(st.floats(0, 1), shifts)
def test_shifting_there_and_back_gives_the_time_again(t, shift):
    assert flow.shift_times(flow.shift_times(t, shift), 1 / shift) == pytest.approx(t, abs=1e-9)


@quick
@given(mmdit_configs)
def test_mmdits_names_survive_the_way_to_diffusers_and_back(config):
    tensors = small.mmdit(config).state_dict()
    there = formats.to_diffusers(tensors, config)
    model = oracle.transformer(small.mmdit(config))
    assert {name: tensor.shape for name, tensor in there.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    back = small.from_diffusers(there)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert MMDiTConfig.from_shapes({n: list(t.shape) for n, t in back.items()}) == config


@slow
@given(autoencoder_configs)
def test_autoencoders_names_survive_the_way_to_diffusers_and_back(config):
    tensors = small.autoencoder(config).state_dict()
    back = small.from_diffusers(formats.to_diffusers(tensors, config))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@slow
@given(sides, sides)
@example(1, 192)
@example(192, 1)
@example(64, 64)
def test_positions_of_any_size_are_diffusers_crop(large_grid, h, w):
    crop = PatchEmbed(
        height=384, width=384, patch_size=2, in_channels=16, embed_dim=64, pos_embed_max_size=192
    )
    crop.pos_embed = large_grid.pos_embed
    assert torch.equal(large_grid.positions(h, w), crop.cropped_pos_embed(2 * h, 2 * w))


@slow
@given(st.integers(1, 12), st.integers(1, 12), st.data())
@example(1, 192, None)
@example(192, 1, None)
def test_patches_come_back_to_where_they_were_taken(large_grid, h, w, data):
    """With closed gates no patch hears of another, so a change stays in its own place."""
    block = large_grid.joint_blocks[0].x_block
    for tensor in block.adaLN_modulation[1].parameters():
        tensor.data.zero_()
    row = data.draw(st.integers(0, h - 1)) if data else h - 1
    column = data.draw(st.integers(0, w - 1)) if data else w - 1
    generator = torch.Generator().manual_seed(h * 1000 + w)
    given_text = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 8, generator=generator)
    latents = torch.randn(1, 16, 2 * h, 2 * w, generator=generator)
    changed = latents.clone()
    changed[:, 5, 2 * row + 1, 2 * column] += 3
    t = torch.tensor([500.0])
    moved = large_grid(latents, t, *given_text) != large_grid(changed, t, *given_text)
    assert moved[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].all()
    assert moved.sum() == 16 * 4


@slow
@given(st.integers(0, 2**63 - 1 - 8), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_a_picture_depends_on_its_own_prompt_and_seed_alone(pipe, seed, count, h, w):
    """Picture i of a batch is the picture that its prompt and seed give alone."""
    call = {"width": 16 * w, "height": 16 * h, "steps": 2, "progress": False}
    prompts = ["a red circle on gray", "a pink star"]
    together = pipe(prompts, num_images=count, seed=seed, **call)
    place = len(together) - 1
    (alone,) = pipe(prompts[place // count], seed=seed + place, **call)
    difference = np.abs(np.asarray(alone, int) - np.asarray(together[place], int))
    assert difference.max() <= BATCHED


TEXTS = [
    "",
    "!",
    "a cat!! sat!",
    "word " * 300,
    "a 🦊 with 👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "قطة تجلس على السجادة",
    "一只猫坐在垫子上",
    "two\nlines\r\nand\ttabs   and spaces",
    "ﬁne &amp; ½ — “quotes” …",
    "\u200b\u202e\ufeff",
    "a" * 2000,
    "<|endoftext|> in the middle </s> <pad>",
]


@pytest.fixture(scope="module")
def real_tokenizers() -> list:
    if not files.TOKENIZERS.is_dir():
        pytest.skip("the official tokenizers are not at hand")
    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}
    return [kind.from_pretrained(files.TOKENIZERS / place) for place, kind in kinds.items()]


def check_ids(tokenizer, text: str, length: int) -> None:
    """The ids are those of diffusers' call, and what a warning quotes is the end of the text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = text_encoders.token_ids(tokenizer, [text], length, "it")
    expected = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    assert torch.equal(ids, expected.input_ids)
    whole = tokenizer(text, truncation=False, verbose=False).input_ids
    quoted = [str(w.message).split('did not see: "')[1][:-1] for w in caught]
    assert bool(quoted) == (len(whole) > length)
    assert all(text.strip().endswith(end) for end in quoted)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_becomes_the_ids_that_diffusers_reads(real_tokenizers, text):
    for tokenizer, length in zip(real_tokenizers, (77, 77, 256), strict=True):
        check_ids(tokenizer, text, length)


@quick
@given(st.text(max_size=400))
def test_any_text_at_all_becomes_the_ids_that_diffusers_reads(pipe, text):
    for tokenizer in pipe.text_encoders.tokenizers:
        check_ids(tokenizer, text, 16)
