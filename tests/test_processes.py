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
from safetensors.torch import load_file

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
    "full": (["--full", "--train-clips"], ["--batch", "4"], ["--batch", "2"]),
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
    given = ["--weights", "model/model.safetensors", "--data", "subject", "--out", out]
    given += ["--prompt", "a red circle", "--resolution", "32"]
    made = "weights" if "--full" in options else "lora"
    printed = launched(place, launcher, "finetune", *FIXED, *options, *given)
    assert printed == [f"{out}/{made}.safetensors"]
    return told(place / out)


def launched(place, launcher, *arguments):
    """The lines that a command prints, as a launcher starts it."""
    done = subprocess.run(
        [*map(str, (*LAUNCHERS[launcher], "-m", "sd3min.training", *arguments))],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def told(folder):
    """The losses of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("course", COURSES)
def test_two_processes_follow_the_losses_of_one(course, launcher, place):
    shared, alone, together = COURSES[course]
    expected = losses(place, "one", f"one {course} {launcher}", *shared, *alone)
    found = losses(place, launcher, f"two {course} {launcher}", *shared, *together)
    assert found == pytest.approx(expected, **SAME)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-3)  # they are learning


@pytest.mark.slow
def test_two_processes_train_a_whole_model_as_one_does(place):
    """Every stage, the flow from equal weights: it learns from latents in bfloat16, in which a last
    digit of the autoencoder is a jump.
    """
    course = 'learning_rate = 1e-4\nprecision = "no"'  # bfloat16 differs by how a batch is cut
    (place / "plan.toml").write_text(small.PLAN.replace("learning_rate = 1e-3", course))
    start = "one/made/made.safetensors"
    for launcher in ("one", "torchrun"):
        given = ["plan.toml", "--work", f"work-{launcher}", "--out", f"{launcher}/made"]
        assert launched(place, launcher, "train", *given) == [f"{launcher}/made/made.safetensors"]
        given = ["plan.toml", "--work", f"more-{launcher}", "--out", f"{launcher}/more"]
        launched(place, launcher, "train", *given, "--from", start)
    for stage in ("reconstruction", "decoder", "reading", "flow"):
        work = "more" if stage == "flow" else "work"
        one, two = (told(place / f"{work}-{launcher}" / stage) for launcher in ("one", "torchrun"))
        assert one == pytest.approx(two, rel=1e-4), stage
    made = [place / launcher / "more" / "more.safetensors" for launcher in ("one", "torchrun")]
    one, two = map(load_file, made)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor.float(), two[name].float(), rtol=2e-3, atol=1e-3)


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
