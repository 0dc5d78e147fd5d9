"""Probes see what happens, and change nothing."""

import copy
import dataclasses
import math
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import small
import torch
from files import TOKENIZERS
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sd3min
from sd3min import Refusal, flow, loading
from sd3min.conventions import CONVENTIONS
from sd3min.pipeline import Pipeline
from sd3min.probes import ablate, ablation, attention, path, plots, streams, word_rows
from sd3min.probes.ablation import without_block, without_encoder, without_head, without_word
from sd3min.probes.attention import QUADRANTS, looked
from sd3min.probes.named import Named
from sd3min.probes.path import Path
from sd3min.training import conditioning, vocabulary

MODULE = sys.modules[looked.__module__]  # its name in the package is that of a function
SINGLE = {"rtol": 1e-4, "atol": 1e-6}  # sums of a few hundred float32 shares, in two orders
PROMPT = "a red circle above a blue square on gray"
SIZES = [(64, 48), (48, 80)]  # not square, odd numbers of patches


@pytest.fixture(scope="module", params=small.VARIANTS)
def pipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return small.pipeline(folder, small.VARIANTS[request.param])


@pytest.fixture(scope="module")
def tiny():
    return sd3min.load()


@pytest.fixture(scope="module")
def large_words(tmp_path_factory):
    """A small model that reads with the real tokenizers."""
    if not TOKENIZERS.is_dir():
        pytest.skip("the real tokenizers are not here")
    from transformers import CLIPTokenizer, T5Tokenizer

    kinds = (CLIPTokenizer, CLIPTokenizer, T5Tokenizer)
    given = [
        kind.from_pretrained(TOKENIZERS / folder)
        for kind, folder in zip(kinds, vocabulary.FOLDERS, strict=True)
    ]
    return Pipeline(small.mmdit(), small.autoencoder(), small.encoders(given, length=77))


def hooks_of(pipe):
    """Every hook that a model has."""
    return [
        hook
        for part in (pipe.mmdit, pipe.autoencoder)
        for module in part.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    ]


def untouched(pipe):
    return not hooks_of(pipe) and "encode" not in vars(pipe.text_encoders)


def latents_of(pipe, *args, **kwargs):
    found = []
    pipe(*args, on_step=lambda step: found.append(step.next_latents), progress=False, **kwargs)
    return found


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


class Stop(Exception):
    pass


def stop(step):
    raise Stop


# --- attention -------------------------------------------------------------------------------


def full_maps(pipe, *args, **kwargs):
    """Whole matrices of logits, [step][layer] of [b, a, T, T], and the text's length: q and k are
    computed again from what each block was given."""
    blocks, inputs = list(pipe.mmdit.joint_blocks), []
    handles = [
        block.register_forward_pre_hook(lambda _, given: inputs.append(given)) for block in blocks
    ]
    pipe(*args, progress=False, **kwargs)
    for handle in handles:
        handle.remove()
    maps = []
    with torch.no_grad():
        for i, (context, image, cond) in enumerate(inputs):
            block = blocks[i % len(blocks)]
            (q1, k1, _), _ = block.context_block.open(context, cond)
            (q2, k2, _), _ = block.x_block.open(image, cond)
            q, k = torch.cat([q1, q2], dim=2), torch.cat([k1, k2], dim=2)
            maps.append(torch.einsum("banc,bamc->banm", q, k) / 8)
    depth = len(blocks)
    return [maps[i : i + depth] for i in range(0, len(maps), depth)], inputs[0][0].shape[1]


@pytest.mark.parametrize("rows", [7, 512])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_attention_is_that_of_the_whole_matrix(pipe, monkeypatch, rows, size, scale):
    monkeypatch.setattr(MODULE, "ROWS", rows)
    settings = {"width": size[0], "height": size[1], "guidance_scale": scale, "steps": 2}
    settings |= {"num_images": 2, "seed": 1}
    logits, texts = full_maps(pipe, PROMPT, **settings)
    _, seen = attention(pipe, PROMPT, ["red", "blue square"], **settings)
    assert seen.size == (size[1] // 16, size[0] // 16)
    rows_of = [word_rows(pipe, PROMPT, word) for word in seen.words]
    for step, layers in enumerate(logits):
        for layer, whole in enumerate(layers):
            prompts = whole[-2:]  # the negative prompt's come first
            shares = torch.exp(prompts - prompts.logsumexp(-1, keepdim=True))
            parts = [
                shares[:, :, asking, answering].sum(-1).mean(-1)
                for asking in (slice(texts), slice(texts, None))
                for answering in (slice(texts), slice(texts, None))
            ]
            nats = -(shares * torch.log(shares.clamp(min=1e-38))).sum(-1)
            entropy = torch.stack([nats[:, :, :texts].mean(-1), nats[:, :, texts:].mean(-1)], -1)
            at = {"step": step, "layer": layer}
            found = [seen.quadrants, seen.entropy, seen.largest_logit]
            wanted = [torch.stack(parts, dim=-1), entropy, prompts.flatten(2).amax(-1)]
            for named, values in zip(found, wanted, strict=True):
                torch.testing.assert_close(named.at(**at).values, values, **SINGLE)
            for word, places in zip(seen.words, rows_of, strict=True):
                heat = sum(shares[:, :, texts:, place] for place in places)
                heat = heat.unflatten(-1, seen.size)
                torch.testing.assert_close(seen.heat(word).at(**at).values, heat, **SINGLE)


def test_watching_changes_no_bit(pipe):
    plain = latents_of(pipe, PROMPT, seed=3)
    kept = []
    image, seen = attention(pipe, PROMPT, ["red"], 3, on_step=lambda s: kept.append(s.next_latents))
    walked = path(pipe, PROMPT, seed=3)
    assert same(plain, kept)
    assert same(plain, walked.latents.values[1:])
    unwatched, *_ = pipe(PROMPT, seed=3, progress=False)
    assert image.tobytes() == unwatched.tobytes() == walked.picture.tobytes()
    assert untouched(pipe)
    assert len(seen.passes) == pipe.defaults.steps


def test_sd3_tiny_is_watched_without_a_change(tiny):
    unwatched, *_ = tiny(PROMPT, seed=3, progress=False)
    image, seen = attention(tiny, PROMPT, ["red", "square"], seed=3)
    assert image.tobytes() == unwatched.tobytes()
    first, second, third, fourth = seen.quadrants.values.unbind(-1)
    torch.testing.assert_close(first + second, torch.ones_like(first))
    torch.testing.assert_close(third + fourth, torch.ones_like(third))
    patches = tiny.defaults.width // 16 * (tiny.defaults.height // 16)
    tokens = 2 * tiny.defaults.t5_length + patches
    entropy = seen.entropy.values
    assert entropy.min() > 0 and entropy.max() < math.log(tokens)
    assert str(seen.heat("red")).endswith(f"row {seen.size[0]}, column {seen.size[1]}")


def test_shares_and_entropy_of_attention_that_is_known():
    """Equal keys are attended to alike; one that stands out takes all."""
    q, k = torch.randn(1, 2, 10, 64), torch.zeros(1, 2, 10, 64)
    seen = looked(q, k, 4, [[0], [1, 2]])
    torch.testing.assert_close(seen.quadrants, torch.tensor([0.4, 0.6, 0.4, 0.6]).expand(1, 2, 4))
    torch.testing.assert_close(seen.entropy, torch.full((1, 2, 2), math.log(10)))
    torch.testing.assert_close(seen.heat[0, 0], torch.tensor([[0.1], [0.2]]).expand(2, 6))
    assert not seen.largest.any()
    q, k[:, :, 1] = torch.ones_like(q), 10
    seen = looked(q, k, 4, [[1]])
    torch.testing.assert_close(seen.quadrants, torch.tensor([1.0, 0, 1, 0]).expand(1, 2, 4))
    torch.testing.assert_close(seen.heat, torch.ones(1, 2, 1, 6))
    torch.testing.assert_close(seen.largest, torch.full((1, 2), 80.0))
    assert seen.entropy.max() < 1e-6


def test_no_matrix_of_all_tokens_is_made(monkeypatch):
    monkeypatch.setattr(MODULE, "ROWS", 16)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **(kwargs or {}))
            largest.append(made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    tokens = 300
    q, k = torch.randn(2, 1, 1, tokens, 64)
    with Sizes():
        seen = looked(q, k, 60, [[1]])
    assert max(largest) <= tokens * 64  # the tokens' own size, and 16 rows of the matrix
    assert max(t.numel() for t in vars(seen).values()) <= tokens


def test_what_is_kept_grows_with_the_words_that_were_asked_for(pipe):
    _, none = attention(pipe, PROMPT, steps=1)
    _, one = attention(pipe, PROMPT, ["red"], steps=1)
    assert none.passes[0][0].heat.numel() == 0
    assert one.passes[0][0].heat.numel() == pipe.config.depth * math.prod(one.size)


def test_conventions_say_what_is_watched(pipe):
    """Guidance, T5's rows and steps of another implementation, which defaults do not name."""
    settings = {"conventions": "sd3-ref", "steps": 1}
    logits, texts = full_maps(pipe, PROMPT, seed=0, **settings)
    _, seen = attention(pipe, PROMPT, ["red"], **settings)
    assert texts > 2 * small.LENGTH
    conditional = logits[0][0][1:].softmax(-1)
    wanted = conditional[:, :, :texts, :texts].sum(-1).mean(-1)
    found = seen.quadrants.at(step=0, layer=0, quadrant=0).values
    torch.testing.assert_close(found, wanted, **SINGLE)


# --- words -----------------------------------------------------------------------------------

WORDS = [
    (PROMPT, "a", [1, 5]),
    (PROMPT, "red", [2]),
    (PROMPT, "RED", [2]),
    (PROMPT, "a red circle", [1, 2, 3]),
    (PROMPT, "gray", [9]),
    ("Red circle above a red square", "red", [1, 5]),
    ("a red circle, above", "circle", [3]),
    ("a red circle, above", "above", [5]),
]


@pytest.mark.parametrize(("prompt", "word", "places"), WORDS)
def test_a_word_is_found_where_the_encoders_read_it(tiny, prompt, word, places):
    """CLIP's rows begin with the start of the text, T5's do not."""
    rows = tiny.text_encoders.clip_l.config.max_position_embeddings
    wanted = [*places, *(rows + place - 1 for place in places)]
    assert word_rows(tiny, prompt, word) == wanted


def test_real_tokenizers_cut_words_in_pieces(large_words):
    """Ids of CLIP and T5 for the words alone say how many; T5 may have one for a space."""
    prompt, word = "A photo of a Strawberryish octopus, please", "strawberryish"
    clip, _, t5 = large_words.text_encoders.tokenizers
    rows = word_rows(large_words, prompt, word, t5_length=40)
    in_clip, in_t5 = ([row for row in rows if (row < 77) == side] for side in (True, False))
    ids = clip(prompt).input_ids
    assert [ids[row] for row in in_clip] == clip(word).input_ids[1:-1]
    ids = t5(prompt).input_ids
    assert t5.decode([ids[row - 77] for row in in_t5]) == "Strawberryish"
    assert len(in_clip) > 1 and len(in_t5) > 1


def test_a_words_first_row_is_the_first_that_changes_with_it(large_words):
    """In what CLIP says, which reads from left to right."""
    rows = word_rows(large_words, "a photo of a cat on a mat", "cat", t5_length=20)
    say = large_words.text_encoders.encode
    with torch.no_grad():
        (one, _), (two, _) = (say([f"a photo of a {w} on a mat"], 20) for w in ("cat", "dog"))
    changed = (one - two)[0, :77].abs().amax(-1) > 1e-5
    assert changed.nonzero()[0].item() == rows[0] == 5


def test_a_word_that_is_cut_off_has_no_rows(tiny):
    """The last place is the end of the text's, in T5 and in CLIP."""
    clip, t5 = tiny.text_encoders.clip_l.config.max_position_embeddings, tiny.defaults.t5_length
    for count, where in ((t5 - 1, "T5"), (clip - 2, "CLIP")):
        fits = " ".join(["circle"] * (count - 1) + ["red"])
        rows = word_rows(tiny, fits, "red")
        assert (clip + count - 1 in rows) if where == "T5" else (count in rows)
        beyond = " ".join(["circle"] * max(clip, t5) + ["red"])
        with pytest.raises(Refusal, match="'red' is cut off"):
            word_rows(tiny, beyond, "red")
    longer = f"{'circle ' * (t5 - 2)}red"  # CLIP has a place less, for the start
    assert all(row >= clip for row in word_rows(tiny, longer, "red")) or clip > t5
    with pytest.raises(Refusal, match="cut off"):
        word_rows(tiny, f"{'circle ' * (max(clip, t5) - 1)}red", "red")
    grown = word_rows(tiny, f"{'circle ' * 60}red", "red", conventions=CONVENTIONS["sd3-ref"])
    assert grown == [clip + 60]


@pytest.mark.parametrize("word", ["green", "re", "circl", "", " ", "d"])
def test_a_word_that_is_not_there_is_refused(tiny, word):
    with pytest.raises(Refusal, match="has no word"):
        word_rows(tiny, PROMPT, word)
    with pytest.raises(Refusal, match="has no word"):
        attention(tiny, PROMPT, [word])


def test_without_t5_words_have_clips_rows_alone():
    pipe = sd3min.load(t5=False)
    assert word_rows(pipe, PROMPT, "red") == [2]
    _, seen = attention(pipe, PROMPT, ["red"], steps=1)
    assert seen.heat("red").values.isfinite().all()


def test_an_exclamation_mark_is_where_the_conventions_have_it(large_words):
    rows = [word_rows(large_words, "a cat!", "!", 9, c) for c in CONVENTIONS.values()]
    assert rows[0] == rows[1]


# --- the way to a picture --------------------------------------------------------------------


def walk(*points):
    """A path through points of a plane, for one picture."""
    latents = torch.tensor(points, dtype=torch.float32)[:, None, :, None, None]
    axes = ("step", "picture", "channel", "row", "column")
    moves = latents.diff(dim=0)
    times = torch.linspace(1, 0, len(points))
    return Path(
        Image.new("RGB", (1, 1)),
        times,
        Named(latents, axes),
        Named(moves, axes),
        Named(moves, axes),
    )


def test_lengths_and_straightness_of_known_paths():
    straight, corner = walk((0, 0), (3, 4), (9, 12)), walk((0, 0), (3, 0), (3, 4))
    assert straight.length.values.item() == pytest.approx(15)
    assert straight.straightness.values.item() == pytest.approx(1)
    assert straight.turns.values.item() == pytest.approx(1)
    assert corner.length.values.item() == pytest.approx(7)
    assert corner.straightness.values.item() == pytest.approx(5 / 7)
    assert corner.turns.values.item() == pytest.approx(0, abs=1e-6)
    assert corner.speeds.values[:, 0].tolist() == pytest.approx([3 / 2**0.5, 4 / 2**0.5])
    there_and_back = walk((0, 0), (1, 0), (0, 0))
    assert there_and_back.straightness.values.item() == 0
    assert there_and_back.turns.values.item() == pytest.approx(-1)


def test_a_path_is_that_of_the_flow(pipe):
    walked = path(pipe, PROMPT, seed=3, num_images=2)
    steps = []
    pipe(PROMPT, seed=3, num_images=2, on_step=steps.append, progress=False)
    times = flow.sigmas(pipe.defaults.steps, pipe.defaults.shift)
    torch.testing.assert_close(walked.times, times, rtol=0, atol=0)
    for i, step in enumerate(steps):
        assert torch.equal(walked.velocities.values[i], step.velocity)
        assert torch.equal(walked.denoised.values[i], step.denoised)
        assert torch.equal(walked.latents.values[i], step.latents)
    assert walked.length.axes == walked.straightness.axes == ("picture",)
    assert (walked.straightness.values > 0).all() and (walked.straightness.values <= 1).all()
    alone = path(pipe, PROMPT, seed=3)
    assert alone.pictures(pipe)[-1].tobytes() == alone.picture.tobytes()


# --- streams ---------------------------------------------------------------------------------


def inputs_of(pipe, count=2):
    text = pipe.encode_prompt([PROMPT, "a tree"][:count])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 16, 6, 10, generator=generator), text


def test_tokens_are_those_after_every_block(pipe):
    latents, text = inputs_of(pipe)
    found = streams.tokens(pipe.mmdit, latents, 0.3, text)
    with torch.no_grad():
        model, times = pipe.mmdit, torch.full((2,), 300.0)
        image = model.x_embedder(latents) + model.positions(3, 5)
        context = model.context_embedder(text.context)
        cond = model.t_embedder(sd3min.mmdit.sinusoid(times)) + model.y_embedder(text.pooled)
        for layer, block in enumerate(model.joint_blocks):
            context, image = block(context, image, cond)
            assert torch.equal(found["context"].at(layer=layer).values, context)
            assert torch.equal(found["image"].at(layer=layer).values, image)
    assert str(found["image"]) == f"layer {len(model.joint_blocks)}, picture 2, token 15, " + (
        f"channel {pipe.config.width}"
    )
    assert untouched(pipe)


@pytest.mark.parametrize("stream", streams.STREAMS)
def test_modulation_is_what_the_blocks_use(pipe, stream):
    """Heard where each block makes it, in a pass of the network."""
    latents, text = inputs_of(pipe, 1)
    made = {}
    layers = [getattr(b, streams.STREAMS[stream]).adaLN_modulation for b in pipe.mmdit.joint_blocks]
    times = torch.tensor([0.1, 0.9])
    found = streams.modulation(pipe.mmdit, text.pooled, times, stream)
    assert found.axes == ("time", "layer", "part")
    for place, t in enumerate(times):
        hooks = [
            layer.register_forward_hook(lambda m, given, out, i=i: made.__setitem__(i, out[0]))
            for i, layer in enumerate(layers)
        ]
        with torch.no_grad():
            pipe.mmdit(latents, 1000 * t[None], *text)
        for hook in hooks:
            hook.remove()
        for layer, output in made.items():
            parts = output.unflatten(0, (-1, pipe.config.width))[:6]
            sizes = torch.zeros(6)
            sizes[: len(parts)] = parts.pow(2).mean(-1).sqrt()
            torch.testing.assert_close(found.values[place, layer], sizes)


def test_norms_and_similarities_of_known_tokens():
    tokens = Named(
        torch.tensor([[[[3.0, 4.0], [6.0, 8.0], [4.0, -3.0]]]]),
        ("layer", "picture", "token", "channel"),
    )
    found = streams.norms(tokens)
    torch.testing.assert_close(found.values[0, 0], torch.tensor([5.0, 10, 5]) / 2**0.5)
    alike = streams.similarity(tokens)
    wanted = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(alike.values[0, 0], wanted)
    assert (found.axes, alike.axes[-2:]) == (("layer", "picture", "token"), ("token", "other"))


def test_named_axes_go_with_their_values():
    values = torch.arange(24.0).view(2, 3, 4)
    named = Named(values, ("step", "layer", "head"))
    assert str(named) == "step 2, layer 3, head 4"
    assert named.mean("step", "head").axes == ("layer",)
    torch.testing.assert_close(named.mean("step", "head").values, values.mean(dim=(0, 2)))
    assert torch.equal(named.at(layer=1).values, values[:, 1]) and named.at(layer=1).axes == (
        "step",
        "head",
    )
    assert torch.equal(named.at(head=-1, step=0).values, values[0, :, -1])


# --- leaving out -----------------------------------------------------------------------------


def difference(one, two):
    return max((a - b).abs().max().item() for a, b in zip(one, two, strict=True))


def test_a_block_passed_over_is_a_model_without_it(pipe):
    layers = range(pipe.config.depth)
    for layer in layers:
        with without_block(pipe, layer):
            found = latents_of(pipe, PROMPT, seed=1, steps=2)
        other = copy.copy(pipe)
        other.mmdit = copy.deepcopy(pipe.mmdit)
        kept = [block for i, block in enumerate(other.mmdit.joint_blocks) if i != layer]
        other.mmdit.joint_blocks = nn.ModuleList(kept)
        wanted = latents_of(other, PROMPT, seed=1, steps=2)
        assert same(found, wanted)
    assert untouched(pipe)


def test_a_head_left_out_is_its_columns_of_the_projection_at_zero(pipe):
    for layer in range(pipe.config.depth):
        head = pipe.config.depth - 1 - layer
        with without_head(pipe, layer, head):
            found = latents_of(pipe, PROMPT, seed=1, steps=2)
        other = copy.copy(pipe)
        other.mmdit = copy.deepcopy(pipe.mmdit)
        block = other.mmdit.joint_blocks[layer]
        columns = slice(64 * head, 64 * (head + 1))
        for stream in (block.context_block, block.x_block):
            if hasattr(stream.attn, "proj"):
                stream.attn.proj.weight.data[:, columns] = 0
        wanted = latents_of(other, PROMPT, seed=1, steps=2)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert difference(found, latents_of(pipe, PROMPT, seed=1, steps=2)) > 1e-3
    assert untouched(pipe)


@pytest.mark.parametrize("name", ablation.ENCODERS)
def test_an_encoder_left_out_says_zeros(pipe, name):
    """Where it speaks: CLIP-L's 64 and CLIP-G's 128 columns of CLIP's rows, T5's rows below."""
    context, pooled = pipe.encode_prompt([PROMPT, ""])
    rows = pipe.text_encoders.clip_l.config.max_position_embeddings
    with without_encoder(pipe, name):
        found = pipe.encode_prompt([PROMPT, ""])
    if name == "t5":
        context[:, rows:] = 0
    else:
        columns = {"clip_l": slice(0, 64), "clip_g": slice(64, 192)}[name]
        context[:, :rows, columns] = pooled[:, columns] = 0
    assert torch.equal(found.context, context) and torch.equal(found.pooled, pooled)
    kept = torch.tensor([[float(each != name) for each in ablation.ENCODERS]] * 2)
    layout = conditioning.Layout(64, 128, rows)
    trained = conditioning.leave_out(layout, pipe.encode_prompt([PROMPT, ""]), kept)
    assert torch.equal(found.context, trained.context)
    assert untouched(pipe)


def test_without_t5_is_a_model_that_was_loaded_without_it(tiny):
    without = ablate(tiny, PROMPT, seed=1, encoder="t5", steps=4).without
    other = sd3min.load(t5=False)(PROMPT, seed=1, steps=4, progress=False)[0]
    assert without.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("prompt", "word", "rest"),
    [
        (PROMPT, "red", "a circle above a blue square on gray"),
        (PROMPT, "A", "red circle above blue square on gray"),
        (PROMPT, "on gray", "a red circle above a blue square"),
        ("Red, a hundred red cats!", "red", ", a hundred cats!"),
        ("red", "red", ""),
    ],
)
def test_a_word_left_out_is_gone_from_the_prompt(prompt, word, rest):
    assert without_word(prompt, word) == rest


PARTS = [
    {"encoder": "clip_g"},
    {"block": 1},
    {"head": (0, 1)},
    {"word": "red"},
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: next(iter(part)))
def test_an_ablation_shows_both_pictures_and_their_difference(pipe, part):
    found = ablate(pipe, PROMPT, seed=2, steps=2, **part)
    assert found.whole.tobytes() == pipe(PROMPT, seed=2, steps=2, progress=False)[0].tobytes()
    whole, without = (np.asarray(p, dtype=float) for p in (found.whole, found.without))
    assert found.change == pytest.approx(abs(whole - without).mean(), rel=1e-5)
    assert found.change > 0
    assert dataclasses.replace(found, without=found.whole).change == 0
    assert untouched(pipe)


# --- and nothing is left behind --------------------------------------------------------------


def test_nothing_is_left_behind_by_a_run_that_fails(pipe):
    with pytest.raises(Stop):
        attention(pipe, PROMPT, ["red"], on_step=stop)
    for left_out in (
        nullcontext(),
        without_block(pipe, 0),
        without_head(pipe, 0, 0),
        without_encoder(pipe, "t5"),
    ):
        with pytest.raises(Stop), left_out:
            pipe(PROMPT, progress=False, on_step=stop)
    with pytest.raises(RuntimeError):
        streams.tokens(pipe.mmdit, torch.zeros(1, 3, 4, 4), 0.5, pipe.encode_prompt([PROMPT]))
    assert untouched(pipe)


def test_what_makes_no_sense_is_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "velocity", None)
    with pytest.raises(Refusal, match="name one part"):
        ablate(pipe, PROMPT)
    with pytest.raises(Refusal, match="name one part"):
        ablate(pipe, PROMPT, block=0, word="red")
    with pytest.raises(Refusal, match="layer 9"):
        ablate(pipe, PROMPT, block=9)
    with pytest.raises(Refusal, match="head 9"):
        ablate(pipe, PROMPT, head=(0, 9))
    with pytest.raises(Refusal, match="'vae' is not one of"):
        ablate(pipe, PROMPT, encoder="vae")
    with pytest.raises(Refusal, match="no word 'green'"):
        ablate(pipe, PROMPT, word="green")
    with pytest.raises(Refusal, match="steps 0"):
        attention(pipe, PROMPT, steps=0)
    with pytest.raises(Refusal, match="stream pixels"):
        streams.modulation(pipe.mmdit, pipe.encode_prompt([""]).pooled, torch.ones(1), "pixels")


def test_heat_of_a_word_that_was_not_watched_is_refused(pipe):
    _, seen = attention(pipe, PROMPT, ["red"], steps=1)
    with pytest.raises(Refusal, match="'blue' was not watched: red"):
        seen.heat("blue")


@pytest.mark.parametrize("memory", ["resident", "fast"])
def test_plans_of_memory_are_refused(memory):
    pipe = loading.load(memory=memory)
    with pytest.raises(Refusal, match="without memory="):
        attention(pipe, PROMPT)
    with pytest.raises(Refusal, match="without memory="):
        ablate(pipe, PROMPT, block=0)


# --- figures ---------------------------------------------------------------------------------


def test_figures_are_drawn_of_what_was_seen(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    picture, seen = attention(tiny, PROMPT, ["red", "square"], steps=3)
    walked = path(tiny, PROMPT, steps=3)
    times = torch.tensor([0.1, 0.9])
    latents, text = inputs_of(tiny, 1)
    alike = streams.similarity(streams.tokens(tiny.mmdit, latents, 0.5, text)["image"])
    figures = {
        "heat": plots.heat(picture, seen),
        "layer": plots.heat(picture, seen, layer=1),
        "quadrants": plots.quadrants(seen),
        "entropy": plots.entropy(seen),
        "steps": plots.steps(tiny, walked, 2),
        "speeds": plots.speeds(walked),
        "modulation": plots.modulation(
            streams.modulation(tiny.mmdit, text.pooled, times), times.tolist()
        ),
        "similarity": plots.similarity(alike),
    }
    titles = {name: [a.get_title() for a in f.axes] for name, f in figures.items()}
    assert titles["heat"] == ["picture", "red", "square"]
    assert titles["quadrants"][:4] == list(QUADRANTS)
    assert titles["steps"] == [f"t = {walked.times[i]:.2f}" for i in (0, 2)]
    drawn = figures["layer"].axes[1].images[1].get_array()
    wanted = seen.heat("red").values[:, 1].mean(dim=(0, 1, 2))
    torch.testing.assert_close(torch.tensor(drawn.data), wanted)
    share = figures["quadrants"].axes[2].images[0].get_array()
    wanted = seen.quadrants.values[..., 2].mean(dim=(2, 3)).T
    torch.testing.assert_close(torch.tensor(share.data), wanted)
    x, y = figures["speeds"].axes[0].lines[0].get_data()
    torch.testing.assert_close(torch.as_tensor(x), walked.times[:-1])
    torch.testing.assert_close(torch.as_tensor(y).flatten(), walked.speeds.values.flatten())
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
