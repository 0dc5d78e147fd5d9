import json
import math
import subprocess
import sys

import numpy as np
import pytest
import small
import torch
from PIL import Image

import sd3min
from sd3min import flow
from sd3min.config import Defaults
from sd3min.settings import Settings, check_call

PROMPT = "a red circle above a blue square on gray"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizers"))


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def make(pipe, prompt=PROMPT, **given):
    return pixels(pipe(prompt, **({"seed": 1, "progress": False} | given)))


def start():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def test_the_same_call_gives_the_same_bytes(pipe):
    assert np.array_equal(make(pipe), make(pipe))
    assert not np.array_equal(make(pipe), make(pipe, seed=2))


def test_size_is_what_was_asked_for(pipe):
    assert make(pipe, width=96, height=32).shape == (1, 32, 96, 3)
    assert make(pipe).shape == (1, 48, 64, 3)


def test_pictures_come_prompt_by_prompt_and_seeds_count_up(pipe):
    four = pipe(["a red circle", "a cat"], num_images=2, seed=5, progress=False)
    records = [json.loads(image.info["sd3min"]) for image in four]
    assert [record["prompt"] for record in records] == ["a red circle"] * 2 + ["a cat"] * 2
    assert [record["seed"] for record in records] == [5, 6, 7, 8]
    alone = make(pipe, "a cat", seed=8)[0].astype(int)
    assert np.abs(alone - np.asarray(four[3])).max() <= 1


def test_a_list_of_seeds_gives_one_to_each_picture(pipe):
    both = make(pipe, [PROMPT, PROMPT], seed=[3, 4])
    swapped = make(pipe, [PROMPT, PROMPT], seed=[4, 3])
    assert np.array_equal(both[0], swapped[1])


def test_without_a_seed_the_picture_records_the_one_it_drew(pipe):
    image = pipe(PROMPT, progress=False)[0]
    seed = json.loads(image.info["sd3min"])["seed"]
    assert np.array_equal(np.asarray(image)[None], make(pipe, seed=seed))


def test_negative_prompt_matters_only_under_guidance(pipe):
    plain, negative = make(pipe), make(pipe, negative_prompt="a cat")
    assert not np.array_equal(plain, negative)
    unguided = (
        make(pipe, guidance_scale=1.0),
        make(pipe, guidance_scale=1.0, negative_prompt="a cat"),
    )
    assert np.array_equal(*unguided)


def test_on_step_sees_latents_and_the_picture_they_point_at(pipe):
    seen = []
    images = pipe(PROMPT, seed=1, progress=False, on_step=seen.append)
    assert [step.i for step in seen] == [0, 1, 2, 3]
    assert seen[0].t == 1.0
    last = seen[-1]
    torch.testing.assert_close(last.next_latents, last.denoised, rtol=0, atol=1e-5)
    decoded = pipe.autoencoder.decode(last.denoised)[0].permute(1, 2, 0)
    levels = (255 * (decoded / 2 + 0.5).clamp(0, 1)).round().numpy()
    assert np.abs(levels - np.asarray(images[0])).max() <= 1


def test_weak_image_to_image_stays_near_the_start(pipe):
    decoded = pipe.autoencoder.decode(pipe.autoencoder.encode(sd3min.pipeline.to_tensor(start())))
    reconstructed = np.asarray(sd3min.pipeline.to_pictures(decoded)[0]).astype(int)

    def distance(strength):
        found = make(pipe, init_image=start(), strength=strength, steps=20)[0]
        return np.abs(found - reconstructed).mean()

    assert distance(0.05) < distance(1.0)


def test_image_to_image_keeps_the_size_of_its_start_or_takes_the_one_given(pipe):
    assert make(pipe, init_image=start().resize((80, 32))).shape == (1, 32, 80, 3)
    assert make(pipe, init_image=start(), width=32, height=32).shape == (1, 32, 32, 3)


def test_image_to_image_takes_grey_and_transparent_pictures(pipe):
    for mode in ("L", "RGBA", "P"):
        assert make(pipe, init_image=start().convert(mode)).shape == (1, 48, 64, 3)
    smooth = make(pipe, init_image=start().convert("P"), width=32, height=32, strength=0.05)
    assert len(np.unique(smooth)) > 64  # a palette is resolved before it is resized


@pytest.mark.parametrize(
    ("steps", "strength", "kept"),
    [(40, 0.8, 32), (50, 0.9, 45), (20, 0.8, 16), (28, 0.6, 17), (10, 1.0, 10), (4, 0.01, 1)],
)
def test_image_to_image_keeps_as_many_steps_as_diffusers(steps, strength, kept):
    """Of 40 steps at strength 0.8 the official code keeps 33; this is diffusers' count."""
    settings = Settings(64, 64, steps, 4.0, 3.0, 16, strength=strength)
    assert len(settings.times(partly=True)) - 1 == kept


def test_autoencoder_sample_is_drawn_before_the_noise(pipe):
    """One generator serves both: the order decides the pixels."""
    seen = []
    given = {"init_image": start(), "strength": 1.0, "seed": 4, "progress": False}
    pipe(PROMPT, on_step=seen.append, **given)
    generator = torch.Generator().manual_seed(4)
    torch.randn(1, 16, 6, 8, generator=generator)
    noise = torch.randn(1, 16, 6, 8, generator=generator)
    torch.testing.assert_close(seen[0].latents, noise)


def test_longer_t5_context_changes_the_picture(pipe):
    assert not np.array_equal(make(pipe), make(pipe, t5_length=24))
    assert pipe.encode_prompt([PROMPT], 24).context.shape[1] == 16 + 24
    assert pipe.encode_prompt([PROMPT]).context.shape[1] == 16 + 16


def test_bfloat16_gives_a_similar_picture(pipe):
    parts = small.mmdit(), small.autoencoder()
    encoders = small.encoders(pipe.text_encoders.tokenizers)
    rounded = sd3min.Pipeline(
        *(part.bfloat16() for part in (*parts, encoders)), defaults=small.DEFAULTS
    )
    difference = np.abs(make(rounded).astype(int) - make(pipe)).mean()
    assert 0 < difference < 12


def test_png_carries_the_record_and_is_written_whole(pipe, tmp_path):
    image = pipe(PROMPT, seed=7, steps=2, progress=False)[0]
    sd3min.save(image, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as found:
        record = json.loads(found.info["sd3min"])
        assert np.array_equal(np.asarray(found), np.asarray(image))
    assert record["prompt"] == PROMPT and record["seed"] == 7 and record["steps"] == 2
    assert record["versions"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [tmp_path / "picture.png"]


GOOD = {"prompt": PROMPT, "steps": 4, "width": 64, "height": 64}
BAD = {
    "size not a multiple of 16": ({"width": 100}, "width 100 .*16 pixels; the nearest is 96"),
    "size zero": ({"height": 0}, "height 0"),
    "size beyond the table": ({"width": 1024}, "1024x64 is beyond .*at most 192"),
    "no steps": ({"steps": 0}, "steps 0 .*from 1 to 1000"),
    "negative steps": ({"steps": -3}, "steps -3"),
    "steps true": ({"steps": True}, "steps True"),
    "guidance nan": ({"guidance_scale": math.nan}, "guidance_scale nan"),
    "guidance negative": ({"guidance_scale": -1.0}, "guidance_scale -1.0"),
    "guidance infinite": ({"guidance_scale": math.inf}, "guidance_scale inf"),
    "shift nan": ({"shift": math.nan}, "shift nan"),
    "shift zero": ({"shift": 0.0}, "shift 0.0"),
    "shift too large for arithmetic": ({"shift": 1e300}, "shift 1e.300 is not a number from"),
    "too many steps": ({"steps": 10**12}, "steps 1000000000000 .*to 1000"),
    "half a character": ({"prompt": "a \ud800 cat"}, "not all texts"),
    "shift infinite": ({"shift": math.inf}, "shift inf"),
    "strength zero": ({"strength": 0.0}, "strength 0.0"),
    "strength above one": ({"strength": 1.01}, "strength 1.01"),
    "strength nan": ({"strength": math.nan}, "strength nan"),
    "unknown sampler": ({"sampler": "magic"}, "sampler magic is not one of euler"),
    "unknown schedule": ({"schedule": "magic"}, "schedule magic is not one of official"),
    "unknown setting": ({"step": 3}, "setting step is not one of width"),
    "rising sigmas": ({"sigmas": [0.5, 1.0]}, "sigmas"),
    "sigmas to zero": ({"sigmas": [1.0, 0.0]}, "sigmas"),
    "no sigmas": ({"sigmas": []}, "sigmas"),
    "no prompts": ({"prompt": []}, "list of prompts is empty"),
    "negative prompts of another count": ({"negative_prompt": ["a", "b"]}, "2 negative prompts"),
    "seeds of the wrong count": ({"seed": [1, 2]}, "2 seeds were given for 1 pictures"),
    "negative seed": ({"seed": -1}, "seed -1"),
    "seed too large": ({"seed": 2**63}, "seed 9223372036854775808"),
    "no pictures": ({"num_images": 0}, "num_images 0"),
    "no t5 rows": ({"t5_length": 0}, "t5_length 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_before_any_work(case):
    change, sentence = BAD[case]
    config, defaults = small.VARIANTS["SD3-medium"], Defaults()
    assert check_call(config, defaults, **GOOD).settings.steps == 4
    with pytest.raises(sd3min.Refusal, match=sentence) as refusal:
        check_call(config, defaults, **(GOOD | change))
    assert "\n" not in str(refusal.value)


WRONG_TYPES = """
import numpy as np
from sd3min import Refusal
from sd3min.config import Defaults, MMDiTConfig
from sd3min.settings import check_call
for change in (
    {"height": 64.0}, {"steps": "28"}, {"prompt": [3]}, {"seed": 1.5}, {"shift": "3"},
    {"init_image": "start.png"}, {"mask_image": np.zeros((16, 16))}, {"keep_unmasked": "yes"},
    {"conventions": ["sd3-ref"]}, {"sampler": ["euler"]}, {"without_t5": {}},
):
    try:
        check_call(MMDiTConfig(depth=2), Defaults(), **({"prompt": "a cat"} | change))
    except Refusal as refusal:
        print(refusal)
numbers = {"steps": np.int64(2), "width": np.int32(32), "shift": np.float32(2), "seed": np.int64(1)}
chosen = check_call(MMDiTConfig(depth=2), Defaults(), "a cat", **numbers).settings
assert len(chosen.times()) == 3
"""


def test_wrong_types_are_refused_and_numpys_numbers_taken():
    run = [sys.executable, "-c", WRONG_TYPES]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 11, printed


def test_the_schedule_can_be_chosen(pipe):
    assert not np.array_equal(make(pipe), make(pipe, schedule="single_shift"))
    own = make(pipe, sigmas=tuple(np.linspace(1, 0.001, 4)))
    single = make(pipe, schedule="single_shift")
    assert np.abs(own.astype(int) - single).max() <= 1
    assert flow.sigmas(4).shape == (5,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_picture(pipe):
    """The noise is the CPU's, so only the arithmetic of the device differs."""
    parts = small.mmdit(), small.autoencoder(), small.encoders(pipe.text_encoders.tokenizers)
    there = sd3min.Pipeline(*(part.cuda() for part in parts), defaults=small.DEFAULTS)
    for given in ({}, {"init_image": start(), "strength": 0.7}):
        difference = np.abs(make(there, **given).astype(int) - make(pipe, **given))
        assert difference.mean() < 0.5


def spot(mode="L"):
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (16, 8, 40, 32))
    return mask.convert(mode)


def test_inpainting_keeps_every_pixel_outside_the_mask_unless_told_not_to(pipe):
    call = {"init_image": start(), "mask_image": spot(), "strength": 0.8}
    white = np.asarray(spot()) > 0
    kept, whole = make(pipe, **call)[0], make(pipe, keep_unmasked=False, **call)[0]
    assert np.array_equal(kept[~white], np.asarray(start())[~white])
    assert np.array_equal(kept[white], whole[white])
    assert not np.array_equal(whole[~white], np.asarray(start())[~white])
    assert not np.array_equal(kept[white], np.asarray(start())[white])


def test_a_black_mask_repaints_nothing_and_a_white_one_is_image_to_image(pipe):
    black, white = (Image.new("L", (64, 48), level) for level in (0, 255))
    call = {"init_image": start(), "strength": 0.8}
    assert np.array_equal(make(pipe, mask_image=black, **call)[0], np.asarray(start()))
    assert np.array_equal(make(pipe, mask_image=white, **call), make(pipe, **call))


def test_black_latents_end_as_the_starting_pictures_and_pass_through_its_noise(pipe):
    seen = []
    given = {"init_image": start(), "mask_image": spot(), "strength": 1.0, "steps": 4}
    pipe(PROMPT, seed=4, progress=False, on_step=seen.append, **given)
    generator = torch.Generator().manual_seed(4)
    moments = pipe.autoencoder.moments(sd3min.pipeline.to_tensor(start()))
    data = sd3min.autoencoder.posterior_sample(*moments, generator)
    noise = torch.randn(1, 16, 6, 8, generator=generator)
    for step, t in zip(seen, [*(step.t for step in seen[1:]), torch.tensor(0.0)], strict=True):
        expected = flow.interpolate(data, noise, t)
        found = step.next_latents
        torch.testing.assert_close(found[:, :, :, 5:], expected[:, :, :, 5:])
        assert (found - expected)[:, :, 1:4, 2:5].abs().min() > 1e-6


def test_grey_is_held_back_until_its_share_of_the_steps_is_left(pipe):
    """At 8 steps, half grey is free from the one after which 4 are left."""
    seen = []
    mask = Image.new("L", (64, 48), 0)
    mask.paste(128, (16, 8, 40, 32))
    mask.paste(255, (48, 0, 64, 48))
    given = {"init_image": start(), "mask_image": mask, "strength": 1.0, "steps": 8}
    pipe(PROMPT, seed=4, progress=False, on_step=seen.append, **given)
    mode = pipe.autoencoder.encode(
        sd3min.pipeline.to_tensor(start()), torch.Generator().manual_seed(4)
    )
    noise = seen[0].latents
    for step in seen[:-1]:
        held = flow.interpolate(mode, noise, seen[step.i + 1].t)
        free = (step.next_latents - held).abs() > 1e-5
        assert not free[:, :, 5:, :5].any() and free[:, :, :, 6:].float().mean() > 0.9
        grey = free[:, :, 1:4, 2:5]
        assert grey.float().mean() > 0.9 if step.i >= 3 else not grey.any()


def test_a_mask_of_black_and_white_stays_so_at_another_size():
    mask, soft = spot(), Image.linear_gradient("L")
    assert set(np.unique(np.asarray(sd3min.pipeline.fit_mask(mask, (48, 32))))) == {0, 255}
    assert len(np.unique(np.asarray(sd3min.pipeline.fit_mask(soft, (48, 32))))) > 20
    cells = sd3min.pipeline.to_mask(mask, (64, 48))[0, 0]
    assert cells.shape == (6, 8) and cells[1:4, 2:5].min() == 1 and cells.sum() == 9


def test_masks_of_every_readable_mode_are_the_same(pipe):
    call = {"init_image": start(), "steps": 2}
    expected = make(pipe, mask_image=spot(), **call)
    for mode in ("1", "P", "RGB", "RGBA", "LA"):
        assert np.array_equal(make(pipe, mask_image=spot(mode), **call), expected)


BAD_PICTURES = {
    "mask without a start": ({"init_image": None}, "pass init_image too"),
    "mask of another size": ({"mask_image": Image.new("L", (48, 64))}, "48x64 and init_image 64x"),
    "mask that is thin": ({"mask_image": Image.new("RGBA", (64, 48), (9, 9, 9, 9))}, "mode RGBA"),
    "deep mask": ({"mask_image": Image.new("I", (64, 48))}, "mode I cannot be read as a mask"),
    "mask of floats": ({"mask_image": Image.new("F", (64, 48))}, "mode F cannot be read"),
    "unknown conventions": ({"conventions": "webui"}, "conventions webui is not one of diffusers"),
    "unknown meaning of no T5": ({"without_t5": "none"}, "without_t5 none is not one of zeros, pa"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_or_convention_is_refused_before_any_work(case):
    change, sentence = BAD_PICTURES[case]
    config, good = small.VARIANTS["SD3-medium"], {"init_image": start(), "mask_image": spot()}
    check_call(config, Defaults(), PROMPT, **good)
    with pytest.raises(sd3min.Refusal, match=sentence) as refusal:
        check_call(config, Defaults(), PROMPT, **(good | change))
    assert "\n" not in str(refusal.value)
