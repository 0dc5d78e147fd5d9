"""torch.compile takes each network whole, once for all sizes, and changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

import sd3min
from sd3min import cli
from sd3min.config import Refusal
from sd3min.fast import compiled

EXACT, SINGLE = 1e-10, 1e-5  # relative, in float64 and in float32: rungs 1 and 2
SCRIPT = Path(__file__).with_name("compiling.py")
AOT = [
    pytest.param("SD3.5-medium", "aot_eager", "float64", 3, EXACT),
    pytest.param("SD3-medium", "aot_eager", "float64", 4, EXACT, marks=pytest.mark.slow),
    pytest.param("SD3.5-large", "aot_eager", "float64", 4, EXACT, marks=pytest.mark.slow),
    pytest.param("SD3.5-medium", "inductor", "float32", 4, SINGLE, marks=pytest.mark.slow),
]


@pytest.fixture
def pipe(tmp_path):
    return small.pipeline(tmp_path)


@pytest.mark.parametrize(("variant", "backend", "dtype", "count", "tolerance"), AOT)
def test_two_graphs_without_a_break_serve_all_sizes(variant, backend, dtype, count, tolerance):
    path = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    done = subprocess.run(
        [sys.executable, SCRIPT, variant, backend, dtype, str(count)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rows in json.loads(done.stdout).values():
        graphs, apart = zip(*rows, strict=True)
        assert (
            graphs == (1, 1, 0, 1)[:count]
        )  # the second is for all sizes, the last for all batches
        assert max(apart) <= tolerance


def test_compilation_is_in_place_and_keeps_the_weights(pipe):
    networks = pipe.mmdit, pipe.autoencoder.decoder
    before = [{n: t.clone() for n, t in net.state_dict().items()} for net in networks]
    assert compiled.compile_(pipe, backend="eager") is pipe
    for network, tensors in zip(networks, before, strict=True):
        assert network._compiled_call_impl is not None
        torch.testing.assert_close(dict(network.state_dict()), tensors, rtol=0, atol=0)
    weight = pipe.autoencoder.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_guide_sets_what_it_says():
    options = compiled.mode_options("max-autotune")
    assert options["max_autotune"]
    assert compiled.GUIDE.items() <= options.items()
    assert "epilogue_fusion" not in compiled.mode_options("reduce-overhead")
    assert compiled.mode_options(None) is None


@pytest.mark.parametrize(("device", "expected"), [("cpu", "highest"), ("cuda", "high")])
def test_short_products_are_for_gpus_alone(device, expected, pipe):
    assert torch.get_float32_matmul_precision() == "highest"
    pipe.device = torch.device(device)
    try:
        compiled.compile_(pipe, "max-autotune")  # compiles at the first call, which is not made
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_it_is_asked_for_by_name(mode, whole, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **given: asked.append((net, given)))
    pipe = sd3min.load(whole, compile=mode)
    assert [net for net, _ in asked] == [pipe.mmdit, pipe.autoencoder.decoder]
    assert all(given["options"] == compiled.mode_options(mode) for _, given in asked)
    asked.clear()
    sd3min.load(whole)
    assert not asked


def test_the_command_compiles(whole, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **given: asked.append(net))
    out = tmp_path / "one.png"
    call = ["generate", "a cat", "--weights", str(whole), "--steps", "1", "--size", "32x32"]
    assert cli.main([*call, "--compile", "default", "--out", str(out)]) == 0
    assert out.exists() and len(asked) == 2


def test_an_unknown_mode_is_refused(pipe):
    with pytest.raises(Refusal, match=r"mode fastest is not one of .*max-autotune"):
        compiled.compile_(pipe, "fastest")
    assert pipe.mmdit._compiled_call_impl is None
