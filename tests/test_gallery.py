"""Many pictures: each made once, by its own seed, whoever makes it and however often it starts."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3min import cli, gallery, pipeline

PROMPTS = ["a red star", "a blue circle", "a star", "a green ★", "a red star", "  a heart"]
WEIGHTS = ["--weights", "small.safetensors", "--steps", "2"]
CALL = ["generate", "--prompts", "prompts.txt", "--out-dir", "out", *WEIGHTS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as processes started here have: the same bytes come out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small model, and the gallery of the prompts, made in one go."""
    folder = tmp_path_factory.mktemp("model")
    small.save_official(small.pipeline(folder), folder / "small.safetensors")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    with contextlib.chdir(folder):
        assert run("--out-dir", "whole") == 0
    return folder


@pytest.fixture
def here(model, tmp_path, monkeypatch):
    """A working folder with the model and the prompts and nothing else."""
    for path in model.iterdir():
        if path.name not in ("whole", "prompts.txt"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "prompts.txt").write_bytes((model / "prompts.txt").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder, *arguments, program=("-m", "sd3min")):
    """A process of one thread, as from a terminal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def run(*extra):
    return cli.main([*CALL, "--seed", "5", *extra])


def refused(arguments, capsys):
    """The one line that a call is refused with."""
    assert cli.main(arguments) == 2
    output, line = capsys.readouterr()
    assert not output and line.startswith("sd3min: ") and line.count("\n") == 1, line
    return line


def test_the_manifest_names_every_picture_in_order(model):
    lines = (model / "whole/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["prompt"] for entry in entries] == PROMPTS
    assert [entry["seed"] for entry in entries] == [5, 6, 7, 8, 9, 10]
    assert [entry["file"] for entry in entries] == [f"{i:06}.png" for i in range(6)]
    for entry in entries:
        content = (model / "whole" / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert {path.name for path in (model / "whole").iterdir()} == {
        "manifest.jsonl",
        *(entry["file"] for entry in entries),
    }


def test_each_picture_is_the_one_that_its_prompt_and_seed_make_alone(here, model):
    alone = ["generate", "a star", *WEIGHTS, "--seed", "7", "--out", "alone.png"]
    assert cli.main(alone) == 0
    assert Path("alone.png").read_bytes() == (model / "whole/000002.png").read_bytes()


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)]
)
def test_two_processes_make_what_one_makes_and_share_the_work(launcher, here, model):
    """Files, manifest and all, bit for bit; they print nothing but where the manifest is."""
    programs = {
        "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "sd3min"),
        "accelerate": (
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
            *("--main_process_port=0", "-m", "sd3min"),
        ),
    }
    two = start(here, *CALL, "--seed", "5", program=programs[launcher])
    output, errors = two.communicate(timeout=120)
    assert two.returncode == 0, errors
    assert output and not output.replace("out/manifest.jsonl", "").strip()
    assert contents(here / "out") == contents(model / "whole")


def test_processes_make_their_own_share_alone_and_the_last_writes_the_manifest(
    here, model, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run() == 0
    assert capsys.readouterr().out == ""
    assert set(contents(here / "out")) == {"000001.png", "000003.png", "000005.png"}
    first = times(here / "out")
    monkeypatch.setenv("RANK", "0")
    assert run() == 0
    assert capsys.readouterr().out == "out/manifest.jsonl\n"
    assert len(contents(here / "out")) == 7
    assert first.items() <= times(here / "out").items()


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_and_makes_nothing_twice(kills, here, model):
    """Killed by force at random moments, then left alone: the same folder as in one go."""
    rng, seen = random.Random(0), {}
    for wanted in range(2, 2 + kills):
        process = start(here, *CALL, "--seed", "5")
        while len(times(here / "out")) < min(wanted, 5) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = times(here / "out")
        assert seen.items() <= now.items()
        seen = now
    assert seen
    assert run() == 0
    assert seen.items() <= times(here / "out").items()
    assert contents(here / "out") == contents(model / "whole")


def test_a_finished_run_loads_no_weights_and_changes_nothing(here, model, monkeypatch, capsys):
    (here / "out").mkdir()
    for name, content in contents(model / "whole").items():
        (here / "out" / name).write_bytes(content)
    before = times(here / "out")
    monkeypatch.setattr(gallery.pipeline, "save", None)
    monkeypatch.setattr(cli.loading, "assemble", None)
    assert run() == 0
    assert capsys.readouterr().out == "out/manifest.jsonl\n"
    assert times(here / "out") == before and contents(here / "out") == contents(model / "whole")


def flipped(content):
    """One bit in the middle of the picture."""
    middle = len(content) - 60
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: content[:-1],
    flipped,
    lambda content: bytes(len(content)),
]


def test_damaged_pictures_are_made_again_and_the_others_are_not(here, model):
    (here / "out").mkdir()
    whole = contents(model / "whole")
    for i, damage in enumerate([*DAMAGES, lambda content: content]):
        (here / "out" / f"{i:06}.png").write_bytes(damage(whole[f"{i:06}.png"]))
    intact = (here / "out/000005.png").stat().st_mtime_ns
    assert run() == 0
    assert times(here / "out")["000005.png"] == intact
    assert contents(here / "out") == whole


@pytest.mark.parametrize("cut", [*range(1, 14), 50, 500])
def test_a_picture_cut_anywhere_is_damaged(cut, model):
    content = (model / "whole/000000.png").read_bytes()
    assert gallery.said(content)["prompt"] == PROMPTS[0]
    assert gallery.said(content[:-cut]) is None
    assert gallery.said(content[: 10 * cut]) is None


def test_a_picture_without_a_manifest_counts_and_a_manifest_without_a_picture_does_not(here, model):
    (here / "out").mkdir()
    whole = contents(model / "whole")
    for name in ("000000.png", "manifest.jsonl"):
        (here / "out" / name).write_bytes(whole[name])
    before = times(here / "out")
    assert run() == 0
    assert before.items() <= times(here / "out").items()
    assert set(contents(here / "out")) == set(whole)


def foreign(path, text=None):
    info = PngInfo()
    if text:
        info.add_itxt("sd3min", text)
    Image.new("RGB", (64, 48)).save(path, format="PNG", pnginfo=info)


@pytest.mark.parametrize(
    ("change", "extra", "said"),
    [
        (lambda: swap("a blue circle", "a blue square"), (), "prompt 'a blue circle', not 'a blue"),
        (lambda: None, ("--seed", "6"), "000000.png is there with seed 5, not 6: move it away"),
        (lambda: None, ("--steps", "3"), "000000.png is there with steps 2, not 3"),
        (lambda: None, ("--negative", "x"), "negative_prompt '', not 'x'"),
        (lambda: None, ("--no-t5",), "is there with t5 True, not False"),
        (lambda: None, ("--dtype", "bfloat16"), "with dtype 'float32', not 'bfloat16'"),
        (lambda: None, ("--mmdit", "int8", "--memory", "resident"), "mmdit None, not 'int8'"),
        (lambda: None, ("--num-images", "2"), "with prompt 'a blue circle', not 'a red star'"),
        (lambda: other_weights(), (), "000000.png is there with weights '"),
        (lambda: foreign("out/000004.png"), (), "000004.png is there with prompt None, not 'a"),
        (lambda: foreign("out/000004.png", "{}"), (), "000004.png is there with prompt None"),
        (lambda: foreign("out/000004.png", "[1]"), (), "000004.png is there with prompt None"),
        (lambda: as_folder(), (), "000004.png cannot be read (Is a directory): move it away"),
    ],
)
def test_another_picture_under_a_number_is_refused_and_kept(
    change, extra, said, here, model, capsys
):
    (here / "out").mkdir()
    for name, content in contents(model / "whole").items():
        (here / "out" / name).write_bytes(content)
    change()
    before = times(here / "out")
    line = refused([*CALL, "--seed", "5", *extra], capsys)
    assert said in line and "pass another --out-dir" in line
    assert times(here / "out") == before


def swap(old, new):
    path = Path("prompts.txt")
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def other_weights():
    content = bytearray(Path("small.safetensors").read_bytes())
    content[1 << 19] ^= 1
    Path("small.safetensors").unlink()
    Path("small.safetensors").write_bytes(content)


def as_folder():
    Path("out/000004.png").unlink()
    Path("out/000004.png").mkdir()


def test_prompts_can_be_added_at_the_end(here, model):
    (here / "out").mkdir()
    for name, content in contents(model / "whole").items():
        (here / "out" / name).write_bytes(content)
    before = times(here / "out")
    with Path("prompts.txt").open("a", encoding="utf-8") as file:
        file.write("a square")
    assert run() == 0
    assert before.items() <= times(here / "out").items()
    lines = Path("out/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7 and json.loads(lines[6])["prompt"] == "a square"


def test_batches_make_the_same_pictures_nearly(here, model, monkeypatch):
    """At most a level on a few values: a batch may round otherwise."""
    sizes = []
    call = pipeline.Pipeline.__call__

    def counted(self, prompt, *rest, **given):
        sizes.append(len(prompt))
        return call(self, prompt, *rest, **given)

    monkeypatch.setattr(pipeline.Pipeline, "__call__", counted)
    assert run("--batch", "4") == 0
    assert sizes == [4, 2]
    for i in range(6):
        ours, whole = (
            Image.open(folder / f"{i:06}.png") for folder in (here / "out", model / "whole")
        )
        pairs = zip(ours.tobytes(), whole.tobytes(), strict=True)
        differences = [abs(a - b) for a, b in pairs]
        assert max(differences) <= 1 and sum(differences) <= 0.005 * len(differences)
        assert ours.info == whole.info


def test_several_pictures_of_a_prompt_follow_each_other_and_the_first_seed_is_zero(here):
    Path("prompts.txt").write_text("a star\na heart")
    assert cli.main([*CALL, "--num-images", "2"]) == 0
    entries = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == ["a star"] * 2 + ["a heart"] * 2
    assert [entry["seed"] for entry in entries] == [0, 1, 2, 3]


def test_lines_end_as_on_any_system_and_other_separators_are_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\r\nb\u2028c\r\n d ".encode())
    assert gallery.read_prompts(path) == ["a", "b\u2028c", " d "]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "prompts.txt is empty: pass a file with one prompt a line"),
        (b"\n", "line 1 of --prompts prompts.txt is blank: remove it"),
        (b"a\n \t\nb\n", "line 2 of --prompts prompts.txt is blank: remove it"),
        (b"a\n\n", "line 2 of --prompts prompts.txt is blank"),
        (b"\xff\xfe", "prompts.txt cannot be read (not text in UTF-8): pass a text file"),
    ],
)
def test_a_file_that_lists_no_prompts_is_refused(content, said, here, capsys):
    Path("prompts.txt").write_bytes(content)
    assert said in refused(CALL, capsys)
    assert not Path("out").exists()


ONLY = ["generate", *WEIGHTS]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*ONLY, "--prompts", "prompts.txt"], "--prompts, --out-dir and --batch go together"),
        ([*ONLY, "a star", "--out-dir", "out"], "--prompts, --out-dir and --batch go together"),
        ([*ONLY, "a star", "--batch", "2"], "--prompts, --out-dir and --batch go together"),
        ([*ONLY, "a star", *CALL[1:5]], "--prompts names a file of prompts: leave out a prompt"),
        ([*CALL, "--like", "a.png"], "--prompts names a file of prompts: leave out --like"),
        ([*CALL, "--out", "a.png"], "--out a.png is for a prompt: name a folder with --out-dir"),
        ([*CALL, "--batch", "0"], "--batch 0 is not a whole number of at least 1"),
        ([*CALL, "--batch", "two"], "--batch: 'two' is not a whole number"),
        ([*CALL, "--prompts", "none.txt"], "--prompts none.txt cannot be read (No such file or"),
        ([*CALL, "--prompts", "tokenizer"], "--prompts tokenizer cannot be read (Is a directory)"),
        ([*CALL, "--out-dir", "none/out"], "--out-dir none/out cannot be written (No such file"),
        ([*CALL, "--out-dir", "prompts.txt"], "--out-dir prompts.txt cannot be written (File ex"),
        ([*CALL, "--seed", str(2**63 - 3)], "is not a whole number from 0 to 2^63 - 1"),
        ([*CALL, "--steps", "0"], "steps 0 is not a whole number"),
        ([*CALL, "--memory", "small"], "memory small is not one of"),
        ([*CALL, "--dtype", "int8"], "dtype int8 is not one of"),
        ([*CALL, "--strength", "0.5"], "--strength says how far to leave --init-image"),
    ],
)
def test_a_misused_option_is_refused_in_one_sentence_before_any_work(arguments, said, here, capsys):
    assert said in refused(arguments, capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_a_process_of_no_number_is_refused(rank, size, here, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert f"RANK {rank} and WORLD_SIZE {size} name no process: start with" in refused(CALL, capsys)
    assert not Path("out").exists()


def test_processes_of_one_machine_share_its_gpus(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(gallery.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gallery.torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(gallery.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")

    class Loaded(Exception):
        pass

    def load():
        raise Loaded

    made = gallery.Gallery(tmp_path, [{"prompt": str(i)} for i in range(8)])
    for processes in (1, 8):
        with pytest.raises(Loaded):
            made.make(load, {}, 1, 0, processes)
    assert chosen == [1]


def test_a_manifest_that_cannot_be_written_is_refused(here, model, monkeypatch, capsys):
    (here / "out").mkdir()
    for name, content in contents(model / "whole").items():
        (here / "out" / name).write_bytes(content)
    Path("out/manifest.jsonl").unlink()
    Path("out/manifest.jsonl").mkdir()
    line = refused([*CALL, "--seed", "5"], capsys)
    assert "out/manifest.jsonl cannot be written: Is a directory" in line
    assert not list(Path("out").glob(".*"))
