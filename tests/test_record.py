"""A picture is made again from its own record, and a record that is none is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

import sd3min
from sd3min import cli, record

MODEL = ["--weights", "small.safetensors"]
PROMPT = "a red star"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small model, another one with its tokenizers, a picture to start from and a mask."""
    folder = tmp_path_factory.mktemp("models")
    pipe = small.pipeline(folder)
    small.save_official(pipe, folder / "small.safetensors")
    pipe.mmdit.final_layer.linear.bias.data += 0.5
    small.save_official(pipe, folder / "other.safetensors")
    coarse = np.random.default_rng(2).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((64, 48)).save(folder / "start.png")
    mask = Image.new("L", (64, 48), 0)
    ImageDraw.Draw(mask).ellipse((10, 4, 40, 40), fill=255)
    mask.save(folder / "mask.png")
    mask.point(lambda level: 255 - level).save(folder / "inverse.png")
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str, prompt: str | None = None) -> int:
    return cli.main(["generate", *([prompt] if prompt else []), *MODEL, *text.split()])


def same_pixels(one: str, other: str) -> bool:
    return np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def said(capsys) -> str:
    """The one line on the error stream."""
    line = capsys.readouterr().err
    assert line.startswith("sd3min: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(
    "given",
    [
        "--steps 2 --seed 5",
        "--negative blurry --guidance 2.5 --shift 2 --size 32x64 --steps 3",
        "--conventions sd3.5 --steps 3",
        "--conventions comfyui --steps 2 --no-t5",
        "--no-t5 --without-t5 paper --steps 2",
        "--dtype bfloat16 --steps 2 --schedule single_shift --t5-length 20",
    ],
)
def test_a_picture_is_made_again_from_its_record(given, here, capsys):
    assert run(f"{given} --out one.png", PROMPT) == 0
    assert run("--like one.png") == 0
    output, errors = capsys.readouterr()
    assert output == "one.png\none-again.png\n" and not errors
    assert same_pixels("one.png", "one-again.png")
    assert Path("one.png").read_bytes() == Path("one-again.png").read_bytes()


@pytest.mark.parametrize(
    ("given", "t5", "mmdit"),
    [
        ("--t5 int8", "int8", None),
        ("--memory resident --mmdit int8 --no-t5", False, "int8"),
        ("--memory fast --mmdit int8 --t5 int8", "int8", "int8"),
    ],
)
def test_a_picture_is_made_again_with_the_same_eight_bits(given, t5, mmdit, here, capsys):
    assert run(f"{given} --steps 2 --seed 5 --out one.png", PROMPT) == 0
    found = sd3min.read_record("one.png")
    assert (found.t5, found.mmdit) == (t5, mmdit)
    assert run("--like one.png") == 0
    assert Path("one.png").read_bytes() == Path("one-again.png").read_bytes()
    assert not capsys.readouterr().err
    plain = "--no-t5" if t5 is False else ""
    assert run(f"{plain} --steps 2 --seed 5 --out plain.png", PROMPT) == 0
    assert not same_pixels("one.png", "plain.png")
    if mmdit:
        assert run("--like one.png --memory stream --out two.png") == 2
        assert "mmdit int8 is for a network made for runs" in said(capsys)
    else:
        assert run("--like one.png --t5 int4") == 2
        assert "t5 int4 is not one of" in said(capsys)


def test_options_override_the_record(here):
    assert run("--steps 2 --seed 5 --out one.png", PROMPT) == 0
    assert run("--like one.png --seed 6 --guidance 2 --size 32x32 --out two.png", "a cat") == 0
    assert run("--steps 2 --seed 6 --guidance 2 --size 32x32 --out three.png", "a cat") == 0
    assert same_pixels("two.png", "three.png")
    assert run("--like one.png --num-images 2 --out many.png") == 0
    seeds = [sd3min.read_record(f"many-0{i}.png").call["seed"] for i in range(2)]
    assert seeds == [5, 6]
    assert run("--like one.png --no-t5 --out without.png") == 0
    assert run("--like without.png --t5 int8 --out eight.png") == 0
    assert [sd3min.read_record(f"{n}.png").t5 for n in ("without", "eight")] == [False, "int8"]


def test_steps_override_a_records_times(here):
    call = {"seed": 5, "progress": False}
    pipe = sd3min.load("small.safetensors")
    sd3min.save(pipe(PROMPT, sigmas=[1.0, 0.5], **call)[0], "one.png")
    sd3min.save(pipe(PROMPT, steps=3, **call)[0], "two.png")
    assert run("--like one.png") == 0 and same_pixels("one.png", "one-again.png")
    assert run("--like one.png --steps 3 --out three.png") == 0
    assert same_pixels("two.png", "three.png") and not same_pixels("one.png", "three.png")


@pytest.mark.parametrize("mask", ["", "--mask mask.png", "--mask mask.png --no-keep-unmasked"])
def test_the_starting_picture_and_the_mask_are_asked_for_by_their_hash(mask, here, capsys):
    call = f"--init-image start.png {mask} --strength 0.7 --steps 3 --seed 1"
    assert run(f"{call} --out one.png", PROMPT) == 0
    found = sd3min.read_record("one.png")
    assert bool(found.mask_image) == bool(mask)
    capsys.readouterr()

    assert run("--like one.png") == 2
    line = said(capsys)
    assert f"pass the init image of SHA-256 {found.init_image} as --init-image" in line
    assert run("--like one.png --init-image mask.png") == 2
    line = said(capsys)
    assert "--init-image mask.png is not what the picture was made from: pass" in line
    assert found.init_image in line
    if mask:
        assert run("--like one.png --init-image start.png") == 2
        assert f"SHA-256 {found.mask_image} as --mask" in said(capsys)
        assert run("--like one.png --init-image start.png --mask inverse.png") == 2
        assert "--mask inverse.png is not what the picture was made from" in said(capsys)
    assert not Path("one-again.png").exists()

    option = "--mask mask.png" if mask else ""
    assert run(f"--like one.png --init-image start.png {option}") == 0
    assert same_pixels("one.png", "one-again.png")


def test_the_hash_is_of_pixels_and_size_and_not_of_the_file(here):
    image = Image.open("start.png")
    image.save("other.bmp")
    assert record.pixel_hash(Image.open("other.bmp")) == record.pixel_hash(image)
    turned = Image.frombytes("RGB", (48, 64), image.tobytes())
    assert record.pixel_hash(turned) != record.pixel_hash(image)
    grey = Image.open("mask.png")
    assert record.pixel_hash(grey.convert("RGB"), "L") == record.pixel_hash(grey, "L")


def test_other_weights_are_refused_unless_they_are_asked_for(here, capsys):
    assert run("--steps 2 --seed 1 --out one.png", PROMPT) == 0
    capsys.readouterr()
    assert cli.main(["generate", "--like", "one.png", "--out", "two.png"]) == 2
    assert "one.png was made with weights of fingerprint" in (line := said(capsys))
    assert "name theirs with --weights" in line and not Path("two.png").exists()
    other = ["--weights", "other.safetensors", "--out", "two.png"]
    assert cli.main(["generate", "--like", "one.png", *other]) == 0
    assert "another picture" in said(capsys)
    assert not same_pixels("one.png", "two.png")


def rewritten(name: str, **changes) -> None:
    """Write one.png's pixels again with its record changed."""
    with Image.open("one.png") as image:
        values = json.loads(image.info["sd3min"]) | changes
        write(name, json.dumps(values))


def write(name: str, text: str) -> None:
    info = PngInfo()
    info.add_itxt("sd3min", text)
    Image.new("RGB", (64, 48)).save(name, pnginfo=info)


def test_a_record_of_another_version_warns_and_is_followed(here, capsys):
    assert run("--steps 2 --seed 1 --out one.png", PROMPT) == 0
    rewritten("old.png", versions=record.current_versions() | {"torch": "1.0"})
    capsys.readouterr()
    assert run("--like old.png") == 0
    assert "old.png was made with torch 1.0, this is" in said(capsys)
    assert same_pixels("one.png", "old-again.png")


def test_a_record_without_what_later_versions_added_is_followed(here):
    assert run("--steps 2 --seed 1 --out one.png", PROMPT) == 0
    values = json.loads(Image.open("one.png").info["sd3min"])
    late = ("keep_unmasked", "without_t5", "conventions", "init_image", "mask_image", "t5", "dtype")
    write("old.png", json.dumps({name: values[name] for name in values if name not in late}))
    assert run("--like old.png") == 0
    assert same_pixels("one.png", "old-again.png")


HOSTILE = {
    "no JSON": "{",
    "empty": "",
    "a list": "[1, 2]",
    "a number": "3",
    "nothing in it": "{}",
    "nested": "[" * 100_000 + "]" * 100_000,
    "nested in a name": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a number of too many digits": '{"seed": ' + "9" * 5000 + "}",
}
WRONG = {
    "prompt": [3, None, ["a", "b"], {"a": 1}],
    "seed": ["1", 1.5, True, None, [1, 2]],
    "steps": ["28", 1e400, int("9" * 4000), [1], {}],
    "width": [64.0, "64", None],
    "guidance_scale": ["7", True, int("9" * 4000)],
    "sigmas": ["1", [[1.0]], ["1"], 3],
    "schedule": [1, ["official"], "x" * 10_000],
    "conventions": [{"name": "sd3-ref"}, 3, None],
    "weights": [3, None, "x" * 10_000],
    "versions": ["1", {"torch": 3}, {"torch": {"torch": "1"}}, {"torch": "1" * 10_000}],
    "init_image": [3, ["x"]],
    "dtype": [32, None],
    "progress": [True],
    "on_step": ["print"],
    "num_images": [10**6],
    "out\nfile": ["x"],
}
SENSELESS = {
    "steps": [0, -1, 10**12],
    "seed": [-1, 2**63],
    "width": [100, 10**9, 0],
    "guidance_scale": [-1, float("nan"), 1e300],
    "shift": [0, float("nan"), float("inf")],
    "strength": [0, 2],
    "sigmas": [[], [0.5, 1.0], [1.0, 0.0]],
    "schedule": ["karras"],
    "sampler": [""],
    "without_t5": ["nothing"],
    "conventions": ["a1111"],
    "t5_length": [0, 10**9],
    "dtype": ["int8", "nn"],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_text_that_is_no_record_is_refused_in_one_sentence(case, here, capsys):
    write("bad.png", HOSTILE[case])
    assert run("--like bad.png") == 2
    assert "the record of bad.png is damaged in" in (line := said(capsys))
    assert len(line) < 300


def test_a_record_with_a_value_of_no_sense_is_refused_in_one_sentence(here, capsys):
    assert run("--steps 1 --seed 1 --out one.png", PROMPT) == 0
    capsys.readouterr()
    before = set(Path().iterdir())
    for changes, words in ((WRONG, "the record of bad.png is damaged in"), (SENSELESS, " is ")):
        for name, values in changes.items():
            for value in values:
                rewritten("bad.png", **{name: value})
                assert run("--like bad.png") == 2, (name, value)
                line = said(capsys)
                assert words in line and len(line) < 400, line
                assert name.split("\n")[0] in line or words == " is "
    assert set(Path().iterdir()) - before == {Path("bad.png")}


def test_a_record_in_an_unreadable_chunk_is_refused(here, capsys):
    assert run("--steps 1 --seed 1 --out one.png", PROMPT) == 0
    info = PngInfo()
    info.add_itxt("sd3min", "x" * 10_000_000, zip=True)  # more than a picture's texts may hold
    Image.new("RGB", (64, 48)).save("bomb.png", pnginfo=info)
    whole = Path("one.png").read_bytes()
    Path("cut.png").write_bytes(whole[:60])
    capsys.readouterr()
    for name in ("bomb.png", "cut.png"):
        assert run(f"--like {name}") == 2
        assert name in said(capsys)


def test_python_reads_a_record_and_calls_with_it(here):
    pipe = sd3min.load("small.safetensors")
    given = {"seed": 4, "steps": 2, "width": 32, "guidance_scale": 2}
    image = pipe(PROMPT, conventions="sd3-ref", progress=False, **given)[0]
    sd3min.save(image, "one.png")
    found = sd3min.read_record("one.png")
    assert found.call["conventions"] == "sd3-ref" and found.call["steps"] == 2
    again = pipe(**found.call, progress=False)[0]
    assert np.array_equal(np.asarray(again), np.asarray(image))
    assert again.info == image.info


def test_numpys_numbers_are_recorded_as_numbers():
    values = {"steps": np.int64(2), "shift": np.float32(0.5), "sigmas": (np.float64(1), 0.5)}
    assert json.loads(record.dumps(values)) == {"steps": 2, "shift": 0.5, "sigmas": [1.0, 0.5]}
