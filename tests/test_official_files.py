"""Every official file loads as it is, whatever its type; sparse files stand in for real ones."""

from pathlib import Path

import files
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import sd3min
from sd3min import cli
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.parts import PREFIXES

CPU = torch.device("cpu")
MIB = 1 << 20
SD3, LARGE = "sd3_medium.safetensors", "sd3.5_large.safetensors"
T5_FP8 = "text_encoders/t5xxl_fp8_e4m3fn.safetensors"
WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"

official = pytest.mark.skipif(not files.manifests(), reason="the official lists are not here")
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's counts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def pipe(folder):
    return small.pipeline(folder)


@pytest.fixture(scope="module")
def whole(pipe, folder):
    return small.save_official(pipe, folder / "whole.safetensors")


def private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) << 10


def refused(action, *words):
    """The sentence that a call is refused with, which is one line and has the words."""
    with pytest.raises(Refusal) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    return sentence


# at their full sizes


@pytest.mark.parametrize("name", files.manifests())
@linux
def test_an_official_file_loads_whole_without_memory_of_its_own(name, tmp_path):
    path = files.sparse(tmp_path / name, files.manifests()[name], "BF16")
    before = private_bytes()
    opened = Checkpoint.open(path)
    opened.require(list(opened.parts))
    modules = [opened.load(part, torch.bfloat16, CPU) for part in opened.parts]
    held = sum(p.numel() * 2 for module in modules for p in module.parameters())
    assert held > 200 * MIB and private_bytes() - before < 64 * MIB
    assert path.stat().st_blocks * 512 < 2 * MIB < path.stat().st_size


@official
@linux
def test_t5_in_fp8_is_read_one_tensor_at_a_time(tmp_path):
    path = files.sparse(tmp_path / "t5", files.manifests()[T5_FP8], "F8_E4M3")
    part = Checkpoint.open(path).parts["t5"]
    before, most = private_bytes(), 0
    for name in ["shared.weight", *list(part.tensors)[:40]]:
        assert part.tensors[name].read().dtype == torch.float8_e4m3fn
        loaded = part.tensors[name].load(torch.bfloat16, CPU)
        assert loaded.dtype == torch.bfloat16
        most = max(most, private_bytes() - before)
        del loaded
    largest = 2 * 32128 * 4096  # bytes of the embedding in bfloat16
    assert largest < most < 1.3 * largest


@official
def test_what_an_official_file_lacks_is_told_with_the_name_of_its_model(tmp_path):
    for name, model in ((SD3, "SD3-medium"), (LARGE, "SD3.5-large")):
        path = files.sparse(tmp_path / name, files.manifests()[name])
        said = f"{path} is {model} without text encoders: name the files of CLIP-L, CLIP-G, T5 too"
        refused(lambda path=path: sd3min.load(path), said)
    clips = files.manifests()["sd3_medium_incl_clips.safetensors"]
    path = files.sparse(tmp_path / "clips", clips)
    refused(lambda: sd3min.load(path), "is SD3-medium and lacks T5", "go without T5")


@official
def test_the_faults_of_all_parts_are_told_at_once_and_in_short(tmp_path):
    listed = dict(files.manifests()["sd3_medium_incl_clips.safetensors"])
    mmdit, clip_g = PREFIXES["mmdit"], PREFIXES["clip_g"]
    for i in range(24):
        del listed[f"{mmdit}joint_blocks.{i}.x_block.mlp.fc1.weight"]
    listed[mmdit + "joint_blocks.3.x_block.attn.ln_q.weight"] = [64]
    listed[mmdit + "final_layer.linear.bias"] = [65]
    del listed[clip_g + "text_projection.weight"]
    opened = Checkpoint.open(files.sparse(tmp_path / "file", listed))
    sentence = refused(
        lambda: opened.require(["mmdit", "clip_g", "autoencoder"]),
        f"the MMDiT in {tmp_path / 'file'} looks like SD3-medium's and lacks",
        "joint_blocks.0.x_block.mlp.fc1.weight, joint_blocks.1.x_block.mlp.fc1.weight, joint",
        "and 21 more",
        "has joint_blocks.3.x_block.attn.ln_q.weight, which does not belong there",
        "has final_layer.linear.bias of shape [65] and not [64]",
        f"; the CLIP-G in {tmp_path / 'file'} lacks text_projection.weight: copy",
    )
    assert "autoencoder" not in sentence and len(sentence) < 900
    opened.require(["autoencoder", "clip_l"])


@official
def test_strange_tensors_are_told_beside_the_faults_of_the_parts(tmp_path):
    listed = dict(files.manifests()[SD3])
    del listed[PREFIXES["mmdit"] + "x_embedder.proj.bias"]
    strange = {f"cond_stage_model.{i}": [1] for i in range(5)}
    path = files.sparse(tmp_path / "file", listed | strange)
    said = (f"{path} holds cond_stage_model.0, cond_stage_model.1, cond_stage_model.2 and 2 more",)
    refused(lambda: Checkpoint.open(path), *said, "lacks x_embedder.proj.bias", "download")


# known extras


def test_known_extras_are_kept_apart_and_no_module_sees_them(whole, tmp_path):
    extras = {
        "text_encoders.clip_l.logit_scale": torch.zeros(1),
        "text_encoders.clip_g.transformer.text_model.embeddings.position_ids": torch.zeros(1, 16),
        "text_encoders.t5xxl.transformer.spiece_model": torch.zeros(9, dtype=torch.uint8),
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "model.diffusion_model.context_embedder.scale_input": torch.ones(()),
    }
    save_file(load_file(whole) | extras, tmp_path / "file")
    opened = Checkpoint.open(tmp_path / "file")
    opened.require(list(PREFIXES))
    held = {tensor.name for part in opened.parts.values() for tensor in part.extras.values()}
    twin = PREFIXES["t5"] + "encoder.embed_tokens.weight"
    assert held == {*extras, twin} - {"text_encoders.clip_l.logit_scale"}
    for name, part in Checkpoint.open(whole).parts.items():
        assert opened.parts[name].tensors.keys() == part.tensors.keys()


@pytest.mark.parametrize("name", ["my_logit_scale", "logit_scale.weight", "scale_weight"])
def test_a_name_that_only_resembles_a_known_extra_is_refused(name, whole, tmp_path):
    given = {PREFIXES["clip_g"] + name: torch.ones(())}
    save_file(load_file(whole) | given, tmp_path / "file")
    action = Checkpoint.open(tmp_path / "file").require
    refused(lambda: action(["clip_g"]), f"has {name}, which does not belong there")


# fp8


def scaled(tensors, names):
    """Weights in fp8, each beside the scale that brings its largest value to fp8's largest."""
    made = dict(tensors)
    for name in names:
        scale = tensors[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
        made[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        made[name.removesuffix("weight") + "scale_weight"] = scale
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scaled_fp8_is_multiplied_in_float32_and_rounded_once(shape, dtype, whole, tmp_path):
    tensors = load_file(whole)
    attention = [n for n in tensors if n.startswith(PREFIXES["mmdit"]) and n.endswith("qkv.weight")]
    t5 = [
        n
        for n in tensors
        if n.startswith(PREFIXES["t5"]) and n.endswith((".q.weight", "wo.weight"))
    ]
    stored = scaled(tensors, attention + t5)
    reshaped = {n: t.reshape(shape) if n.endswith("scale_weight") else t for n, t in stored.items()}
    save_file(reshaped | {"scaled_fp8": torch.zeros(2)}, tmp_path / "file")
    opened = Checkpoint.open(tmp_path / "file")
    for part, names in (("mmdit", attention), ("t5", t5)):
        loaded = opened.load(part, dtype, CPU).state_dict()
        for name in names:
            own = name.removeprefix(PREFIXES[part])
            kept = torch.float32 if own.endswith("wo.weight") and dtype == torch.float16 else dtype
            scale = stored[name.removesuffix("weight") + "scale_weight"]
            expected = (stored[name].to(torch.float32) * scale).to(kept)
            torch.testing.assert_close(loaded[own], expected, rtol=0, atol=0)
            torch.testing.assert_close(  # and it is the weight again, to fp8's three bits
                loaded[own].float(), tensors[name], rtol=2**-4, atol=float(scale) * 2**-9
            )


def test_plain_fp8_becomes_the_working_type_without_rounding(whole, tmp_path):
    tensors = {n: t for n, t in load_file(whole).items() if n.startswith(PREFIXES["t5"])}
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}, tmp_path / "file")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = Checkpoint.open(tmp_path / "file").load("t5", dtype, CPU).state_dict()
        for name, tensor in tensors.items():
            expected = tensor.to(torch.float8_e4m3fn).float()
            own = loaded[name.removeprefix(PREFIXES["t5"])]
            torch.testing.assert_close(own.float(), expected, rtol=0, atol=0)


def test_a_scale_of_several_values_is_refused(whole, tmp_path):
    name = PREFIXES["t5"] + WO
    given = {name.removesuffix("weight") + "scale_weight": torch.ones(320)}
    save_file(load_file(whole) | given, tmp_path / "file")
    action = Checkpoint.open(tmp_path / "file").require
    refused(lambda: action(["t5"]), "wo.scale_weight of shape [320] and not of one value")


@pytest.mark.parametrize("mark", ["comfy_quant", "weight_scale"])
def test_fp8_that_is_scaled_in_another_way_is_refused(mark, whole, tmp_path):
    name = (PREFIXES["t5"] + WO).removesuffix("weight") + mark
    save_file(load_file(whole) | {name: torch.ones(1)}, tmp_path / "file")
    said = f"is quantised in a way not read ({name}): pass a file in float16, bfloat16 or fp8"
    refused(lambda: Checkpoint.open(tmp_path / "file"), str(tmp_path / "file"), said)


def test_a_scaled_file_says_so_when_inspected(whole, tmp_path, capsys):
    name = PREFIXES["t5"] + WO
    save_file(scaled(load_file(whole), [name]), tmp_path / "file")
    assert cli.main(["inspect", str(tmp_path / "file")]) == 0
    assert "tensors in F32, 1 tensors in F8_E4M3 with a scale: 2 layers" in capsys.readouterr().out


# T5 in float16


def loud_t5(whole, path):
    """A T5 whose feed-forward layers answer beyond float16's largest value, 65,504."""
    tensors = load_file(whole)
    for name in tensors:
        if name.endswith("DenseReluDense.wo.weight"):
            tensors[name] = 40_000 * tensors[name]
    save_file(tensors, path)
    return path


def test_t5_in_float16_never_overflows_as_wo_stays_in_float32(whole, tmp_path):
    opened = Checkpoint.open(loud_t5(whole, tmp_path / "file"))
    ids = torch.tensor([[3, 6, 17, 42, 5, 1]])
    exact = opened.load("t5", torch.float64, CPU)(ids).last_hidden_state

    def answer(model):
        """The error of the answer, and the largest value that a wo gave on the way."""
        seen = []
        for block in model.encoder.block:
            wo = block.layer[1].DenseReluDense.wo
            wo.register_forward_hook(lambda _, __, output: seen.append(output.abs().max().item()))
        rows = model(ids).last_hidden_state
        return ((rows.double() - exact).norm() / exact.norm()).item(), max(seen)

    error, largest = answer(opened.load("t5", torch.float16, CPU))
    assert error < 0.01 and 65_504 < largest < float("inf")
    error, largest = answer(opened.load("t5", torch.float16, CPU).half())  # wo as well
    assert error > 0.1 and largest == float("inf")
