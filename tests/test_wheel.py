"""The README's snippets, run from the wheel that would be installed, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BASH, PYTHON = (
    re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("bash", "python")
)
QUICK = re.compile(r"(sd3min (?:generate|inspect|verify|plan)\b.*)")
OTHERS = re.compile(r"--(weights|lora|prompts|device)\b|\.safetensors|sd3min plan")  # not at hand
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment in which `sd3min` is the wheel's, and an empty folder."""
    place, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("empty")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", place, ROOT], check=True)
    (wheel,) = place.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", wheel], check=True)
    return os.environ | {"PYTHONPATH": str(place / "site")}, folder


def run(installed, *command):
    environment, folder = installed
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True
    )


def test_the_wheel_brings_its_weights(installed):
    done = run(installed, "-c", "import sd3min; print(sd3min.__file__, sd3min.checkpoint.tiny())")
    package, weights = map(Path, done.stdout.split())
    assert package.parts[-3:-1] == ("site", "sd3min") and weights.is_relative_to(package.parent)


def test_python_snippets_run_in_their_order(installed):
    folder = installed[1]
    done = run(installed, "-c", "".join(PYTHON))
    assert done.returncode == 0, done.stderr
    assert {"star.png", "where.png"} <= {path.name for path in folder.iterdir()}


def test_commands_run_in_their_order(installed):
    lines = [line.split("  #")[0].strip() for block in BASH for line in block.splitlines()]
    commands = [QUICK.fullmatch(line)[1] for line in lines if QUICK.fullmatch(line)]
    commands = [command for command in commands if not OTHERS.search(command)]
    (again,) = (place for place, command in enumerate(commands) if "--like" in command)
    commands[again] += " --out again.png"
    assert len(commands) >= 4
    for command in commands:
        done = run(installed, "-m", *shlex.split(command))
        assert done.returncode == 0, f"{command}: {done.stderr}"
    first, again = (Image.open(installed[1] / name) for name in ("heart.png", "again.png"))
    assert first.tobytes() == again.tobytes()
