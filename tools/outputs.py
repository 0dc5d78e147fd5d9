"""Write down what the package computes, to be compared: python tools/outputs.py FILE.npz.

Small random networks of every layout, in float64, and two pictures by sd3-tiny: the demo's, and one
that starts from it. `tools/mutations.py` runs this beside a broken copy of the package.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

import oracle  # noqa: E402
import small  # noqa: E402

import sd3min  # noqa: E402
from sd3min import flow  # noqa: E402

PROMPTS = ["a red circle above a blue square!", "", "a pink star on white " * 9]


def of_networks(folder: Path) -> dict[str, torch.Tensor]:
    """Each part's output on the same random inputs."""
    found = {"schedule": flow.sigmas(28, 3.0)}
    for variant, config in small.VARIANTS.items():
        mmdit = small.mmdit(config).double()
        found[f"velocity, {variant} layout"] = mmdit(*oracle.inputs(mmdit))
    pipe = small.pipeline(folder)
    found["context"], found["pooled"] = pipe.encode_prompt(PROMPTS, 24)
    without = small.encoders(small.tokenizers(folder))
    without.t5 = None
    found["context without T5"] = without.encode(PROMPTS[:1]).context
    autoencoder = small.autoencoder().double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 48, 80, generator=generator).double()
    found["latents"] = autoencoder.encode(images)
    found["sampled latents"] = autoencoder.encode(images, generator)
    found["decoded"] = autoencoder.decode(found["latents"])
    return found


def of_pictures() -> dict[str, np.ndarray]:
    """The demo's picture, and one that starts from the right one."""
    pipe = sd3min.load()
    command = re.search(r'generate "(.+)" --seed (\d+)', (ROOT / "Makefile").read_text())
    if command is None:
        raise ValueError("the Makefile has no demo with a prompt and a seed")
    (picture,) = pipe(command[1], seed=int(command[2]), progress=False)
    with Image.open(ROOT / "weights" / "figures" / "demo.png") as start:
        (changed,) = pipe(
            "a blue heart right of a yellow square on white",
            seed=1,
            init_image=start,
            strength=0.8,
            progress=False,
        )
    return {"picture": np.asarray(picture), "from a picture": np.asarray(changed)}


def main(path: str) -> None:
    """Compute and write."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = {name: value.double().numpy() for name, value in of_networks(Path(folder)).items()}
    named: dict[str, Any] = found | of_pictures()
    np.savez(path, **named)


if __name__ == "__main__":
    main(sys.argv[1])
