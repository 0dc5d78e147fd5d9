import functools
import json
import random

import pytest
import small
import torch
from sd3min.training.loop import Recipe, fit

from sd3min import flow, text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.config import AutoencoderConfig, T5Config
from sd3min.text_encoders import Conditioning
from sd3min.training import images, reading, scenes, text_to_image, vocabulary
from sd3min.training.objective import flow_matching_loss, logit_normal_times
from sd3min.training.scenes import RELATIONS


def test_times_are_logit_normal_pushed_through_the_shift():
    """The median of the logit-normal is a half; shift 3 moves it to three quarters."""
    times = logit_normal_times(100_000, 3.0, torch.Generator().manual_seed(0))
    assert times.median().item() == pytest.approx(0.75, abs=0.005)
    unshifted = flow.shift_times(times, 1 / 3)
    logits = torch.logit(unshifted)
    assert logits.mean().item() == pytest.approx(0, abs=0.01)
    assert logits.std().item() == pytest.approx(1, abs=0.01)


def test_loss_of_the_true_velocity_is_zero_and_of_a_guess_is_its_error():
    data = torch.randn(3, 16, 4, 4)
    noise, t = torch.randn(3, 16, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    assert flow_matching_loss(lambda z, t: noise - data, data, noise, t) == 0
    found = flow_matching_loss(lambda z, t: noise - data + 2, data, noise, t)
    assert found.item() == pytest.approx(4)


def test_loss_shows_the_network_the_point_of_the_path_at_its_time():
    data, noise = torch.zeros(2, 16, 2, 2), torch.ones(2, 16, 2, 2)
    seen = []
    flow_matching_loss(lambda z, t: seen.append((z, t)) or z, data, noise, torch.tensor([0.2, 0.7]))
    assert torch.equal(seen[0][0][:, 0, 0, 0], torch.tensor([0.2, 0.7]))


def test_rate_rises_then_falls_to_zero():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=10)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[9] == 1.0 and rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001


def little():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4)


def loss_of(module):
    def loss(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (module(x).float() - x).square().mean()

    return loss


def test_an_interrupted_run_resumes_as_if_it_had_not_been(tmp_path):
    recipe = Recipe(steps=12, learning_rate=0.1, warmup=2, save_every=5)
    whole = little()
    fit(whole, loss_of(whole), recipe, tmp_path / "whole.pt")

    class Stop(Exception):
        pass

    broken = little()

    def stopping(step):
        if step == 7:
            raise Stop
        return loss_of(broken)(step)

    with pytest.raises(Stop):
        fit(broken, stopping, recipe, tmp_path / "broken.pt")
    resumed = little()
    fit(resumed, loss_of(resumed), recipe, tmp_path / "broken.pt")
    assert torch.equal(resumed.weight, whole.weight)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(12))


def test_folding_in_the_scale_normalises_latents_and_keeps_pictures():
    """Up to the border, where the decoder's padding meant another value before."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig((32, 32), 1)).eval()
    autoencoder.encoder.conv_out.bias.data[:16] += 0.7
    pictures = images.batch("some", 8)
    with torch.no_grad():
        before = autoencoder.decoder(autoencoder.moments(pictures)[0])
        images.normalise(autoencoder, pictures)
        latents = autoencoder.encode(pictures)
        after = autoencoder.decode(latents)
    assert latents.mean().abs() < 1e-4
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    norms = [m for m in autoencoder.decoder.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms  # they carry the border's change everywhere, so the pictures agree only nearly
    assert (before - after).abs().mean() < 0.2 * before.std()


def test_batches_depend_on_their_seed_alone():
    assert torch.equal(images.batch("a 1", 3), images.batch("a 1", 3))
    assert not torch.equal(images.batch("a 1", 3), images.batch("a 2", 3))


def test_relations_are_told_to_t5_and_to_clip_only_where_t5_is_left_out(tmp_path, monkeypatch):
    """What each encoder is given of 2,000 scenes in one relation."""
    encoders, read = small.encoders(small.tokenizers(tmp_path)), {}

    def both_clips(prompts):
        read["clip"] = prompts
        return Conditioning(torch.ones(len(prompts), 2, 8), torch.ones(len(prompts), 4))

    def t5_rows(prompts, length):
        read["t5"] = prompts
        return torch.ones(len(prompts), length, 8)

    monkeypatch.setattr(encoders, "both_clips", both_clips)
    monkeypatch.setattr(encoders, "t5_rows", t5_rows)
    scene = scenes.parse("a red circle left of a blue square on gray")
    context, pooled = text_to_image.encode(encoders, [scene] * 2000, random.Random(0))

    rows = context[:, 2:].flatten(1)
    with_t5 = (rows == 1).all(dim=1)
    assert ((rows == 0).all(dim=1) | with_t5).all()
    assert (context[:, :2] == 1).all() and (pooled == 1).all()
    assert with_t5.float().mean().item() == pytest.approx(1 - text_to_image.NO_T5, abs=0.03)
    pairs = list(zip(read["clip"], read["t5"], with_t5.tolist(), strict=True))
    assert all("left of" in t5 for _, t5, _ in pairs if t5)
    assert all(clip == t5 for clip, t5, has_t5 in pairs if not has_t5)
    assert all(bool(clip) == bool(t5) for clip, t5, _ in pairs)
    told = [clip for clip, t5, has_t5 in pairs if has_t5 and t5]
    shares = [sum(f" {relation} " in clip for clip in told) / len(told) for relation in RELATIONS]
    assert shares == pytest.approx([1 / len(RELATIONS)] * len(RELATIONS), abs=0.05)


@pytest.mark.parametrize("triple", scenes.held_out()["triples"])
def test_a_held_out_relation_is_never_told_by_chance(triple):
    first, rest = triple.split(" ", 1)
    relation, second = rest.rsplit(" ", 1)
    other = next(
        r for r in RELATIONS if f"{first} {r} {second}" not in scenes.held_out()["triples"]
    )
    scene = scenes.parse(f"a red {first} {other} a blue {second} on gray")
    rng = random.Random(0)
    assert relation not in {text_to_image.misread(scene, rng).relation for _ in range(200)}


def test_the_words_of_a_thing_are_asked_where_it_stands():
    def asked(caption, words):
        return [
            reading.PLACES[place] if place != reading.IGNORED else "-"
            for place in reading.targets(scenes.parse(caption), words, 12)
        ]

    caption = "a red circle left of a blue square on gray"
    found = asked(caption, caption)
    assert found == [*"-", "left of", "left of", *"---", "right of", "right of", *"----"]
    found = asked("an orange heart above a pink star on white", "Orange heart above pink star")
    assert found == ["above", "above", "-", "below", "below", *"-------"]
    assert asked("a red circle on gray", "a red circle on gray")[:4] == ["-", None, None, "-"]


def test_a_short_reading_lesson_is_learnt_and_holds_for_relations_never_read(tmp_path):
    torch.manual_seed(0)
    encoders = small.encoders(small.tokenizers(tmp_path))
    sizes = T5Config(3, 320, mlp_width=512, heads=4, vocabulary=len(encoders.tokenizers[2]))
    encoders.t5 = text_encoders.t5(sizes)
    text_to_image.initialise(small.mmdit(), encoders, 64)
    lesson = reading.Lesson(encoders).eval()
    wanted = scenes.prompts("triples", 100)
    before = reading.right_answers(lesson, wanted)
    loss = functools.partial(reading.reading_loss, lesson, 48)
    fit(lesson, loss, Recipe(steps=150, learning_rate=1e-3, warmup=20), tmp_path / "lesson.pt")
    assert before < 0.1 and reading.right_answers(lesson, wanted) > 0.9


def test_captions_are_sometimes_empty_and_never_of_another_scene():
    scene = scenes.parse("a red circle above a blue square on gray")
    rng = random.Random(0)
    found = [text_to_image.caption(scene, rng) for _ in range(2000)]
    assert found.count("") / 2000 == pytest.approx(text_to_image.NO_CAPTION, abs=0.03)
    assert len(set(found)) == 7  # three wordings, each with and without a capital, and none
    for words in set(found) - {""}:
        assert [
            w for w in ("red", "circle", "above", "blue", "square") if w not in words.lower()
        ] == []


def test_every_word_of_a_caption_is_one_token(tmp_path):
    clip_l, clip_g, t5 = small.tokenizers(tmp_path)
    for word in vocabulary.WORDS:
        assert len(clip_l(word).input_ids) == len(clip_g(word).input_ids) == 3
        assert len(t5(word).input_ids) == len(t5(word.capitalize()).input_ids) == 2


def test_the_end_of_clips_text_has_the_largest_id(tmp_path):
    for tokenizer in small.tokenizers(tmp_path)[:2]:
        ids = tokenizer("a red circle").input_ids
        assert ids[-1] == max(tokenizer.get_vocab().values())


def test_longest_caption_fits_the_text_encoders(tmp_path):
    caption = "an orange triangle right of an orange triangle on white"
    for tokenizer in small.tokenizers(tmp_path):
        assert len(tokenizer(caption).input_ids) <= vocabulary.LENGTH


def test_training_starts_with_the_identity_and_with_positions_as_loud_as_words(tmp_path):
    mmdit, encoders = small.mmdit(), small.encoders(small.tokenizers(tmp_path))
    text_to_image.initialise(mmdit, encoders, 64)
    latents = torch.randn(1, 16, 8, 8)
    config = mmdit.config
    velocity = mmdit(
        latents,
        torch.tensor([500.0]),
        torch.randn(1, 4, config.context_width),
        torch.randn(1, config.pooled_width),
    )
    assert velocity.abs().max() == 0
    for clip in (encoders.clip_l, encoders.clip_g):
        embeddings = clip.text_model.embeddings
        words = embeddings.token_embedding.weight.std()
        assert embeddings.position_embedding.weight.std() / words == pytest.approx(1, abs=0.1)
    ids = torch.arange(12)[None]
    forward, backward = (encoders.t5(order).last_hidden_state for order in (ids, ids.flip(1)))
    moved = (forward - backward.flip(1)).norm() / forward.norm()
    assert moved > 0.3  # T5 hears the order of its words from the start


def test_one_batch_of_the_joint_training_reaches_every_weight(tmp_path):
    """After one update nothing is left at its zero start, and every tensor but those of T5, which
    has been taught before, gets a gradient."""
    mmdit, encoders = small.mmdit(), small.encoders(small.tokenizers(tmp_path))
    mmdit.requires_grad_(True), encoders.requires_grad_(True)
    autoencoder = small.autoencoder()
    latents = text_to_image.Latents(autoencoder, 8, tmp_path / "latents.pt", chunk=4)
    text_to_image.batch_loss(mmdit, encoders, latents, 1, 4, 3.0).backward()
    without = [n for n, p in mmdit.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []
    for name, parameter in encoders.named_parameters():
        if name.startswith("t5."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
