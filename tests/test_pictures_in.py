"""Pictures with captions: how they are read, cut, kept and paired."""

import json
import os

import numpy as np
import pytest
import small
import torch
from hypothesis import given, strategies
from PIL import Image

from sd3min.config import Refusal
from sd3min.pipeline import to_tensor
from sd3min.training.data import (
    Example,
    LatentCache,
    batches,
    bucket,
    fitted,
    read_dataset,
    read_folder,
)

EXACT = {"rtol": 0, "atol": 0}


def picture(seed=0, size=(40, 24), mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Three pictures, told of by a text, by metadata and by nothing."""
    made = tmp_path / "pictures"
    (made / "more").mkdir(parents=True)
    picture(0).save(made / "b.png")
    picture(1).save(made / "a.jpg")
    picture(2).save(made / "more" / "c.webp")
    (made / "b.txt").write_text(" a cat\n")
    (made / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.jpg", "text": "a dog\u2028barks"}, ensure_ascii=False)
        + "\n\n"
        + json.dumps({"file_name": "b.png", "text": "not this"})
        + "\n"
    )
    return made


def test_captions_are_of_the_text_then_of_metadata_then_of_the_prompt(folder):
    found = {os.path.basename(e.name): e.caption for e in read_folder(folder, "a thing")}
    assert found == {"a.jpg": "a dog\u2028barks", "b.png": "a cat", "c.webp": "a thing"}


def test_an_empty_caption_is_a_caption(folder):
    (folder / "b.txt").write_text("")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": ""}')
    assert [e.caption for e in read_folder(folder, "a thing")] == ["", "", "a thing"]


def test_a_picture_without_a_caption_is_refused_by_name(folder):
    with pytest.raises(Refusal, match=r"c\.webp has no caption: write c\.txt beside it"):
        read_folder(folder)


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        '"text"',
        "[]",
        "3",
        "{}",
        '{"file_name": "a.jpg"}',
        '{"text": "a"}',
        '{"file_name": "a.jpg", "text": null}',
        '{"file_name": 3, "text": "a"}',
        '{"file_name": [], "text": "a"}',
        "[" * 100_000,
    ],
)
def test_broken_metadata_is_refused_with_its_line(line, folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a"}\n' + line)
    with pytest.raises(Refusal, match=r"metadata\.jsonl, line 2, must be JSON with file_name"):
        read_folder(folder, "a thing")


def test_metadata_of_pictures_that_are_not_there_is_refused(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a"}')
    with pytest.raises(Refusal, match=r"names pictures that are not there: x\.png"):
        read_folder(folder, "a thing")


@pytest.mark.parametrize("name", ["b.txt", "metadata.jsonl"])
def test_text_that_is_not_utf_8_is_refused(name, folder):
    (folder / name).write_bytes(b"\xff\xfe")
    with pytest.raises(Refusal, match=f"{name} cannot be read as text in UTF-8"):
        read_folder(folder, "a thing")


@pytest.mark.parametrize("made", ["none", "empty"])
def test_a_folder_without_pictures_is_refused(made, tmp_path):
    if made == "empty":
        (tmp_path / made).mkdir()
    with pytest.raises(Refusal, match=r"is not a folder of pictures|has no pictures \("):
        read_folder(tmp_path / made)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_picture_that_cannot_be_read_is_refused_by_name(content, folder):
    path = folder / "b.png"
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    example = next(e for e in read_folder(folder, "a thing") if e.name.endswith("b.png"))
    with pytest.raises(Refusal, match=r"the picture .*b\.png cannot be read: "):
        example.open()


def test_a_picture_that_is_too_large_to_be_honest_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Refusal, match=r"cannot be read: .*decompression bomb"):
        read_folder(folder, "a thing")[0].open()


def test_pictures_of_every_kind_become_rgb(tmp_path):
    grey, palette = picture(0, mode="L"), picture(0).quantize(16)
    clear = picture(0).convert("RGBA")
    alpha = Image.new("L", clear.size, 0)
    alpha.paste(128, (0, 0, 20, 24))
    clear.putalpha(alpha)
    for name, image in {"grey": grey, "palette": palette, "clear": clear}.items():
        image.save(tmp_path / f"{name}.png")
    found = {e.name.split("/")[-1]: e.open() for e in read_folder(tmp_path, "a thing")}
    assert {image.mode for image in found.values()} == {"RGB"}
    assert found["grey.png"].tobytes() == grey.convert("RGB").tobytes()
    assert found["palette.png"].tobytes() == palette.convert("RGB").tobytes()
    mixed = np.asarray(found["clear.png"]).astype(float)
    assert (mixed[:, 20:] == 255).all()  # what cannot be seen is white
    behind = np.asarray(picture(0)).astype(float)[:, :20] * 128 / 255 + 255 * 127 / 255
    assert np.abs(mixed[:, :20] - behind).max() <= 1


def test_a_photograph_is_turned_upright(tmp_path):
    image, exif = picture(0), Image.Exif()
    exif[0x0112] = 6  # the camera was on its side
    image.save(tmp_path / "a.png", exif=exif)
    found = read_folder(tmp_path, "a thing")[0].open()
    assert found.tobytes() == image.rotate(-90, expand=True).tobytes() and found.size == (24, 40)


SIDES = strategies.integers(1, 5000)


@given(SIDES, SIDES, strategies.integers(1, 80).map(lambda n: 16 * n))
def test_buckets_are_multiples_of_16_with_no_more_pixels_than_asked(width, height, resolution):
    across, down = bucket(width, height, resolution)
    assert across % 16 == down % 16 == 0 and across >= 16 and down >= 16
    assert across * down <= resolution * resolution
    assert bucket(width, width, resolution) == (resolution, resolution)


@given(SIDES, SIDES)
def test_buckets_have_nearly_the_pictures_shape(width, height):
    across, down = bucket(width, height, 1024)
    stretch = min(max(width / height, 0.5), 2)
    assert across / down == pytest.approx(stretch, rel=0.04)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (900, 300), (300, 900), (50, 50)])
def test_nothing_is_stretched(size):
    """A circle stays one: of its middle rows and columns as many are dark."""
    image = Image.new("L", size, 255)
    side = min(size)
    circle = Image.radial_gradient("L").resize((side, side)).point(lambda v: 0 if v < 100 else 255)
    image.paste(circle, ((size[0] - side) // 2, (size[1] - side) // 2))
    found = np.asarray(fitted(image, bucket(*size, 256))) < 128
    rows, columns = found.any(axis=1).sum(), found.any(axis=0).sum()
    assert rows == pytest.approx(columns, rel=0.03) and rows > 30


@given(
    strategies.lists(strategies.integers(1, 9), min_size=1, max_size=4),
    strategies.integers(1, 5),
    strategies.integers(0, 99),
)
def test_an_epoch_has_every_picture_and_fills_up_with_the_same_buckets(sizes, batch, seed):
    count = sum(-(-size // batch) for size in sizes)
    found = [batches(sizes, batch, seed, count + step) for step in range(count)]
    for which, size in enumerate(sizes):
        places = [place for of, some in found if of == which for place in some]
        assert set(places) == set(range(size)) and len(places) == -(-size // batch) * batch
    assert all(len(places) == batch for _, places in found)


@pytest.fixture
def counted(monkeypatch):
    """An autoencoder, and how many pictures it has encoded."""
    made, calls = small.autoencoder(), []
    moments = made.moments
    monkeypatch.setattr(made, "moments", lambda images: calls.append(images) or moments(images))
    return made, calls


def test_latents_are_kept_by_what_decides_them(counted, tmp_path):
    autoencoder, calls = counted
    image = picture(0, (64, 64))
    examples = [Example(image, "a", "a"), Example(picture(1, (64, 64)), "b", "b")]
    cache = LatentCache(autoencoder, tmp_path)
    first = cache.encode(examples, 32)
    assert len(calls) == 2
    mean, logvar = autoencoder.moments(to_tensor(fitted(image, (32, 32))))
    torch.testing.assert_close(first[0].mean[0], mean[0], **EXACT)
    torch.testing.assert_close(first[0].logvar[0], logvar[0], **EXACT)
    calls.clear()
    renamed = [Example(image.copy(), "another", "of another name"), examples[1]]
    again = LatentCache(autoencoder, tmp_path).encode(renamed[::-1], 32)
    assert calls == []  # another name, caption and order
    torch.testing.assert_close(again[0].mean, first[0].mean.flip(0), **EXACT)
    cache.encode(examples, 48)
    assert len(calls) == 2  # another size
    other = small.autoencoder(seed=9)
    found = LatentCache(other, tmp_path).encode(examples, 32)
    assert not torch.equal(found[0].mean, first[0].mean)  # another autoencoder


def test_a_damaged_latent_is_made_again(counted, tmp_path):
    autoencoder, calls = counted
    cache, examples = LatentCache(autoencoder, tmp_path), [Example(picture(0), "a", "a")]
    first = cache.encode(examples, 32)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    again = cache.encode(examples, 32)
    assert len(calls) == 2 and torch.equal(again[0].mean, first[0].mean)


def test_a_cache_that_cannot_be_written_is_refused(counted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot be written"):
        LatentCache(counted[0], tmp_path / "file").encode([Example(picture(0), "a", "a")], 32)


@pytest.fixture
def table(tmp_path):
    """A dataset on disk, as saved and within a dictionary of splits."""
    import datasets

    images = [picture(i) for i in range(3)]
    rows = datasets.Dataset.from_dict(
        {"image": images, "words": ["a", "b", "c"], "number": [1, 2, 3]},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "words": datasets.Value("string"),
                "number": datasets.Value("int64"),
            }
        ),
    )
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    return tmp_path


@pytest.mark.parametrize("name", ["rows", "splits"])
def test_a_dataset_on_disk_gives_its_pictures_with_its_captions(name, table):
    found = read_dataset(str(table / name), "image", "words")
    assert [e.caption for e in found] == ["a", "b", "c"]
    assert [e.open().tobytes() for e in found] == [picture(i).tobytes() for i in range(3)]
    assert {e.caption for e in read_dataset(str(table / name), caption="all")} == {"all"}


def test_a_folder_of_pictures_is_a_dataset_too(folder):
    (folder / "more" / "c.webp").unlink()
    (folder / "b.txt").unlink()
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "a"}\n{"file_name": "b.png", "text": "b"}\n'
    )
    found = read_dataset(str(folder), text="text")
    assert sorted(e.caption for e in found) == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("picture", "words", None), "has no column 'picture'"),
        (("image", "text", None), "has no column 'text'"),
        (("image", None, None), "name the dataset's column of captions"),
        (("image", "number", None), "has no text as the caption of row 0: 1"),
    ],
)
def test_a_dataset_of_other_columns_is_refused(given, words, table):
    with pytest.raises(Refusal, match=words):
        read_dataset(str(table / "rows"), *given)


def test_a_dataset_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"the dataset .*none cannot be loaded"):
        read_dataset(str(tmp_path / "none"), text="words")


def test_a_column_of_no_pictures_is_refused_by_its_row(table):
    with pytest.raises(Refusal, match=r"the dataset .*rows has no picture in row 0: 'a'"):
        read_dataset(str(table / "rows"), "words", "words")
