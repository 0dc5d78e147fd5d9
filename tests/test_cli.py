"""A misuse of the command line ends in one sentence, exit code 2 and no new file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import files
import pytest
import small
from PIL import Image
from safetensors.torch import save_file

from sd3min import cli, generate
from sd3min.options import open_image
from sd3min.training import commands

GOOD = ["generate", "a red star", "--weights", "small.safetensors", "--out", "out.png"]
QUICK = ["--steps", "1", "--seed", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a small model, an MMDiT alone and encoders in files of their own."""
    folder = tmp_path_factory.mktemp("models")
    pipe = small.pipeline(folder)
    small.save_official(pipe, folder / "small.safetensors")
    small.save_official(pipe, folder / "model.safetensors", ("mmdit", "autoencoder"))
    tensors = small.official_tensors(pipe)
    for part in ("clip_l", "clip_g", "t5"):
        save_file(tensors[part], folder / f"{part}.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "t5.safetensors").read_bytes()[:-1])
    (folder / "text.safetensors").write_text("These are not the weights you are looking for.")
    files.sparse(folder / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": [96, 32]})
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    Image.new("RGB", (100, 75), "red").save(folder / "odd.png")
    (folder / "text.png").write_text("not a picture")
    Image.new("L", (64, 48), 255).save(folder / "mask.png")
    Image.new("LA", (64, 48), (255, 128)).save(folder / "thin.png")
    Image.new("I;16", (64, 48), 60000).save(folder / "deep.png")
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A working folder with the models and nothing else."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def refused(arguments, folder, capsys):
    """The one line that a call is refused with."""
    before = listing(folder)
    assert cli.main(arguments) == 2
    output, line = capsys.readouterr()
    assert not output
    assert line.startswith("sd3min: ") and line.count("\n") == 1 and line.endswith("\n"), line
    assert listing(folder) == before
    return line


def options(text):
    return [*GOOD, *(text.split(" ") if text else [])]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--steps 0", "steps 0 is not a whole number"),
        ("--steps -1", "steps -1 is not a whole number"),
        ("--steps abc", "--steps: 'abc' is not a whole number"),
        ("--steps 2.5", "--steps: '2.5' is not a whole number"),
        ("--steps", "--steps: expected one argument"),
        ("--guidance nan", "guidance_scale nan is not a number from"),
        ("--guidance -1", "guidance_scale -1.0 is not a number from"),
        ("--guidance inf", "guidance_scale inf is not a number from"),
        ("--guidance much", "--guidance: 'much' is not a number"),
        ("--shift nan", "shift nan is not"),
        ("--shift 0", "shift 0.0 is not"),
        ("--shift -3", "shift -3.0 is not"),
        ("--shift inf", "shift inf is not"),
        ("--schedule karras", "schedule karras is not one of official"),
        ("--sampler ddim", "sampler ddim is not one of euler"),
        ("--seed -1", "seed -1 is not a whole number from 0"),
        ("--seed one", "--seed: 'one' is not a whole number"),
        ("--seed 9223372036854775808", "is not a whole number from 0 to 2^63 - 1"),
        ("--size 100x100", "width 100 is not a multiple of 16"),
        ("--size 64x50", "height 50 is not a multiple of 16"),
        ("--size 0x0", "width 0 is not a multiple of 16"),
        ("--size 64", "--size: '64' is not a size such as 1024x768"),
        ("--size 64x", "--size: '64x' is not a size"),
        ("--size 208x64", "208x64 is beyond the model's positional table: pass at most 192"),
        ("--num-images 0", "num_images 0 is not a whole number of at least 1"),
        ("--num-images -2", "num_images -2 is not a whole number of at least 1"),
        ("--num-images 1000000000000", "too many for one run: ask for 100 at most"),
        ("--init-image none.png", "none.png does not exist: pass the path of a picture"),
        ("--init-image text.png", "text.png is not a picture that can be read"),
        ("--init-image folder.png", "folder.png is not a picture that can be read"),
        ("--init-image odd.png", "width 100 is not a multiple of 16"),
        ("--init-image red.png --strength 0", "strength 0.0 is not"),
        ("--init-image red.png --strength 1.5", "strength 1.5 is not"),
        ("--init-image red.png --strength nan", "strength nan is not"),
        ("--strength 0.5", "--strength says how far to leave --init-image: pass both"),
        ("--mask mask.png", "--mask says what to repaint of --init-image: pass both"),
        ("--init-image red.png --mask none.png", "--mask none.png does not exist: pass"),
        ("--init-image red.png --mask text.png", "--mask text.png is not a picture that can"),
        ("--init-image odd.png --mask mask.png --size 64x48", "64x48 and init_image 100x75 pixels"),
        ("--init-image red.png --mask thin.png", "mode LA cannot be read as a mask: pass grey"),
        ("--init-image red.png --mask deep.png", "mode I;16 cannot be read as a mask: pass grey"),
        ("--conventions a1111", "conventions a1111 is not one of diffusers, sd3-ref, sd3.5, com"),
        ("--sampler dpmpp", "sampler dpmpp is not one of euler, dpmpp_2m"),
        ("--t5-length 0", "t5_length 0 is not a whole number from 1"),
        ("--without-t5 nothing", "without_t5 nothing is not one of zeros, paper, omit"),
        ("--like none.png", "none.png does not exist: pass a picture that sd3min made"),
        ("--like text.png", "text.png is not a picture that can be read: pass a PNG"),
        ("--like folder.png", "folder.png is not a picture that can be read: pass a PNG"),
        ("--like red.png", "red.png holds no record of sd3min: pass a PNG that sd3min wrote"),
        ("--dtype int8", "dtype int8 is not one of float32, bfloat16, float16"),
        ("--dtype nn", "dtype nn is not one of float32, bfloat16, float16"),
        ("--device foo", "device foo cannot be used here: pass cpu"),
        ("--device cuda:99", "device cuda:99 cannot be used here: pass cpu"),
        ("--device meta", "device meta cannot be used here: pass cpu"),
        ("--out none/out.png", "none/out.png cannot be written (No such file or directory)"),
        ("--out text.png/out.png", "text.png/out.png cannot be written (Not a directory)"),
        ("--out folder.png", "folder.png is a folder: pass the name of a PNG"),
        ("--out .", ". is not the name of a PNG: end it with .png"),
        ("--out out.jpg", "out.jpg is not the name of a PNG: end it with .png"),
        ("--out " + "x" * 300 + ".png", "cannot be written"),
        ("--weights none.safetensors", "none.safetensors does not exist: pass"),
        ("--weights folder.png", "folder.png holds no .safetensors files: pass"),
        ("--weights text.safetensors", "text.safetensors is truncated or no safetensors file"),
        ("--weights truncated.safetensors", "truncated.safetensors is truncated"),
        ("--weights flux.safetensors", "double_blocks.0.img_attn.qkv.weight, which is in no"),
        ("--weights t5.safetensors", "t5.safetensors holds T5 and lacks MMDiT: pass"),
        (
            "--weights model.safetensors",
            "without text encoders: name the files of CLIP-L, CLIP-G, T5",
        ),
        ("--weights model.safetensors --no-t5", "without text encoders: name the files of CLIP-L"),
        ("--memory small", "memory small is not one of fast, resident, stream"),
        ("--t5 int4", "t5 int4 is not one of True, False, int8, fp8, bnb"),
        ("--t5 fp8", "the T5 in small.safetensors is in F32: pass its file in fp8, or t5 int8"),
        ("--memory stream --t5 int8", "t5 int8 is for a T5 that stays in memory: leave it out"),
        ("--no-t5 --t5 int8", "not allowed with argument --no-t5"),
        ("--text-encoders none", "none does not exist: pass"),
        ("--text-encoders model.safetensors", "model.safetensors holds no text encoder"),
        ("--tokenizers none", "none/tokenizer is not CLIP-L's tokenizer"),
        ("--tokenizers folder.png", "folder.png/tokenizer is not CLIP-L's tokenizer"),
        (f"--out {'ü' * 119}.png", "is too long a name: pass one of 240 bytes at most"),
        ("--foo", "unrecognized arguments: --foo"),
    ],
)
def test_a_misused_option_is_refused_in_one_sentence_before_any_work(given, said, here, capsys):
    assert said in refused(options(given), here, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command was given: see sd3min --help"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "the following arguments are required: prompt"),
        (["generate", *GOOD[2:]], "the following arguments are required: prompt"),
        (["generate", "\udcff", *GOOD[2:]], "is not text in UTF-8"),
        ([*GOOD, "--negative", "\udcff"], "is not text in UTF-8"),
        ([*GOOD, "--weights", "a\nfile"], "a file does not exist"),
        ([*GOOD, "--out", ""], "is not the name of a PNG"),
        (["inspect", "none"], "none does not exist: pass"),
        (["explain"], "the following arguments are required: A, B"),
        (["explain", "diffusers"], "the following arguments are required: B"),
        (["explain", "diffusers", "a1111"], "conventions a1111 is not one of diffusers, sd3-ref"),
        (["explain", "sd3-ref", "comfyui", "--weights", "none"], "none does not exist: pass"),
        (["explain", "sd3-ref", "comfyui", "--size", "60x60"], "width 60 is not a multiple of 16"),
        (["inspect", "text.safetensors"], "no safetensors file"),
    ],
)
def test_a_misused_command_is_refused_in_one_sentence(arguments, said, here, capsys):
    assert said in refused(arguments, here, capsys)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "--guidance 0",
        "--guidance 7.5 --negative blurry --shift 1 --schedule single_shift --sampler euler",
        "--size 32x64",
        "--init-image red.png",
        "--init-image red.png --strength 1",
        "--init-image odd.png --size 64x64 --strength 0.01",
        "--no-t5",
        "--memory resident --t5 int8",
        "--memory stream",
        "--dtype bfloat16 --device cpu",
        "--weights model.safetensors --text-encoders clip_g.safetensors t5.safetensors "
        "clip_l.safetensors",
        "--tokenizers .",
        "--conventions sd3-ref",
        "--conventions sd3.5 --steps 2",
        "--conventions comfyui --no-t5",
        "--no-t5 --without-t5 paper",
        "--init-image red.png --mask mask.png",
        "--init-image red.png --mask red.png --no-keep-unmasked --strength 1",
        "--out OUT.PNG",
    ],
)
def test_a_good_call_writes_its_picture_and_says_where(given, here, capsys):
    before = listing(here)
    assert cli.main([*options(given), *QUICK]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    assert listing(here) - before == {Path(output.strip())}
    image = Image.open(output.strip())
    assert image.format == "PNG" and image.mode == "RGB"
    assert image.size == {"--size 32x64": (32, 64)}.get(given, (64, 64 if "64x64" in given else 48))


def test_a_picture_records_what_made_it(here, capsys):
    prompt = "Stern 青い"
    assert cli.main(["generate", prompt, *GOOD[2:], *QUICK, "--guidance", "2"]) == 0
    record = json.loads(Image.open("out.png").info["sd3min"])
    asked = {"prompt": prompt, "seed": 1, "steps": 1, "guidance_scale": 2.0, "width": 64}
    assert asked.items() <= record.items()


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("", "picture.png"),
        ("!!!", "picture.png"),
        ("A red/../star.", "a-red-star.png"),
        ("ümlaut ★", "ümlaut.png"),
        ("x" * 500, "x" * 60 + ".png"),
        ("★" + "ü" * 500, "ü" * 30 + ".png"),
        ("猫" * 500, "猫" * 20 + ".png"),
    ],
)
def test_a_picture_is_named_after_its_prompt_and_an_empty_prompt_is_a_prompt(prompt, name, here):
    assert cli.main(["generate", prompt, "--weights", "small.safetensors", *QUICK]) == 0
    assert Path(name).is_file()


def test_several_pictures_are_numbered_prompt_by_prompt_and_count_their_seeds_up(here, capsys):
    arguments = ["generate", "a red star", "a blue circle", *GOOD[2:], *QUICK]
    assert cli.main([*arguments, "--num-images", "2"]) == 0
    names = [f"out-0{i}.png" for i in range(4)]
    assert capsys.readouterr().out.split() == names
    records = [json.loads(Image.open(name).info["sd3min"]) for name in names]
    assert [record["seed"] for record in records] == [1, 2, 3, 4]
    prompts = [record["prompt"] for record in records]
    assert prompts == ["a red star"] * 2 + ["a blue circle"] * 2


def test_a_file_that_is_there_is_replaced(here):
    Path("out.png").write_text("old")
    assert cli.main([*GOOD, *QUICK]) == 0
    assert Image.open("out.png").size == (64, 48)


def test_the_same_seed_makes_the_same_file(here):
    for name in ("one.png", "two.png"):
        assert cli.main([*GOOD, *QUICK, "--out", name]) == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_a_photo_is_turned_upright(here):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    Image.new("RGB", (48, 64), "red").save("turned.jpg", exif=exif)
    assert open_image(Path("turned.jpg")).size == (64, 48)


def test_a_prompt_that_is_cut_is_a_warning_of_one_line_that_quotes_it(here, capsys):
    assert cli.main(["generate", "a red star " * 5 + "here", *GOOD[2:], *QUICK]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for name, line in zip(("CLIP-L", "CLIP-G", "T5"), lines, strict=True):
        assert line.startswith(f"sd3min: {name} reads 16 tokens") and "here" in line


def test_a_folder_that_cannot_be_written_is_refused(here, capsys, monkeypatch):
    def deny(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(generate.tempfile, "TemporaryFile", deny)
    assert "out.png cannot be written (Permission denied)" in refused(GOOD, here, capsys)


def test_an_interrupted_run_leaves_no_file_and_says_so(here, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.pipeline.Pipeline, "start", interrupt)
    before = listing(here)
    assert cli.main(GOOD) == 130
    assert capsys.readouterr().err == "sd3min: interrupted\n"
    assert listing(here) == before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.")]
)
def test_memory_that_does_not_suffice_is_one_sentence(error, here, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli.pipeline.Pipeline, "start", fail)
    assert "memory does not suffice: pass a smaller --size" in refused(GOOD, here, capsys)
    monkeypatch.setattr(commands, "require_packages", fail)
    line = refused(["finetune", "--out", "tuned"], here, capsys)
    assert "does not suffice: pass a smaller --resolution or --batch" in line
    line = refused(["train", "--work", "work"], here, capsys)
    assert "does not suffice: give the plan smaller batches" in line


def test_explain_prints_every_choice_with_what_it_changes_and_why(here, capsys):
    small_model = ["--weights", "small.safetensors", "--size", "32x16"]
    assert cli.main(["explain", "sd3-ref", "comfyui", *small_model]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    assert output.startswith("sd3-ref and comfyui differ in 4 choices.\n")
    for name in ("without_t5: zeros in sd3-ref, omit in comfyui", "steps: 50", "start: ", "guid"):
        assert f"\n\n{name}" in output
    assert (
        "image to image, 20 steps at strength 0.8: " in output and "of the values change" in output
    )
    assert cli.main(["explain", "sd3-ref", "sd3-ref", *small_model]) == 0
    assert capsys.readouterr().out == "sd3-ref and sd3-ref differ in 0 choices.\n"


def test_help_lists_every_command_and_option(capsys):
    for arguments, words in (
        (["--help"], ["generate", "inspect", "explain"]),
        (["generate", "--help"], ["--weights", "--negative", "--strength", "--out", "--mask"]),
        (["inspect", "--help"], ["path"]),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        output = capsys.readouterr().out
        assert all(word in output for word in words)


def test_inspect_says_what_a_file_holds_and_what_is_missing(here, capsys):
    assert cli.main(["inspect", "small.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small.safetensors" and lines[-1] == "  missing: nothing"
    titles = [line.split()[0] for line in lines[1:-1] if not line.startswith("   ")]
    assert titles == ["MMDiT", "autoencoder", "CLIP-L", "CLIP-G", "T5"]
    assert lines[-2].strip() == "passed over: encoder.embed_tokens.weight"
    assert "of no released size, depth 2, positions 12x12" in lines[1]
    words = len(small.tokenizers(here)[0])
    assert f"in F32: 3 layers, width 64, vocabulary {words}" in lines[3]
    assert cli.main(["inspect", "t5.safetensors"]) == 0
    assert "missing: MMDiT, autoencoder, CLIP-L, CLIP-G\n" in capsys.readouterr().out


@pytest.mark.skipif(not files.manifests(), reason="the official lists are not here")
def test_inspect_knows_an_official_file(tmp_path, capsys):
    name = "sd3_medium_incl_clips.safetensors"
    path = files.sparse(tmp_path / name, files.manifests()[name])
    assert cli.main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert "2,028,328,000 parameters, 491 tensors in F16: SD3-medium, depth 24" in output
    assert "83,819,683 parameters, 244 tensors" in output
    assert output.endswith("  missing: T5\n")


def command(*arguments, stdout=subprocess.PIPE):
    """A run of its own, as from a terminal."""
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    program = [sys.executable, "-m", "sd3min", *arguments]
    return subprocess.run(
        program, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def test_python_m_sd3min_makes_a_picture(here):
    done = command(*GOOD, *QUICK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out.png\n", "")
    assert Image.open("out.png").size == (64, 48)


def test_python_m_sd3min_refuses_in_one_sentence(here):
    before = listing(here)
    done = command(*GOOD, "--shift", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sd3min: shift nan") and done.stderr.count("\n") == 1
    assert listing(here) == before


@pytest.mark.skipif(os.name != "posix", reason="pipes close otherwise elsewhere")
def test_output_that_nobody_reads_is_no_error(here):
    reader, writer = os.pipe()
    os.close(reader)
    done = command("inspect", "small.safetensors", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
