"""Fine-tuning: its loss against diffusers' network, and what trains, in parts and with LoRAs."""

import dataclasses
import random

import oracle
import pytest
import small
import torch

from sd3min import formats
from sd3min.config import Refusal
from sd3min.text_encoders import Conditioning
from sd3min.training import finetune, tuning_run
from sd3min.training.conditioning import Layout, leave_out
from sd3min.training.data import Encoded
from sd3min.training.finetune import FineTuning, Material, Tuning, draw, validate
from sd3min.training.objective import diffusers, paper
from sd3min.training.recipe import Recipe
from sd3min.training.trainer import fit

EXACT = {"rtol": 0, "atol": 0}
DOUBLE = {"rtol": 1e-9, "atol": 1e-10}  # float64 through a network, in another order
SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # float32 in another order
LAYOUT = Layout(64, 128, 2)


def words(captions):
    """Rows and a vector that the captions decide, as encoders would give them."""
    made = [
        torch.randn(5 * 320 + 192, generator=torch.Generator().manual_seed(len(c) + ord(c[0])))
        for c in captions
    ]
    rows = torch.stack(made)
    context = rows[:, :1600].reshape(-1, 5, 320)
    context[:, :2, 192:] = 0  # as CLIP's rows are padded
    return Conditioning(context, rows[:, 1600:])


def material(captions, sizes=((6, 10),), weight=1.0, seed=0):
    """Posteriors of as many pictures, in buckets, one after the other."""
    generator, encoded, places = torch.Generator().manual_seed(seed), [], range(len(captions))
    for i, (h, w) in enumerate(sizes):
        indices = list(places[i :: len(sizes)])
        mean, logvar = torch.randn(2, len(indices), 16, h, w, generator=generator)
        encoded.append(Encoded((8 * w, 8 * h), indices, mean, logvar - 2))
    return Material(encoded, captions, weight)


def exact(made):
    """The same posteriors in float64."""
    encoded = [
        dataclasses.replace(e, mean=e.mean.double(), logvar=e.logvar.double()) for e in made.encoded
    ]
    return made._replace(encoded=encoded)


def task(tuning, *materials, batch=3, parts=None, encode=words):
    return FineTuning(parts or {"mmdit": small.mmdit()}, encode, LAYOUT, tuning, materials, batch)


def gradients(made, part=slice(0, 3)):
    made(0, part).values.mean().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["paper", "diffusers", "diffusers, not preconditioned"])
def test_loss_and_gradient_are_diffusers_formula_on_its_own_network(name):
    chosen = {
        "paper": paper(),
        "diffusers": diffusers("logit_normal"),
        "diffusers, not preconditioned": diffusers("cosmap", preconditioned=False),
    }[name]
    mmdit = small.mmdit().double()
    model = oracle.transformer(mmdit).requires_grad_(True)
    captions = ["a", "bb", "ccc"]
    made = task(
        Tuning(None, objective=chosen, seed=4), exact(material(captions)), parts={"mmdit": mmdit}
    )
    values, times = made(2, slice(0, 3))
    values.mean().backward()

    drawn = draw(made.materials[0], 2, 3, 4)
    generator = torch.Generator().manual_seed(random.Random("4 2 0").getrandbits(63))
    sampling, noise = torch.randn((2, 3, 16, 6, 10), generator=generator).double()
    sigma = chosen.times.sample(3, generator).double()
    torch.testing.assert_close(times, sigma, **EXACT)
    bucket = drawn.bucket
    sample = bucket.mean[drawn.places] + (bucket.logvar[drawn.places] / 2).exp() * sampling
    x0, column = (sample - 0.0609) * 1.5305, sigma[:, None, None, None]
    noisy = (1 - column) * x0 + column * noise
    context, pooled = (part.double() for part in words(drawn.captions))
    output, target = oracle.velocity(model, noisy, 1000 * sigma, context, pooled), noise - x0
    weighting = torch.ones(3)
    if name == "diffusers":
        output, target = output * (-column) + noisy, x0
    if "not" in name:
        weighting = 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
    loss = (weighting[:, None, None, None] * (output - target) ** 2).mean()
    loss.backward()

    torch.testing.assert_close(values.mean(), loss, **DOUBLE)
    mine = {n: p.grad for n, p in mmdit.named_parameters()}
    theirs = {n: p.grad for n, p in model.named_parameters()}
    found = formats.to_diffusers(mine, mmdit.config)
    found = {n: g for n, g in found.items() if theirs.get(n) is not None}
    assert len(found) > 50
    for key, gradient in found.items():
        expected = theirs[key].reshape(gradient.shape)
        torch.testing.assert_close(gradient, expected, **DOUBLE, msg=key)


def test_a_class_counts_as_much_as_is_asked_beside_the_subject():
    """Dreambooth's Eq. 2, whole and in parts: mean of the subject's and λ times the class's."""
    subject, kind = material(["a", "bb", "ccc"]), material(["dddd"] * 5, weight=0.3, seed=1)
    made = task(Tuning(seed=1), subject, kind, batch=8)
    drawn = made.drawn(3)
    own, other = (made.losses(d, f"3 {i}", slice(0, 4))[0] for i, d in enumerate(drawn))
    expected = own.mean() + 0.3 * other.mean()
    for count in (1, 2, 4):
        size = 8 // count
        parts = [made(3, slice(i * size, (i + 1) * size)).values for i in range(count)]
        found = torch.stack([part.mean() for part in parts]).mean()
        torch.testing.assert_close(found, expected, **SINGLE)
    with pytest.raises(Refusal, match="a batch of 8 gives each process an uneven share"):
        made(3, slice(0, 1))
    with pytest.raises(Refusal, match="a batch of 7 does not divide among 2 materials"):
        task(Tuning(), subject, kind, batch=7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_class_can_be_held_to_the_network_as_it_was_encoders_and_all(checkpointing):
    """Values and gradients are those of the distance from a network without the LoRA."""
    plain, mmdit = small.mmdit().double(), small.mmdit().double()
    mmdit.load_state_dict(plain.state_dict())
    kind = exact(material(["dddd", "ee", "f"], weight=0.5, seed=1))._replace(by_network=True)
    subject = exact(material(["a", "bb", "ccc"]))
    louder = [1.0]

    def encode(captions):
        """Encoders that a LoRA changes, too."""
        changed = louder[0] if made.lora.changes[0].scale else 1.0
        return Conditioning(*(changed * part for part in words(captions)))

    tuning = Tuning(2, seed=1, gradient_checkpointing=checkpointing)
    made = task(tuning, subject, kind, batch=6, parts={"mmdit": mmdit}, encode=encode)
    drawn = made.drawn(3)[1]
    assert made.losses(drawn, "3 1", slice(0, 3))[0].abs().max() < 1e-20  # nothing is learnt yet
    generator = torch.Generator().manual_seed(0)
    for _, change in made.lora:
        change.up.data = 0.1 * torch.randn(change.up.shape, generator=generator).double()
    louder[0] = 1.1
    errors, times = made.losses(drawn, "3 1", slice(0, 3))
    assert all(change.scale == 1 for _, change in made.lora)

    generator = torch.Generator().manual_seed(random.Random("1 3 1").getrandbits(63))
    sampling, noise = torch.randn((2, 3, 16, 6, 10), generator=generator).double()
    mean, logvar = (part[drawn.places] for part in (drawn.bucket.mean, drawn.bucket.logvar))
    x0, t = (mean + (logvar / 2).exp() * sampling - 0.0609) * 1.5305, times[:, None, None, None]
    z, told = (1 - t) * x0 + t * noise, words(drawn.captions)
    before = plain(z, 1000 * times, *(part.double() for part in told))
    after = mmdit(z, 1000 * times, *((1.1 * part).double() for part in told))
    expected = (after - before.detach()).square().mean(dim=(1, 2, 3))
    assert expected.min() > 1e-4
    torch.testing.assert_close(errors, expected, **DOUBLE)
    learnt = [p for p in made.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(loss.sum(), learnt) for loss in (errors, expected))
    assert sum(bool(gradient.any()) for gradient in wanted) > len(wanted) / 2
    torch.testing.assert_close(found, wanted, **DOUBLE)


def test_the_network_as_it_was_leaves_the_gradients_of_autocast_alone():
    """What the teacher computes without gradients must not stand in for what has them."""
    kind = material(["dddd", "ee", "f"])._replace(by_network=True)
    made = task(Tuning(2), material(["a", "bb", "ccc"]), kind, batch=6)
    for _, change in made.lora:
        torch.nn.init.normal_(change.up, std=0.1)
    learnt = [p for p in made.parameters() if p.requires_grad]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            errors, _ = made.losses(made.drawn(0)[1], "0 1", slice(0, 3))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(errors.sum(), learnt)]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def test_parts_of_a_batch_draw_what_the_whole_does():
    made = task(Tuning(dropout=0.5), material(["a", "bb", "ccc", "dddd"]), batch=4)
    whole, times = made(1, slice(0, 4))
    halves = [made(1, slice(i, i + 2)) for i in (0, 2)]
    torch.testing.assert_close(torch.cat([h.values for h in halves]), whole, **SINGLE)
    torch.testing.assert_close(torch.cat([h.times for h in halves]), times, **EXACT)


def test_pictures_and_captions_stay_together_in_any_order():
    """A picture's posterior holds the number that its caption says; every one comes once."""
    captions = [f"{i}" for i in range(11)]
    made = material(captions, ((2, 4), (4, 2)))
    for encoded in made.encoded:
        for place, index in enumerate(encoded.indices):
            encoded.mean[place] = index
    for epoch in range(3):
        seen = []
        for step in range(4):  # of 6 and 5 pictures, in batches of 3
            drawn = draw(made, 4 * epoch + step, 3, seed=7)
            numbers = [int(drawn.bucket.mean[place].mean()) for place in drawn.places]
            assert drawn.captions == [str(number) for number in numbers]
            seen += numbers
        assert set(seen) == set(range(11)) and len(seen) == 12
    orders = [draw(made, step, 3, seed=7).captions for step in (0, 4, 8)]
    assert len({tuple(order) for order in orders}) == 3


def test_of_a_caption_of_several_lines_every_step_takes_one():
    made = material(["a cat", "a dog left of a fox\n\n a fox right of a dog\n", " \n"])
    told = [set(draw(made, step, 3, seed=7).captions) for step in range(40)]
    second = [words for said in told for words in said if "fox" in words]
    assert set(second) == {"a dog left of a fox", " a fox right of a dog"} and len(second) == 40
    assert 8 < second.count("a dog left of a fox") < 32
    assert all({"a cat", ""} <= said for said in told)
    assert told == [set(draw(made, step, 3, seed=7).captions) for step in range(40)]


def test_what_is_left_out_is_where_the_encoder_speaks(tmp_path):
    encoders = small.encoders(small.tokenizers(tmp_path))
    clip = [encoder.config for encoder in (encoders.clip_l, encoders.clip_g)]
    layout = Layout(clip[0].hidden_size, clip[1].hidden_size, clip[0].max_position_embeddings)
    said = encoders.encode(["a red circle", "a cat"])
    t5, encoders.t5 = encoders.t5, None
    without = encoders.encode(["a red circle", "a cat"])
    encoders.t5 = t5
    found = leave_out(layout, said, torch.tensor([[1.0, 1.0, 0.0]]).expand(2, 3))
    for mine, expected in zip(found, without, strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)

    for part, model in enumerate((encoders.clip_l, encoders.clip_g)):
        kept = torch.ones(2, 3)
        kept[0, part] = 0
        found = leave_out(layout, said, kept)
        moved = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.data += 0.3
        other = encoders.encode(["a red circle", "a cat"])
        for parameter, before in zip(model.parameters(), moved, strict=True):
            parameter.data = before
        for mine, whole, changed in zip(found, said, other, strict=True):
            spoken = whole != changed  # the values that hear of this encoder
            assert spoken.any() and (mine[0][spoken[0]] == 0).all()
            torch.testing.assert_close(mine[0][~spoken[0]], whole[0][~spoken[0]], **EXACT)
            torch.testing.assert_close(mine[1], whole[1], **EXACT)


def test_encoders_are_left_out_as_often_as_is_asked():
    """A network's loss is the conditioning's share of ones: what it hears is what is kept."""
    heard = []

    def ones(captions):
        return Conditioning(torch.ones(len(captions), 5, 320), torch.ones(len(captions), 192))

    made = task(Tuning(dropout=0.3), material(["a"] * 300), batch=300, encode=ones)
    made.velocity = lambda told: heard.append(told) or (lambda z, t: z)
    made(0, slice(0, 300))
    context, pooled = heard[0]
    kept = torch.stack([pooled[:, 0], pooled[:, 64], context[:, 2, 0]])
    assert kept.mean(dim=1).tolist() == pytest.approx([0.7] * 3, abs=0.08)
    assert kept.unique(dim=1).shape[1] == 8  # each by itself


def encoding(encoders):
    return lambda captions: encoders.encode(captions)


def test_t5_which_does_not_learn_reads_a_caption_once_and_the_clips_every_time(tmp_path):
    encoders, read = small.encoders(small.tokenizers(tmp_path)), []
    for name in ("clip_l", "t5"):
        getattr(encoders, name).register_forward_hook(lambda *_, name=name: read.append(name))
    encoders.double().requires_grad_(True)
    captions = ["a cat", "", "a cat", "a red circle"]
    encode = tuning_run.warning_once(encoders)
    said = [encode(captions), encode(captions[::-1])]
    assert read.count("t5") == 3 and read.count("clip_l") == 2
    expected = encoders.encode(captions)
    for found, whole in zip(said[0], expected, strict=True):
        torch.testing.assert_close(found, whole, **DOUBLE)
        assert found.requires_grad
    torch.testing.assert_close(said[1].context.flip(0), said[0].context, **DOUBLE)


@pytest.mark.parametrize("clips", [False, True])
def test_a_lora_is_all_that_trains(clips, tmp_path):
    encoders = small.encoders(small.tokenizers(tmp_path))
    parts = {"mmdit": small.mmdit()}
    if clips:
        parts |= {"clip_l": encoders.clip_l, "clip_g": encoders.clip_g}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in parts.items()}
    made = task(
        Tuning(rank=2), material(["a", "b"]), batch=2, parts=parts, encode=encoding(encoders)
    )
    made.layout = Layout(64, 128, 24)
    fit(made, Recipe(3, 0.1, batch=2, warmup=0, precision="no"), tmp_path / "run")
    names = {name for name, p in made.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in made.named_parameters() if ".down" in n or ".up" in n}
    for part, module in parts.items():
        state = module.state_dict()
        for name, tensor in before[part].items():
            torch.testing.assert_close(state[name], tensor, **EXACT)
    changed = {layer.part for layer, change in made.lora if change.up.abs().max() > 0}
    assert changed == set(parts)


def test_targets_of_the_network_alone_leave_the_encoders_diffusers_targets(tmp_path):
    encoders = small.encoders(small.tokenizers(tmp_path))
    parts = {"mmdit": small.mmdit(), "clip_l": encoders.clip_l}
    made = task(Tuning(targets=["attn.to_k"]), material(["a"]), batch=1, parts=parts)
    named = {f"{layer.part} {layer.name.rsplit('.', 1)[1]}" for layer in made.lora.layers}
    own = {f"clip_l {name}_proj" for name in ("q", "k", "v", "out")}
    assert named == {"mmdit qkv", *own}


def test_full_tuning_changes_the_whole_network_but_the_identity_of_clip_l(tmp_path):
    encoders = small.encoders(small.tokenizers(tmp_path))
    parts = {"mmdit": small.mmdit(), "clip_l": encoders.clip_l}
    made = task(Tuning(None), material(["a", "b"]), batch=2, parts=parts)
    frozen = [name for name, p in made.named_parameters() if not p.requires_grad]
    assert made.lora is None and frozen == ["parts_.clip_l.text_projection.weight"]


@pytest.mark.parametrize("rank", [2, None])
def test_gradient_checkpointing_gives_equal_gradients(rank):
    plain, spared = (
        gradients(task(Tuning(rank, gradient_checkpointing=on), material(["a", "bb", "ccc"])))
        for on in (False, True)
    )
    assert plain.keys() == spared.keys() and any(g.abs().max() > 0 for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(spared[name], gradient, **EXACT)


def test_attention_among_few_rows_is_plain_and_gives_equal_gradients(monkeypatch):
    """Plain attention keeps its scores for the gradient, and fused attention does not."""
    rows, found, plain = 5 + 6 * 10 // 4, [], []
    for few in (rows - 1, rows):
        monkeypatch.setattr(finetune, "FEW", few)
        made = task(Tuning(None), exact(material(["a", "bb", "ccc"]))).double()
        kept = []

        def keep(tensor, kept=kept):
            kept.append(list(tensor.shape[1:]))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(gradients(made))
        plain.append(any(shape[-2:] == [rows, rows] for shape in kept))
    assert plain == [False, True]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **DOUBLE)


def test_gradient_checkpointing_keeps_less():
    def kept(on):
        sizes = []
        made = task(Tuning(2, gradient_checkpointing=on), material(["a", "bb", "ccc"]))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), id):
            made(0, slice(0, 3))
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_a_batch_is_named_by_its_pictures_or_their_captions():
    def told(examples):
        return set(
            task(Tuning(), examples, batch=2).describe(0).split("the pictures ")[1].split(", ")
        )

    examples = material(["a cat", "a dog"])
    assert told(examples) == {"'a cat'", "'a dog'"}
    assert told(examples._replace(names=["1.png", "2.png"])) == {"'1.png'", "'2.png'"}


def test_validation_is_the_mean_error_at_eight_times_of_every_picture():
    """A network that gives −data finds |ε|² minus nothing else: v* − v = ε."""
    made = task(Tuning(), held := material(["a", "bb", "ccc"], ((2, 4), (4, 2))))
    noises = [
        torch.randn(16, *s, generator=torch.Generator().manual_seed(i))
        for i, s in ((0, (2, 4)), (1, (4, 2)), (2, (2, 4)))
    ]
    made.velocity = lambda told: lambda z, t: torch.zeros_like(z)
    flat = [None] * 3
    for bucket in held.encoded:
        for place, index in enumerate(bucket.indices):
            flat[index] = (bucket.mean[place] - 0.0609) * 1.5305
    errors = [(n - d).square().mean().item() for n, d in zip(noises, flat, strict=True)]
    for batch in (1, 2):
        found = validate(made, held, batch)
        assert found["validation"] == pytest.approx(sum(errors) / 3)
        assert len(found) == 9 and f"validation_t{0.0625:g}" in found
