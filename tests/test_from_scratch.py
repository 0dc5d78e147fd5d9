"""The stages that make sd3-tiny from nothing."""

import random

import pytest
import small
import torch

from sd3min import text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.config import AutoencoderConfig, T5Config
from sd3min.training import captions, images, reading, scenes, text_to_image, vocabulary
from sd3min.training.recipe import Recipe
from sd3min.training.trainer import fit


def encoders_of(folder):
    """Small encoders with room for every caption."""
    length = captions.LENGTH
    return small.encoders(small.tokenizers(folder, length), length, t5_length=length)


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


def test_narrow_posteriors_keep_their_modes():
    autoencoder = Autoencoder(AutoencoderConfig((32, 32), 1)).eval()
    pictures = images.batch("some", 3)
    with torch.no_grad():
        mode, _ = autoencoder.moments(pictures)
        images.narrow(autoencoder)
        mean, logvar = autoencoder.moments(pictures)
    assert torch.equal(mean, mode)
    assert torch.allclose(torch.exp(logvar / 2), torch.tensor(images.WIDTH))


def test_batches_depend_on_their_seed_alone():
    assert torch.equal(images.batch("a 1", 3), images.batch("a 1", 3))
    assert not torch.equal(images.batch("a 1", 3), images.batch("a 2", 3))


def test_every_word_of_a_caption_is_one_token(tmp_path):
    clip_l, clip_g, t5 = small.tokenizers(tmp_path)
    for word in vocabulary.WORDS:
        assert len(clip_l(word).input_ids) == len(clip_g(word).input_ids) == 3
        assert len(t5(word).input_ids) == len(t5(word.capitalize()).input_ids) == 2


def test_tokenizers_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop(folder, length):
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(vocabulary, "save_t5", stop)
        vocabulary.save_tokenizers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "tokenizer_2"]
    assert small.tokenizers(tmp_path)[2]("cat").input_ids


def test_the_end_of_clips_text_has_the_largest_id(tmp_path):
    for tokenizer in small.tokenizers(tmp_path)[:2]:
        ids = tokenizer("a red circle").input_ids
        assert ids[-1] == max(tokenizer.get_vocab().values())


def test_training_starts_with_the_identity_and_with_positions_as_loud_as_words(tmp_path):
    mmdit, encoders = small.mmdit(), encoders_of(tmp_path)
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


@pytest.mark.parametrize("told", [text_to_image.rearranged, text_to_image.recoloured])
def test_what_encoders_are_told_otherwise_is_never_held_out(told):
    rng, other = random.Random(0), 0
    for _ in range(1000):
        scene = scenes.random_scene(rng)
        heard = told(scene, rng)
        assert not scenes.is_held_out(heard) and heard.background == scene.background
        assert [thing.noun for thing in heard.things] == [thing.noun for thing in scene.things]
        colours, sides = (
            [thing.colour for thing in heard.things] == [thing.colour for thing in scene.things],
            [side for side, _ in heard.others] == [side for side, _ in scene.others],
        )
        assert sides if told is text_to_image.recoloured else colours
        other += heard != scene
    assert other > 300  # half of the scenes have one thing, and no relation


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("a red circle left of a blue circle on sky", True),
        ("a red circle left of a cat and above a blue circle on sky", True),
        ("a red circle left of a cat and above a blue star on sky", False),
    ],
)
def test_two_of_a_kind_keep_their_colours(words, kept):
    scene, rng = captions.parse(words), random.Random(0)
    heard = {text_to_image.recoloured(scene, rng) for _ in range(20)}
    assert (heard == {scene}) == kept


def test_a_longest_caption_fits_the_text_encoders(tmp_path):
    rng = random.Random(0)
    words = max((captions.worded(scenes.random_scene(rng), rng) for _ in range(3000)), key=len)
    for tokenizer in small.tokenizers(tmp_path, captions.LENGTH):
        assert 10 < len(tokenizer(words).input_ids) <= captions.LENGTH


def test_parts_of_a_batch_are_learnt_from_as_the_whole(tmp_path):
    """Of every stage: pictures, captions and draws do not depend on how the batch is cut."""
    encoders = encoders_of(tmp_path)
    autoencoder = Autoencoder(AutoencoderConfig((32, 32, 32, 32), 1)).eval()
    latents = text_to_image.Latents(autoencoder, 8, tmp_path, chunk=4)
    flow = text_to_image.TextToImage(small.mmdit(), encoders, latents, 4, 3.0)
    flow.compiled = flow.mmdit
    tasks = [
        images.Reconstruction(autoencoder, 4),
        images.Decoding(autoencoder, 4),
        reading.Reading(encoders, 4),
        flow,
    ]
    for task in tasks:
        with torch.no_grad():
            whole = task.eval()(3, slice(0, 4)).values
            halves = [task(3, slice(i, i + 2)).values for i in (0, 2)]
        torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-4, atol=1e-5)
        assert whole.shape == (4,) and len(set(whole.tolist())) == 4
    other = text_to_image.TextToImage(flow.mmdit, encoders, latents, 4, 3.0, seed=1)
    other.compiled = other.mmdit
    with torch.no_grad():  # weights that learn on see other draws, step by step
        assert not torch.equal(other.eval()(3, slice(0, 4)).times, flow(3, slice(0, 4)).times)


def test_a_step_of_the_flow_reaches_every_weight_but_t5s(tmp_path):
    """T5 has been taught before; CLIP-L's projection is the identity."""
    mmdit, encoders = small.mmdit(), encoders_of(tmp_path)
    mmdit.requires_grad_(True), encoders.requires_grad_(True).t5.requires_grad_(False)
    encoders.clip_l.text_projection.requires_grad_(False)
    latents = text_to_image.Latents(small.autoencoder(), 8, tmp_path, chunk=4)
    task = text_to_image.TextToImage(mmdit, encoders, latents, 16, 3.0)
    task.compiled = mmdit
    task(1, slice(0, 16)).values.mean().backward()
    learning = {n: p.grad for n, p in task.named_parameters() if p.requires_grad}
    assert not [n for n, grad in learning.items() if grad is None or grad.abs().max() == 0]


def test_the_validation_loss_is_of_the_same_pictures_noise_and_times_at_every_call(tmp_path):
    encoders, autoencoder = encoders_of(tmp_path), small.autoencoder()
    latents = text_to_image.Latents(autoencoder, 8, tmp_path, chunk=4)
    task = text_to_image.TextToImage(small.mmdit(), encoders, latents, 4, 3.0)
    validation = text_to_image.Validation(autoencoder, 3)
    velocity, asked = validation.noise - validation.data, []
    told = encoders.encode(validation.captions)

    def perfect(z, times, context, pooled):
        t = (times / 1000).view(-1, 1, 1, 1)
        assert torch.allclose(z, (1 - t) * validation.data + t * validation.noise, atol=1e-5)
        assert torch.equal(context, told.context) and torch.equal(pooled, told.pooled)
        asked.append(times[0].item())
        return velocity

    task.compiled = perfect
    found = validation(task)
    assert set(found.values()) == {0.0} and asked == [1000 * (i + 0.5) / 8 for i in range(8)]
    task.compiled = lambda z, times, context, pooled: torch.zeros_like(z)
    assert validation(task)["validation_t0.9375"] == pytest.approx(velocity.square().mean().item())
    assert validation(task) == validation(task)


@pytest.mark.slow
def test_a_short_reading_lesson_is_learnt_and_holds_for_relations_never_read(tmp_path):
    torch.manual_seed(0)
    encoders = encoders_of(tmp_path)
    sizes = T5Config(3, 320, mlp_width=512, heads=4, vocabulary=len(encoders.tokenizers[2]))
    encoders.t5 = text_encoders.t5(sizes)
    text_to_image.initialise(small.mmdit(), encoders, 64)
    lesson = reading.Reading(encoders, 48).eval()
    wanted = scenes.prompts("triples", 100)
    before = lesson.right_answers(wanted)
    fit(lesson, Recipe(steps=200, learning_rate=1e-3, batch=48, warmup=20), tmp_path / "lesson")
    assert before < 0.1 and lesson.right_answers(wanted) > 0.6


def test_the_lesson_asks_for_place_and_colour_at_the_words_that_name_things():
    scene = captions.parse("a cat above a red circle and left of a tree on gray")
    words = ["A", "kitten", "over", "a", "red", "circle", "and", "left", "of", "a", "tree"]
    told = dict(zip(words, reading.targets(scene, " ".join(words), 12), strict=False))
    places = {"kitten": ("above", "left of"), "circle": ("below", ""), "tree": ("", "right of")}
    for word, place in places.items():
        colour = "red" if word == "circle" else ""
        assert told[word] == (reading.PLACES.index(place), reading.HUES.index(colour))
    assert {told[word] for word in told.keys() - places} == {(reading.IGNORED, reading.IGNORED)}
