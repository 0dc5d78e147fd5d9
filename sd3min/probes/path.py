"""The way from noise to a picture: what is pointed at after every step, how long the way is, and
how straight (paper §2; Tab. 6)."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd3min import flow
from sd3min.pipeline import Pipeline, to_pictures
from sd3min.probes.named import Named


@dataclass(frozen=True)
class Path:
    """A run's steps, for one picture or several."""

    picture: Image.Image
    times: Tensor  # [step + 1], from 1 down to 0
    latents: Named  # [step + 1, picture, channel, row, column], noise first
    velocities: Named  # [step, picture, channel, row, column]
    denoised: Named  # [step, picture, channel, row, column]: the data pointed at

    def pictures(self, pipe: Pipeline) -> list[Image.Image]:
        """What was pointed at in every step, decoded."""
        data = self.denoised.values[:, 0].to(pipe.device, pipe.dtype)
        with torch.no_grad():
            return to_pictures(torch.cat([pipe.autoencoder.decode(z[None]) for z in data]))

    @property
    def speeds(self) -> Named:
        """Root mean square of the velocity at each step."""
        return Named(
            self.velocities.values.square().mean(dim=(2, 3, 4)).sqrt(), ("step", "picture")
        )

    @property
    def length(self) -> Named:
        """Length of the way, Σ |z' − z|, for each picture (Tab. 6)."""
        strides = self.latents.values.diff(dim=0).flatten(2).norm(dim=2)
        return Named(strides.sum(dim=0), ("picture",))

    @property
    def straightness(self) -> Named:
        """Distance of the ends over the length of the way: 1 for a straight line."""
        ends = self.latents.values[-1] - self.latents.values[0]
        return Named(ends.flatten(1).norm(dim=1) / self.length.values, ("picture",))

    @property
    def turns(self) -> Named:
        """Cosine of the angle between the velocities of one step and of the next."""
        flat = self.velocities.values.flatten(2)
        cosines = torch.cosine_similarity(flat[1:], flat[:-1], dim=2)
        return Named(cosines, ("step", "picture"))


def path(pipe: Pipeline, prompt: str, seed: int = 0, **settings: Any) -> Path:
    """Draw a picture and keep every step of the way; settings are those of a call."""
    steps: list[flow.Step] = []
    picture, *_ = pipe(prompt, seed=seed, progress=False, on_step=steps.append, **settings)
    axes = ("step", "picture", "channel", "row", "column")

    def stacked(tensors: list[Tensor]) -> Named:
        return Named(torch.stack([t.float().cpu() for t in tensors]), axes)

    ends = [steps[0].latents, *(step.next_latents for step in steps)]
    times = torch.tensor([float(step.t) for step in steps] + [0.0])
    velocities = stacked([step.velocity for step in steps])
    return Path(picture, times, stacked(ends), velocities, stacked([s.denoised for s in steps]))
