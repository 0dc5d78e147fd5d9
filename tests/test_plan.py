"""The plan of memory: what it says before anything is loaded is what is measured afterwards."""

import math
import pickle
import re
from pathlib import Path

import files
import pytest
import torch

import sd3min
from sd3min import cli
from sd3min.checkpoint import Checkpoint
from sd3min.convert import convert
from sd3min.fast import plan as plans
from sd3min.fast.t5 import LINEAR
from sd3min.settings import check_call

CPU = torch.device("cpu")
SD3, T5 = "sd3_medium_incl_clips.safetensors", "text_encoders/t5xxl_fp16.safetensors"

official = pytest.mark.skipif(not files.manifests(), reason="the official lists are not here")


def made(path, dtype=torch.bfloat16, device=CPU, t5=True, memory="resident", pictures=1, **given):
    opened = Checkpoint.open(path)
    *_, settings = check_call(opened.parts["mmdit"].config, opened.defaults, "", **given)
    return plans.plan(opened, settings, dtype, device, t5, memory, pictures)


def held(modules, path):
    """Bytes of the tensors of modules: of the process's own, and in the pages of a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [line[0].split("-") for line in lines if line[-1] == str(path)]
    pages = [range(int(start, 16), int(end, 16)) for start, end in ends]
    own, mapped = 0, 0
    for tensor in (t for m in modules for t in [*m.parameters(), *m.buffers()]):
        size = tensor.numel() * tensor.element_size() * tensor.is_floating_point()
        there = not tensor.is_mkldnn and any(tensor.data_ptr() in page for page in pages)
        own, mapped = own + size * (not there), mapped + size * there
    return own, mapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_counted_to_the_byte(dtype, whole):
    found = {stage.title: stage for stage in made(whole, dtype).stages}
    opened = Checkpoint.open(whole)
    pipe = sd3min.load(whole, dtype=dtype, memory="resident")
    for name, title in plans.TITLES.items():
        stage = found[title]
        kept = {"mmdit": "network", "autoencoder": "autoencoder"}
        part = pipe.stages(kept[name]) if name in kept else opened.load(name, dtype, CPU)
        modules = [part.outer, *part.blocks] if name == "mmdit" else [part]
        assert (stage.weights, stage.mapped) == held(modules, whole)
        if dtype == torch.float32:  # as the file has it
            assert stage.mapped > 0
            assert name in kept or stage.weights == (64 * 64 * 4 if name == "clip_l" else 0)
        else:  # but for what stays in float32
            wo = 2 * 320 * 128 * 4 if name == "t5" and dtype == torch.float16 else 0
            assert stage.mapped == wo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_parts_have_a_plan_to_the_byte_too(dtype, whole):
    pipe = sd3min.load(whole, dtype=dtype)
    found = {stage.title: stage for stage in pipe.plan().stages}
    parts = {**pipe.text_encoders._modules, "mmdit": pipe.mmdit, "autoencoder": pipe.autoencoder}
    assert set(parts) == set(plans.TITLES)
    for name, part in parts.items():
        stage = found[plans.TITLES[name]]
        assert (stage.weights, stage.mapped) == held([part], whole)
    assert pipe.plan() == made(whole, dtype, memory=None)
    assert pipe.plan("a", width=128, height=96) != pipe.plan()


@pytest.mark.parametrize("diffusers", [False, True])
def test_a_plan_holds_no_files_open(diffusers, whole, tmp_path):
    source = whole
    if diffusers:
        source = tmp_path / "folder"
        convert(whole, source, progress=False)
    pipe = sd3min.load(source)
    assert pickle.loads(pickle.dumps(pipe.planned)).args
    assert pipe.plan() == made(source, torch.float32, memory=None)
    outlined = pipe.planned.args[0].parts["mmdit"].tensors
    with pytest.raises(RuntimeError, match="an outline has no values"):
        next(iter(outlined.values())).read()


def test_a_pipeline_made_by_hand_has_no_plan(whole):
    pipe = sd3min.load(whole)
    by_hand = sd3min.Pipeline(pipe.mmdit, pipe.autoencoder, pipe.text_encoders)
    with pytest.raises(sd3min.Refusal, match="make the pipeline by"):
        by_hand.plan()


def test_eight_bits_take_a_byte_a_value(whole):
    long, short = (made(whole, t5=kind).stages[2] for kind in (True, "int8"))
    tensors = Checkpoint.open(whole).parts["t5"].tensors
    linear = sum(math.prod(t.shape) for name, t in tensors.items() if LINEAR.search(name))
    assert long.weights - short.weights == linear


def test_stages_are_the_parts_that_are_loaded_in_that_order(whole):
    assert [stage.title for stage in made(whole).stages] == [
        "CLIP-L",
        "CLIP-G",
        "T5",
        "MMDiT",
        "autoencoder",
    ]
    assert "T5" not in str(made(whole, t5=False))


def test_what_is_computed_grows_with_the_pictures(whole):
    one, two, large = (
        [stage.working for stage in made(whole, **given).stages]
        for given in ({}, {"pictures": 2}, {"width": 128, "height": 96})
    )
    width = Checkpoint.open(whole).parts["mmdit"].config.width
    fixed = 2 * 6 * width**2 * torch.bfloat16.itemsize  # a stream's modulation, read and converted
    assert two[:3] == [2 * working for working in one[:3]]
    assert two[3] - fixed == 2 * (one[3] - fixed)
    assert two[4] == one[4]  # one picture is decoded after the other
    assert large[:3] == one[:3] and large[3] > one[3] and large[4] == 4 * one[4]
    unguided = [stage.working for stage in made(whole, guidance_scale=1.0).stages]
    assert unguided[:3] == [working // 2 for working in one[:3]]
    assert unguided[3] - fixed == (one[3] - fixed) // 2 and unguided[4] == one[4]


def test_a_streamed_network_has_a_block_mapped_and_the_rest_of_its_own(whole):
    stage = made(whole, memory="stream").stages[3]
    tensors = Checkpoint.open(whole).parts["mmdit"].tensors
    block = [
        math.prod(t.shape)
        for name, t in tensors.items()
        if name.startswith("joint_blocks.0.") and len(t.shape) == 2 and "adaLN" not in name
    ]
    assert stage.mapped == 4 * sum(block)  # the file is in float32
    own = [t for t in tensors if "adaLN" not in t or not t.startswith("joint_blocks")]
    rest = [t for t in own if not (t.startswith("joint_blocks") and len(tensors[t].shape) == 2)]
    assert stage.weights == 2 * sum(math.prod(tensors[name].shape) for name in rest)


def test_a_plan_that_keeps_all_adds_up(whole):
    kept, apart = made(whole, memory="fast"), made(whole)
    assert kept.peak > apart.peak
    total = sum(stage.weights for stage in kept.stages)
    assert kept.peak == kept.program + total + max(stage.working for stage in kept.stages)


def test_on_a_gpu_nothing_is_mapped_and_the_program_is_elsewhere(whole):
    on_gpu = made(whole, torch.float32, torch.device("cuda"))
    assert on_gpu.program == 0 and not any(stage.mapped for stage in on_gpu.stages)
    assert on_gpu.stages[0].weights > 0


def test_a_pipeline_tells_its_plan_and_loads_nothing(whole):
    pipe = sd3min.load(whole, memory="stream", dtype="bfloat16")
    assert pipe.plan().peak == made(whole, memory="stream").peak
    many = pipe.plan(["a", "b"], num_images=2, width=128, height=96)
    assert many == made(whole, memory="stream", pictures=4, width=128, height=96)
    assert pipe.stages.held == {}


def test_the_command_prints_every_plan_or_one(whole, capsys):
    assert cli.main(["plan", str(whole), "--size", "128x96"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if " " not in line and line] == [
        "fast",
        "resident",
        "stream",
    ]
    assert cli.main(["plan", str(whole), "--memory", "resident", "--t5", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "T5" in printed and "int8, of F32" in printed and "stream" not in printed
    assert cli.main(["plan", str(whole), "--no-t5", "--t5", "int8"]) == 2
    assert cli.main(["plan", str(whole), "--memory", "small"]) == 2
    assert "memory small is not one of fast, resident, stream" in capsys.readouterr().err


@official
def test_sd3_medium_fits_where_it_is_said_to(tmp_path):
    clips = files.sparse(tmp_path / "clips", files.manifests()[SD3])
    files.sparse(tmp_path / "t5", files.manifests()[T5])
    size = {"width": 512, "height": 512}
    peaks = {
        memory: made(clips, t5=False, memory=memory, **size).peak
        for memory in ("resident", "stream")
    }
    assert 3.0e9 < peaks["resident"] < 3.6e9
    assert 0.7e9 < peaks["stream"] < 1.5e9
    # and the network is 1.4 billion values without modulation, at two bytes
    network = made(clips, t5=False, **size).stages[2]
    assert network.weights == pytest.approx(2.83e9, rel=0.01)


@official
def test_the_guide_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parents[1] / "docs/pages/guides/memory.md").read_text()
    shown = re.findall(r"```text\n\$ sd3min (.*)\n([^`]*)```", guide)
    assert len(shown) == 2
    monkeypatch.chdir(tmp_path)
    for path, name in ((SD3, SD3), (Path(T5).name, T5)):
        files.sparse(tmp_path / path, files.manifests()[name])
    for command, printed in shown:
        assert cli.main(command.split()) == 0
        assert capsys.readouterr().out == printed
