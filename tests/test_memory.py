"""Plans of memory: parts that come and go make the pictures of parts that stay."""

import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import sd3min
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.fast import stages
from sd3min.fast.stages import MEMORY
from sd3min.fast.stream import Ahead, streamed_encoder, unmapped
from sd3min.text_encoders import Conditioning

CPU = torch.device("cpu")
PROMPTS = ["a red circle above a blue square on gray", "a cat", "a green star"]


def pixels(pipe, **given):
    call = {"seed": 1, "progress": False, "width": 32, "height": 48, "steps": 2} | given
    return np.stack([np.asarray(image) for image in pipe(PROMPTS, **call)]).astype(int)


def start():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("t5", [True, False])
def test_pictures_are_the_plain_pipelines_to_one_level(memory, t5, whole):
    plain, staged = (sd3min.load(whole, t5=t5, memory=name) for name in (None, memory))
    for given in ({}, {"guidance_scale": 1.0, "sampler": "dpmpp_2m"}, {"init_image": start()}):
        difference = np.abs(pixels(plain, **given) - pixels(staged, **given))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.005


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_pictures_are_the_same_bytes_whatever_is_kept(memory, whole):
    for given in ({}, {"init_image": start()}):
        kept, staged = (pixels(sd3min.load(whole, memory=m), **given) for m in ("fast", memory))
        assert np.array_equal(kept, staged)


def test_nothing_is_loaded_before_a_picture_is_made(whole):
    staged = sd3min.load(whole, memory="resident")
    assert staged.stages.held == {}
    assert staged.config.depth == 2 and staged.text_encoders.has_t5
    with pytest.raises(Refusal):
        staged("a cat", width=17)
    assert staged.stages.held == {}


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_one_part_is_alive_at_a_time(memory, whole):
    staged, alive, order = sd3min.load(whole, memory=memory), weakref.WeakSet(), []
    for name, make in list(staged.stages.loaders.items()):

        def load(name=name, make=make):
            assert len(alive) == 0, f"{name} is loaded while {alive} are there"
            order.append(name)
            part = make()
            alive.add(part)
            return part

        staged.stages.loaders[name] = load
    pixels(staged)
    assert order == ["clip_l", "clip_g", "t5", "network", "autoencoder"]
    order.clear()
    pixels(staged, init_image=start())
    assert order == ["clip_l", "clip_g", "t5", "autoencoder", "network", "autoencoder"]


def test_a_preview_between_steps_only_costs_a_stage(whole):
    staged = sd3min.load(whole, memory="resident")
    seen = []
    made = pixels(
        staged, on_step=lambda step: seen.append(staged.autoencoder.decode(step.denoised))
    )
    assert len(seen) == 2
    assert np.array_equal(made, pixels(staged))


def test_the_plain_network_is_there_for_who_asks(whole):
    pipe = sd3min.load(whole)
    staged = sd3min.load(whole, memory="stream")
    latents = torch.randn(1, 16, 4, 6)
    text = staged.encode_prompt(["a cat"])
    given = latents, torch.tensor([500.0]), *text
    torch.testing.assert_close(staged.mmdit(*given), pipe.mmdit(*given), rtol=0, atol=0)
    with pytest.raises(AttributeError):
        staged.unet  # noqa: B018


def test_a_plan_of_another_name_is_refused(whole):
    with pytest.raises(Refusal, match="memory small is not one of fast, resident, stream"):
        sd3min.load(whole, memory="small")


# streaming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_sent_block_by_block_is_the_kept_one(dtype, whole):
    """As to a GPU, for which the CPU stands in."""
    part = Checkpoint.open(whole).parts["mmdit"]
    kept = stages.network(part, dtype, CPU, lambda linear: linear)
    sent = stages.sent(part, dtype, CPU)
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 16, 6, 10), (2, 9, 320), (2, 192)
    latents, *said = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    text = Conditioning(*said)
    runs = [made.prepare(text, torch.tensor([900.0, 20.5])) for made in (kept, sent)]
    for i in (1, 0, 1):
        assert torch.equal(*(run(latents, i) for run in runs))


class Noted(torch.nn.Module):
    def __init__(self, i):
        super().__init__()
        self.i, self.thread = i, threading.current_thread()


def test_modules_come_in_order_again_and_again_from_another_thread():
    made = []

    def make(i):
        made.append(i)
        return Noted(i)

    ahead = Ahead(make, 3, CPU)
    for _ in range(3):
        got = list(ahead)
        assert [module.i for module in got] == [0, 1, 2]
        assert threading.current_thread() not in [module.thread for module in got]
    assert made == [0, 1, 2] * 3


def test_a_pass_that_was_broken_off_does_not_confuse_the_next():
    ahead = Ahead(Noted, 4, CPU)
    for module in ahead:
        if module.i == 1:
            break
    assert [module.i for module in ahead] == [0, 1, 2, 3]


def test_the_next_module_is_made_while_one_is_used_and_not_the_one_after():
    made = [threading.Event() for _ in range(4)]

    def make(i):
        made[i].set()
        return Noted(i)

    passing = iter(Ahead(make, 4, CPU))
    next(passing)
    assert made[1].wait(5) and not made[2].wait(0.1)
    next(passing)
    assert made[2].wait(5) and not made[3].wait(0.1)


def test_what_goes_wrong_while_reading_is_raised_where_it_is_used():
    def make(i):
        if i == 1:
            raise OSError("the disk is gone")
        return Noted(i)

    passing = iter(Ahead(make, 3, CPU))
    next(passing)
    with pytest.raises(OSError, match="the disk is gone"):
        next(passing)


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_streamed_encoder_is_the_encoder_and_is_empty_between_calls(name, dtype, whole):
    part = Checkpoint.open(whole).parts[name]
    plain, streamed = part.load(dtype, CPU), streamed_encoder(part, dtype, CPU)
    assert (streamed.device, streamed.dtype) == (plain.device, plain.dtype)
    for ids in (torch.tensor([[3, 6, 17, 4]]), torch.tensor([[3, 1], [7, 6], [0, 2]])):
        for _ in range(2):
            one, other = (model(ids, output_hidden_states=True) for model in (plain, streamed))
            for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
            torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    held = [
        n for n, tensor in streamed.state_dict().items() if tensor.numel() and not tensor.is_meta
    ]
    assert not [n for n in held if ".layers." in n or ".block." in n or "token" in n]


def test_tensors_read_apart_are_the_mapped_ones(whole):
    for part in Checkpoint.open(whole).parts.values():
        apart = unmapped(part, CPU)
        for name, tensor in part.tensors.items():
            own = apart.tensors[name].read()
            torch.testing.assert_close(own, tensor.read(), rtol=0, atol=0)
            assert own.data_ptr() != tensor.read().data_ptr()
