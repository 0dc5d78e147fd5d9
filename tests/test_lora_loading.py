"""A model is loaded with LoRAs under every plan of memory, and its pictures say which they were."""

import json

import numpy as np
import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sd3min
from sd3min import cli, lora, options
from sd3min.checkpoint import Checkpoint, fingerprint
from sd3min.config import Refusal
from sd3min.convert import convert
from sd3min.fast.prompts import encoders_key
from sd3min.fast.stream import Turns
from sd3min.parts import PREFIXES
from sd3min.pipeline import Pipeline

CPU = torch.device("cpu")
PARTS = ("mmdit", "clip_l", "clip_g", "t5")
NETWORK = ("*qkv", "*proj", "mlp.fc1", "adaLN_modulation.1", "mlp.0")
TARGETS = (*NETWORK, "*_proj", "SelfAttention.q", "wo")
SCALES = {"one": 0.8, "two": -0.5}
PLANS = {
    "plain": {},
    "fast": {"memory": "fast"},
    "resident": {"memory": "resident"},
    "stream": {"memory": "stream"},
    "network in 8 bits": {"memory": "resident", "mmdit": "int8"},
    "T5 in 8 bits": {"t5": "int8"},
    "bfloat16": {"memory": "fast", "dtype": "bfloat16"},
    "streamed bfloat16": {"memory": "stream", "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two LoRAs of all of its parts, one of the MMDiT and the model with both merged."""
    folder = tmp_path_factory.mktemp("models")
    pipe = small.pipeline(folder, small.VARIANTS["SD3.5-medium"])
    small.save_official(pipe, folder / "whole.safetensors")
    encoders = pipe.text_encoders
    modules = pipe.mmdit, encoders.clip_l, encoders.clip_g, encoders.t5
    every = dict(zip(PARTS, modules, strict=True))
    loras = [make(every, folder / f"{name}.safetensors", seed) for seed, name in enumerate(SCALES)]
    make({"mmdit": pipe.mmdit}, folder / "network.safetensors", 3)
    for made, scale in zip(loras, SCALES.values(), strict=True):
        lora.attach(every, made, scale)
    lora.merge(every)
    for module in every.values():
        for name, child in list(module.named_modules()):
            if isinstance(child, lora.layers.LoRALinear):
                module.set_submodule(name, child.plain())
    small.save_official(pipe, folder / "merged.safetensors")
    return folder


def make(modules, path, seed: int) -> lora.LoRA:
    generator = torch.Generator().manual_seed(seed)
    made = lora.add(modules, 3, 5.0, TARGETS if len(modules) > 1 else NETWORK)
    for parameter in made.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    lora.save(made, path)
    lora.detach(modules, made)
    return made


def pixels(pipe: Pipeline) -> np.ndarray:
    call = {"seed": 1, "progress": False, "width": 48, "height": 64, "steps": 2}
    return np.stack([np.asarray(image) for image in pipe(["a red circle", "a cat"], **call)])


def both(folder) -> list:
    return [(folder / f"{name}.safetensors", scale) for name, scale in SCALES.items()]


@pytest.mark.parametrize("plan", PLANS)
def test_pictures_are_those_of_a_file_in_which_the_loras_are_merged(plan, folder):
    whole, given = folder / "whole.safetensors", PLANS[plan]
    made = pixels(sd3min.load(whole, lora=both(folder), **given))
    expected = pixels(sd3min.load(folder / "merged.safetensors", **given))
    without = pixels(sd3min.load(whole, **given))
    assert np.abs(made.astype(int) - without).mean() > 5
    assert np.array_equal(made, expected)


def test_one_path_alone_counts_once(folder):
    whole, one = folder / "whole.safetensors", folder / "one.safetensors"
    expected = pixels(sd3min.load(whole, lora=[(one, 1)]))
    assert np.array_equal(pixels(sd3min.load(whole, lora=str(one))), expected)
    assert np.array_equal(pixels(sd3min.load(whole, lora=[one])), expected)
    assert not np.array_equal(pixels(sd3min.load(whole, lora=[(one, 0.5)])), expected)


def test_a_diffusers_folder_is_changed_and_streamed_like_an_official_file(folder, tmp_path):
    there = convert(folder / "whole.safetensors", tmp_path / "folder", progress=False)
    names = list(PARTS)
    opened = lora.merged(Checkpoint.open(there), both(folder), names)
    expected = Checkpoint.open(folder / "merged.safetensors")
    for name in PARTS:
        part, turns = opened.parts[name], Turns(opened.parts[name], torch.float32, CPU)
        for tensor in expected.parts[name].tensors:
            own = expected.parts[name].tensor(tensor, torch.float32, CPU)
            assert torch.equal(part.tensor(tensor, torch.float32, CPU), own), tensor
            assert torch.equal(turns(tensor), own), tensor


def test_a_changed_tensor_counts_as_memory_of_its_own(folder):
    plain, changed = (
        sd3min.load(folder / "whole.safetensors", memory="resident", lora=given)
        for given in (None, both(folder))
    )
    assert changed.plan().stages[0].weights > plain.plan().stages[0].weights
    assert changed.plan().stages[0].mapped < plain.plan().stages[0].mapped


def test_embeddings_are_kept_apart_only_where_an_encoder_is_changed(folder):
    opened = Checkpoint.open(folder / "whole.safetensors")

    def key(*loras) -> str:
        return encoders_key(lora.merged(opened, list(loras), list(PARTS)), torch.float32)

    one, network = folder / "one.safetensors", folder / "network.safetensors"
    assert key() == key((network, 0.8)) == encoders_key(opened, torch.float32)
    two = folder / "two.safetensors"
    assert len({key(), key((one, 0.8)), key((one, 0.7)), key((two, 0.8))}) == 4


def test_layers_of_a_t5_that_is_left_out_are_told_and_left_out(folder):
    given = {"t5": False, "lora": folder / "one.safetensors"}
    with pytest.warns(UserWarning, match=r"has layers for T5, which is not loaded: left out"):
        made = sd3min.load(folder / "whole.safetensors", **given)
    assert made.loras[0].name == "one.safetensors"


def test_a_t5_that_stays_as_it_is_stored_takes_no_lora(folder, tmp_path):
    tensors = load_file(folder / "whole.safetensors")
    for name in [name for name in tensors if name.startswith(PREFIXES["t5"])]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8.safetensors")
    given = {"tokenizers": folder, "t5": "fp8"}
    with pytest.raises(Refusal, match="t5 fp8 keeps T5 as it is stored, and a LoRA changes it"):
        sd3min.load(tmp_path / "fp8.safetensors", lora=folder / "one.safetensors", **given)
    sd3min.load(tmp_path / "fp8.safetensors", lora=folder / "network.safetensors", **given)


# the command


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str, *prompts: str) -> int:
    weights = ["--weights", "whole.safetensors", "--steps", "2"]
    return cli.main(["generate", *prompts, *weights, *text.split()])


def same_pixels(one: str, other: str) -> bool:
    return np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat.safetensors:0.8", ("cat.safetensors", 0.8)),
        ("cat.safetensors", ("cat.safetensors", 1)),
        (r"C:\loras\cat.safetensors", (r"C:\loras\cat.safetensors", 1)),
        (r"C:\loras\cat.safetensors:-0.5", (r"C:\loras\cat.safetensors", -0.5)),
        ("a:b:2e-1", ("a:b", 0.2)),
        ("cat.safetensors:", ("cat.safetensors:", 1)),
        (":1", (":1", 1)),
    ],
)
def test_a_scale_is_what_follows_the_last_colon_if_it_is_a_number(value, expected):
    path, scale = options.lora(value)
    assert (str(path), scale) == expected


def test_a_picture_names_its_loras_and_is_made_again_with_them(here, capsys):
    given = "--lora one.safetensors:0.8 --lora two.safetensors:-0.5 --seed 3"
    assert run(f"{given} --out one.png", "a cat") == 0
    named = {f"{name}.safetensors": scale for name, scale in SCALES.items()}
    expected = [[name, fingerprint(name), scale] for name, scale in named.items()]
    assert sd3min.read_record("one.png").loras == expected
    assert run("--like one.png --out again.png") == 0
    assert same_pixels("one.png", "again.png")
    assert run("--seed 3 --out plain.png", "a cat") == 0
    assert sd3min.read_record("plain.png").loras == []
    assert not same_pixels("one.png", "plain.png")
    assert not capsys.readouterr().err


def test_loras_of_a_record_are_found_by_their_fingerprint_or_asked_for(here, tmp_path, capsys):
    (here / "away").mkdir()
    assert run("--lora one.safetensors:0.8 --seed 3 --out away/one.png", "a cat") == 0
    kept = (here / "one.safetensors").resolve()
    (here / "one.safetensors").unlink()
    capsys.readouterr()
    assert run("--like away/one.png --out again.png") == 2
    line = capsys.readouterr().err
    assert "away/one.png was made with the LoRA one.safetensors of fingerprint" in line
    assert line.endswith("which is not here: pass it as --lora FILE:0.8\n")
    (here / "one.safetensors").symlink_to(here / "two.safetensors")  # of the name, and another
    assert run("--like away/one.png --out again.png") == 2
    (here / "away" / "one.safetensors").symlink_to(kept)
    assert run("--like away/one.png --out again.png") == 0
    assert same_pixels("away/one.png", "again.png")
    capsys.readouterr()
    assert run("--like away/one.png --lora two.safetensors --out other.png") == 0
    assert "away/one.png was made with other LoRAs: another picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ['["a", "b"]', '[["a", "b", "c"]]', '[["a", "b", 1, 2]]', '"a"', '[[1, "b", 1]]', "{}"]
)
def test_a_record_with_damaged_loras_is_refused(value, here, capsys):
    assert run("--lora one.safetensors --seed 3 --out one.png", "a cat") == 0
    image = Image.open("one.png")
    record = json.loads(image.info["sd3min"]) | {"loras": json.loads(value)}
    image.info["sd3min"] = json.dumps(record)
    sd3min.save(image, "odd.png")
    capsys.readouterr()
    assert run("--like odd.png") == 2
    assert "the record of odd.png is damaged in loras" in capsys.readouterr().err


def test_a_bad_lora_ends_before_anything_is_loaded_with_one_sentence(here, capsys):
    assert run("--lora none.safetensors:0.5", "a cat") == 2
    line = capsys.readouterr().err
    assert line == "sd3min: the LoRA none.safetensors is not a file: " + (
        "pass the path of a .safetensors file\n"
    )
    assert run("--lora whole.safetensors", "a cat") == 2
    line = capsys.readouterr().err
    assert "the LoRA whole.safetensors looks like weights of a whole model, and has" in line
    assert run("--lora one.safetensors:nan", "a cat") == 2
    assert "scale of nan" in capsys.readouterr().err


def test_inspect_says_what_a_lora_is(here, capsys):
    parts = {"mmdit": sd3min.load_mmdit("whole.safetensors")}
    lora.save(lora.read("network.safetensors", parts), "kohya.safetensors", "kohya")
    assert cli.main(["inspect", "network.safetensors", "kohya.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["network.safetensors", "  LoRA in the names of diffusers"]
    layers = 10 + 6 + 6 + 4 + 1 + 2  # two streams of two blocks, the final layer, t and y
    said = f"  MMDiT        {layers} layers, rank 3, alpha 5, for a width of 128: "
    assert lines[2].startswith(said) and "transformer_blocks.*.attn.to_q, " in lines[2]
    assert lines[3:5] == ["kohya.safetensors", "  LoRA in the names of kohya"]
    assert "joint_blocks_*_x_block_attn2_qkv" in lines[5]
    tensors = load_file("kohya.safetensors")
    tensors |= {"why": torch.ones(1), "a.lora_up.weight": torch.ones(2, 2)}
    tensors.pop(next(name for name in tensors if name.endswith("qkv.lora_down.weight")))
    save_file(tensors, "odd.safetensors")
    assert cli.main(["inspect", "odd.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "1 of them half" in out and "not known: a, why" in out
    assert cli.main(["inspect", "whole.safetensors"]) == 0
    assert "missing: nothing" in capsys.readouterr().out


@pytest.mark.parametrize("width", [1536, 2432])
def test_inspect_names_the_models_that_a_lora_is_for(width, tmp_path, capsys):
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {
        "lora_down.weight": torch.zeros(4, width),
        "lora_up.weight": torch.zeros(3 * width, 4),
        "alpha": torch.tensor(2.0),
        "dora_scale": torch.ones(3 * width),
    }
    tensors = {f"{stem}.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    _, kind, line = capsys.readouterr().out.splitlines()
    named = {1536: "SD3-medium, SD3.5-medium", 2432: "SD3.5-large"}[width]
    assert kind == "  DoRA in the names of kohya"
    assert f"1 layers, rank 4, alpha 2, for a width of {width} ({named})" in line
