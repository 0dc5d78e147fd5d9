"""`sd3min finetune` and `sd3min train`, from the command to the file that is made."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch
from killing import child, killed_after
from PIL import Image
from safetensors.torch import load_file

import sd3min
from sd3min import cli
from sd3min.training import curves, from_scratch, peer_options
from sd3min.training.commands import add_finetune
from sd3min.training.peer_options import NEEDLESS, REFUSED, TAKEN
from sd3min.training.plan import Plan

EXACT = {"rtol": 0, "atol": 0}
QUICK = ["--steps", "2", "--precision", "no", "--resolution", "32", "--prompt", "a red circle"]
GUIDE = """
  --pretrained_model_name_or_path=${MODEL_NAME}  \\
  --instance_data_dir=${INSTANCE_DIR} \\
  --output_dir=/raid/.cache/${OUTPUT_DIR} \\
  --mixed_precision="fp16" \\
  --instance_prompt="a photo of sks dog" \\
  --resolution=1024 \\
  --train_batch_size=1 \\
  --gradient_accumulation_steps=4 \\
  --learning_rate=1e-5 \\
  --report_to="wandb" \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --max_train_steps=500 \\
  --weighting_scheme="logit_normal" \\
  --validation_prompt="A photo of sks dog in a bucket" \\
  --validation_epochs=25 \\
  --seed="0" \\
  --push_to_hub
"""


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Matplotlib takes most of the time of so short a run."""
    monkeypatch.setattr(curves, "draw", lambda log, path: path.write_text("plot"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model and five pictures."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").mkdir()
    small.save_official(small.pipeline(folder / "model"), folder / "model" / "model.safetensors")
    (folder / "dog").mkdir()
    for i in range(5):
        Image.new("RGB", (48, 32), (50 * i, 0, 200 - 50 * i)).save(folder / "dog" / f"{i}.png")
    return folder


@pytest.fixture
def finetune(place, tmp_path, capsys):
    """Runs the command; its exit code and what it said."""

    def run(*options, out="out"):
        given = ["--weights", place / "model" / "model.safetensors", "--data", place / "dog"]
        given += ["--out", tmp_path / out, *QUICK, *options]
        code = cli.main(["finetune", *map(str, given)])
        said = capsys.readouterr()
        told = [line for line in said.err.splitlines() if line.startswith("sd3min:")]
        assert "Traceback" not in said.err
        return code, said.out.strip(), told

    return run


def test_the_guides_command_runs_as_it_is_written(place, tmp_path, monkeypatch, capsys):
    """With other paths, fewer steps, a smaller side, and a model that samples in few steps."""
    monkeypatch.chdir(tmp_path)
    text = GUIDE.replace("/raid/.cache/", "").replace("1024", "32").replace("500", "3")
    for name, value in {
        "MODEL_NAME": place / "model" / "model.safetensors",
        "INSTANCE_DIR": place / "dog",
        "OUTPUT_DIR": "dreambooth-sd3-lora",
    }.items():
        text = text.replace(f"${{{name}}}", str(value))
    assert cli.main(["finetune", *shlex.split(text.replace("\\\n", " "))]) == 0
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("sd3min:")]
    told = [line for line in told if "did not see" not in line]  # the small model reads 16 tokens
    assert [re.search("report to wandb|uploaded|float16", line)[0] for line in told] == [
        "report to wandb",
        "uploaded",
        "float16",
    ]
    out = tmp_path / "dreambooth-sd3-lora"
    assert said.out.strip() == "dreambooth-sd3-lora/lora.safetensors"
    assert (out / "sample-000003.png").exists()
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rate"] == 1e-5
    pipe = sd3min.load(place / "model" / "model.safetensors", lora=out / "lora.safetensors")
    assert pipe("a photo of sks dog", steps=1, progress=False)[0].size == (64, 48)


def parser():
    made = cli.options.Parser(prog="sd3min finetune")
    add_finetune(made)
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_diffusers_that_are_not_here_say_what_to_do(name):
    for given in ([name], [name, "1"], [f"{name}=1"]):
        with pytest.raises(sd3min.config.Refusal) as refused:
            parser().parse_args(["--out", "x", *given])
        assert str(refused.value) == f"{name} of diffusers is not taken: {REFUSED[name]}"


@pytest.mark.parametrize("name", [*TAKEN, *NEEDLESS])
def test_options_of_diffusers_that_are_here_are_taken(name):
    action = parser()._option_string_actions[name]
    given = [name] if action.nargs == 0 else [name, "1"]
    assert parser().parse_args(["--out", "x", *given])


def test_the_table_of_options_has_each_once():
    lines = peer_options.table(parser()).splitlines()
    names = [re.match(r"\| `(--\w+)` \|", line)[1] for line in lines[2:]]
    assert sorted(names) == sorted([*TAKEN, *NEEDLESS, *REFUSED]) and len(set(names)) == len(names)
    assert "| `--instance_data_dir` | `--data` |" in "\n".join(lines)
    assert all(line.count("|") - line.count("\\|") == 4 for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rate", "-1"], "learning_rate of -1.0 is not a number above 0"),
        (["--steps", "0"], "steps of 0 must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--accumulation", "0"], "must be at least 1"),
        (["--validate-every", "0"], "--validate-every must be at least 1"),
        (["--resolution", "20"], "a resolution of 20 is not a multiple of 16"),
        (["--resolution", "0"], "a resolution of 0 is not a multiple of 16"),
        (["--dropout", "nan"], "a dropout of nan must be at least 0 and below 1"),
        (["--clip", "0"], "clip of 0.0 is not a number above 0"),
        (["--average", "1"], "average of 1.0 must be at least 0"),
        (["--precision", "fp8"], "precision fp8 is not one of"),
        (["--schedule", "cosine"], "schedule cosine is not one of constant, linear"),
        (["--objective", "mse"], "objective mse is not one of paper, diffusers, kohya"),
        (["--weighting_scheme", "x"], "weighting scheme x is not one of"),
        (["--rank", "0"], "rank 0"),
        (
            ["--density", "normal"],
            "density normal is not one of logit-normal, mode, cosmap, uniform",
        ),
        (["--density", "mode", "--objective", "kohya"], "--density is of the paper's objective"),
        (["--device", "mps"], "a run is on cpu or cuda, not on mps"),
        (["--targets", "nothing"], "target nothing is the end of no layer's name"),
        (["--logit_std", "0"], "make no distribution"),
        (["--class-data", "c"], "--class-data goes with --class-prompt"),
        (["--class-prompt", "a dog"], "--class-prompt goes with --class-data"),
        (["--with_prior_preservation"], "goes with --class-data"),
        (["--prior", "network"], "--prior network goes with --class-data and a LoRA"),
        (["--word", "red", "--full"], "--word goes with a LoRA: leave --full out"),
        (["--word-like", "red"], "go with --word, the word to be learnt"),
        (["--word", "red", "--word-rate", "0"], "a word's rate of 0.0 is not"),
        (["--word", "re"], "no caption has the word re: it would learn nothing"),
        (["--word", "red", "--word-rate", "1", "--rate", "0"], "learning_rate of 0.0 is not a num"),
        (["--word", "sks"], "no caption has the word sks: it would learn nothing"),
        (
            ["--word", "robots", "--prompt", "a Robots"],
            "the word robots is 5 tokens: pass one that is a single token, such as sks",
        ),
        (["--alpha", "0"], "alpha 0.0 make no LoRA"),
        (["--resolution", "4096"], "pictures of 4096x4096 are beyond the model's positional table"),
        (["--full", "--dtype", "float16"], "leave --dtype out with --full"),
        (["--resume_from_checkpoint", "checkpoint-5"], "name its folder with --out"),
        (["--dataset", "x"], "with either --data FOLDER or --dataset NAME"),
        (["--targets", "proj, nothing"], "target nothing is the end of no layer's name"),
        (["--full", "--targets", "proj"], "--targets and --alpha are a LoRA's"),
        (["--full", "--alpha", "1"], "--targets and --alpha are a LoRA's"),
        (["--data", ".", "--out", "made"], "--out made lies in --data ., whose pictures are all"),
        (["--data", ".", "--validation-data", "v"], "--validation-data v lies in --data ."),
        (["--data", "nowhere"], "nowhere is not a folder of pictures"),
        (["--validation-data", "nowhere"], "nowhere is not a folder of pictures"),
    ],
)
def test_a_mistake_is_one_sentence(options, words, finetune):
    code, out, told = finetune(*options)
    assert (code, out, len(told)) == (2, "", 1) and words in told[0]


def test_what_is_broken_among_the_pictures_is_one_sentence(finetune, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    code, _, told = finetune("--data", str(folder))
    assert code == 2 and f"the picture {folder}/a.png cannot be read" in told[0]
    (folder / "metadata.jsonl").write_text("{")
    code, _, told = finetune("--data", str(folder))
    assert code == 2 and "metadata.jsonl, line 1, must be JSON" in told[0]


def test_another_run_in_the_same_folder_is_one_sentence(finetune):
    assert finetune()[0] == 0
    assert finetune("--steps", "3")[0] == 0  # which goes on
    code, _, told = finetune("--steps", "4", "--rate", "0.5")
    assert code == 2 and "has a run with other --rate (0.0001, and now 0.5)" in told[0]
    code, _, told = finetune("--steps", "4", "--prompt", "a blue square")
    assert code == 2 and "has a run with other captions" in told[0]


def test_a_loss_that_is_no_number_names_the_pictures(finetune, monkeypatch):
    code, _, told = finetune("--rate", "1e30", "--steps", "9", "--clip", "1e30")
    assert code == 2
    assert re.search(r"is (nan|inf) at step \d, on the pictures '.+/dog/\d\.png': lower", told[0])


def test_full_weights_are_read_after_their_base(finetune, place, tmp_path):
    """The network and both CLIPs as they were trained, and the rest as it was."""
    code, out, _ = finetune("--full", "--train-clips", "--rate", "0.01")
    base = place / "model" / "model.safetensors"
    assert code == 0 and Path(out).name == "weights.safetensors"
    made = sd3min.load([base, out])
    trained = torch.load(tmp_path / "out" / "checkpoint.pt")["trained"]
    before = sd3min.load(base)
    parts = {
        "mmdit": made.mmdit,
        "clip_l": made.text_encoders.clip_l,
        "clip_g": made.text_encoders.clip_g,
    }
    for name, tensor in trained.items():
        _, part, rest = name.split(".", 2)
        torch.testing.assert_close(parts[part].state_dict()[rest], tensor, **EXACT)
    assert not torch.equal(made.mmdit.x_embedder.proj.weight, before.mmdit.x_embedder.proj.weight)
    t5 = made.text_encoders.t5.state_dict()
    for name, tensor in before.text_encoders.t5.state_dict().items():
        torch.testing.assert_close(t5[name], tensor, **EXACT)


def test_clips_train_beside_the_network(finetune):
    code, out, _ = finetune("--train-clips", "--gradient-checkpointing", "--rate", "0.01")
    parts = {name.split(".")[0] for name in load_file(out)}
    assert code == 0 and parts == {"transformer", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("clips", [["--train-clips"], []])
def test_a_word_learns_beside_a_lora(clips, finetune, place):
    words = [*clips, "--word", "sks", "--prompt", "a Sks, red", "--word-like", "cat dog"]
    code, out, _ = finetune(*words, "--rate", "0.001", "--word-rate", "0.02", "--steps", "3")
    assert code == 0
    before = sd3min.load(place / "model" / "model.safetensors")
    tuned = sd3min.load(place / "model" / "model.safetensors", lora=out)
    for part, tokenizer in zip(("clip_l", "clip_g"), tuned.text_encoders.tokenizers, strict=False):
        (_, sks, cat, dog, _) = tokenizer("sks cat dog").input_ids
        old, new = (
            getattr(pipe.text_encoders, part).get_input_embeddings().weight
            for pipe in (before, tuned)
        )
        others = [i for i in range(len(old)) if i != sks]
        assert torch.equal(new[others], old[others])
        moved = (new[sks] - old[[cat, dog]].mean(dim=0)).abs()
        assert 0.01 < moved.max() <= 3 * 0.021  # steps of AdamW are at most as long as the rate
    layers = {name.rpartition(".lora_")[0] for name in load_file(out)}
    assert {name.split(".")[0] for name in layers} == {
        "transformer",
        "text_encoder",
        "text_encoder_2",
    }
    assert any("self_attn" in name for name in layers) == bool(clips)
    code, _, told = finetune(*words, "--rate", "0.001", "--steps", "4")
    assert code == 2 and "has a run with other --word-rate (0.02, and now None)" in told[0]


def test_validation_and_a_class_are_in_the_figures(finetune, place, tmp_path):
    kind = tmp_path / "class"
    options = ["--validation-data", place / "dog", "--validate-every", "1", "--class-data", kind]
    code, _, _ = finetune(*options, "--class-prompt", "a dog", "--class-images", "2")
    text = (tmp_path / "out" / "metrics.jsonl").read_text()
    figures = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and all("validation" in line for line in figures) and len(figures) == 2
    assert sorted(path.name for path in kind.iterdir()) == ["00000.png", "00001.png"]
    made = {}
    for prior in ("pictures", "network"):
        class_ = ["--class-data", kind, "--class-prompt", "a dog", "--class-images", "2"]
        assert finetune(*class_, "--prior", prior, out=prior)[0] == 0
        made[prior] = (tmp_path / prior / "lora.safetensors").read_bytes()
    assert made["pictures"] != made["network"]
    code, _, told = finetune(*class_, "--prior", "pictures", out="network")
    assert code == 2 and "has a run with other --prior (network, and now pictures)" in told[0]


def test_kohyas_times_are_not_shifted_and_the_papers_have_its_densities(finetune, tmp_path):
    for name, options in {
        "kohya": ["--objective", "kohya"],
        "paper": [],
        "mode": ["--density", "mode"],
    }.items():
        assert finetune(*options, out=name)[0] == 0
    told = {n: json.loads((tmp_path / n / "options.json").read_text()) for n in ("kohya", "paper")}
    assert (told["kohya"]["--shift"], told["paper"]["--shift"]) == (1.0, 3.0)
    made = {n: (tmp_path / n / "lora.safetensors").read_bytes() for n in ("paper", "mode")}
    assert made["paper"] != made["mode"]


def test_a_dataset_and_tensorboard_by_the_command(place, tmp_path, capsys):
    import datasets

    pictures = [Image.open(path).convert("RGB") for path in sorted((place / "dog").glob("*.png"))]
    rows = {"shown": pictures, "said": [f"a cat {i}" for i in range(5)]}
    table = datasets.Dataset.from_dict(rows).cast_column("shown", datasets.Image())
    table.save_to_disk(tmp_path / "rows")
    given = (
        f"--weights {place}/model/model.safetensors --dataset {tmp_path}/rows --out {tmp_path}/out"
    )
    given += " --image-column shown --caption-column said --report_to tensorboard --sample-every 2"
    given += " --steps 2 --precision no --resolution 32"
    options = [*given.split(), "--sample", "a cat", "--sample", "a dog", "--sample", "a fox"]
    assert cli.main(["finetune", *options]) == 0, capsys.readouterr().err
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))
    width, height = Image.open(tmp_path / "out" / "sample-000002.png").size
    assert width >= 2 * 32 and height >= 32 and width * height >= 3 * 32 * 32


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_leaves_the_same_file(place, tmp_path):
    """With signal 9, while it loads, encodes, learns and writes, on a model and a LoRA."""

    def work(out):
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        given = ["--weights", place / "model" / "model.safetensors", "--data", place / "dog"]
        given += ["--out", tmp_path / out, *QUICK, "--steps", "200", "--save-every", "1"]
        assert cli.main(["finetune", *map(str, given)]) == 0

    began = time.monotonic()
    assert os.waitpid(child(lambda: work("whole")), 0)[1] == 0
    lasts = time.monotonic() - began
    rng, kills = random.Random(0), 0
    while kills < 20 and not (tmp_path / "torn" / "lora.safetensors").exists():
        kills += killed_after(rng.uniform(0, 0.15) * lasts, lambda: work("torn"))
    assert kills == 20
    assert os.waitpid(child(lambda: work("torn")), 0)[1] == 0
    made = [(tmp_path / name / "lora.safetensors").read_bytes() for name in ("torn", "whole")]
    assert made[0] == made[1]


FLOW = small.PLAN[small.PLAN.index("[recipes.flow]") :]


@pytest.mark.slow
def test_all_stages_of_a_small_plan_make_a_model_that_draws(tmp_path, capsys):
    path = tmp_path / "little.toml"
    path.write_text(small.PLAN)

    def trained(*given):
        """What another process prints, since torch.compile fails on the type checks of this one."""
        command = [sys.executable, "-m", "sd3min", "train", str(path), *map(str, given)]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout

    given = ["--work", tmp_path / "work", "--out", tmp_path / "made", "--report_to", "tensorboard"]
    made = tmp_path / "made" / "made.safetensors"
    assert trained(*given).strip().endswith(str(made))
    first = made.read_bytes()
    assert sd3min.load(made)("a red circle", progress=False)[0].size == (128, 128)
    assert (tmp_path / "work" / "flow" / "000002.png").exists()
    *_, last = (tmp_path / "work" / "flow" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last).keys() >= {"validation", "validation_t0.0625", "validation_t0.9375"}
    for stage in ("reconstruction", "decoder", "reading", "flow"):
        assert list((tmp_path / "work" / stage / "tensorboard").glob("events.*")), stage
    trained(*given)  # which goes on from where it is done
    assert made.read_bytes() == first

    begun = ["--work", tmp_path / "more", "--out", tmp_path / "further", "--from", made]
    trained(*begun)
    old, new = load_file(made), load_file(tmp_path / "further" / "further.safetensors")
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and "model" in changed and "first_stage_model" not in changed
    assert not [n for n in old if "t5xxl" in n and not torch.equal(old[n], new[n])]
    path.write_text(small.PLAN.replace("depth = 1", "depth = 2"))
    assert cli.main(["train", str(path), *map(str, begun)]) == 2
    assert (
        f"{tmp_path / 'more'} has a run with other depth (1, and now 2)" in capsys.readouterr().err
    )
    begun[1] = tmp_path / "other"
    assert cli.main(["train", str(path), *map(str, begun)]) == 2
    assert f"the MMDiT of {made} has other sizes than the plan's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("depth = 1", "depht = 1", "depht is not one of depth, autoencoder"),
        ("depth = 1\n", "", "depth is missing"),
        ("depth = 1", 'depth = "one"', "depth must be a whole number, not 'one'"),
        ("depth = 1", "depth = 0", "depth of 0 must be at least 1"),
        ("look_every = 2", "look_every = 0", "look_every of 0 must be at least 1"),
        ("pictures = 64", "pictures = true", "pictures must be a whole number, not True"),
        ("[t5]", "[t6]", "t6 is not one of"),
        ("[clip]\nlayers = 2\n", "[clip]\n", "clip.layers is missing"),
        ("[recipes.flow]", "[recipes.flaw]", "recipes lack flow"),
        ("batch = 4", "batch = 0", "batch of 0 must be at least 1"),
        (FLOW, FLOW.replace("batch = 4", "batch = 5"), "the flow's batch must be even"),
        ("batch = 4", "bitch = 4", "recipes.reconstruction.bitch is not one of steps"),
        ("widths = [32, 32, 32, 32]", "widths = 32", "autoencoder.widths must be a list, not 32"),
        (
            "widths = [32, 32, 32, 32]",
            "widths = [32, 32]",
            "makes latents of 1/2 of a picture's side",
        ),
        (
            "width = 128\nheight",
            "width = 64\nheight",
            "defaults are 64x128, and scenes are drawn at",
        ),
        ("t5_length = 24", "t5_length = 16", "t5_length of 16 must be 24, the longest caption's"),
        ("depth = 1", "depth 1", "is not TOML"),
        ("training_shift = 3.0", "training_shift = 0.0", "shift 0.0 is not a number above 0"),
        ("guidance_scale = 2.0", "guidance_scale = nan", "guidance"),
        ("height = 128\nsteps = 2", "height = 128\nsteps = 0", "steps 0 is not"),
        ("width = 128\nmlp_width", "width = 64\nmlp_width", "t5.width of 64 has no room for both"),
    ],
)
def test_a_wrong_plan_is_one_sentence(old, new, words, tmp_path, capsys):
    path = tmp_path / "plan.toml"
    assert old in small.PLAN
    path.write_text(small.PLAN.replace(old, new, 1))
    assert cli.main(["train", str(path), "--work", str(tmp_path / "work")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and words in told[0] and str(path) in told[0]
    assert not (tmp_path / "work").exists()


def test_a_plan_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path / "no.toml"), "--work", str(tmp_path)]) == 2
    assert "no.toml cannot be read" in capsys.readouterr().err


def test_the_shipped_plan_is_one():
    plan = Plan.read(Path(from_scratch.__file__).with_name("sd3-tiny.toml"))
    assert plan.recipes["flow"].average == 0.999
