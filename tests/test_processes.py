"""Several processes are the same script as one, and follow its losses."""

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import small
import torch
from PIL import Image

SAME = {"rel": 1e-5}  # float32 sums in another order, over four steps
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "one": [sys.executable],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
}
COURSES = {  # options of one process, and of two at the same batch
    "plain": ([], ["--batch", "4"], ["--batch", "2"]),
    "accumulated, with a class": (
        ["--class-data", "class", "--class-prompt", "a circle"],
        ["--batch", "4"],
        ["--batch", "1", "--accumulation", "2"],
    ),
}
FIXED = ["--steps", "4", "--rate", "0.01", "--precision", "no", "--dropout", "0.3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model, pictures and those of a class."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model").mkdir()
    small.save_official(small.pipeline(folder / "model"), folder / "model" / "model.safetensors")
    for name, count in (("subject", 5), ("class", 100)):
        (folder / name).mkdir()
        for i in range(count):
            colour = tuple(torch.randint(256, (3,), generator=torch.Generator().manual_seed(i)))
            picture = Image.new("RGB", (48, 32), tuple(int(value) for value in colour))
            picture.save(folder / name / f"{i}.png")
    return folder


def losses(place, launcher, out, *options):
    """The losses of a fine-tuning that a launcher started."""
    command = [*LAUNCHERS[launcher], "-m", "sd3min.training", "finetune", *FIXED, *options]
    command += ["--weights", "model/model.safetensors", "--data", "subject", "--out", out]
    done = subprocess.run(
        [*map(str, command), "--prompt", "a red circle", "--resolution", "32"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{out}/lora.safetensors"]
    text = (place / out / "metrics.jsonl").read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("course", COURSES)
def test_two_processes_follow_the_losses_of_one(course, launcher, place):
    shared, alone, together = COURSES[course]
    expected = losses(place, "one", f"one {course} {launcher}", *shared, *alone)
    found = losses(place, launcher, f"two {course} {launcher}", *shared, *together)
    assert found == pytest.approx(expected, **SAME)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-3)  # they are learning


def test_accelerate_reads_the_configuration_of_fsdp():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    path = resources.files("sd3min.training") / "fsdp.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType.FSDP
    assert config.fsdp_config["fsdp_version"] == 2
    from sd3min import mmdit

    for name in config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","):
        assert issubclass(getattr(mmdit, name), torch.nn.Module)
