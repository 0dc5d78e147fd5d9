"""The paper's objective: flow matching at times from a shifted logit-normal density."""

import torch
from jaxtyping import Float
from torch import Tensor

from sd3min import flow


def logit_normal_times(
    count: int, shift: float, generator: torch.Generator
) -> Float[Tensor, " count"]:
    """t = sigmoid(u), u ~ N(0, 1), then shifted: rf/lognorm(0, 1) (§3.1, Eq. 19; Eq. 23)."""
    return flow.shift_times(torch.randn(count, generator=generator).sigmoid(), shift)


def velocity_errors(
    velocity: flow.Velocity, data: Tensor, noise: Tensor, t: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Mean over channels and places of |v(z_t, t) − (ε − x0)|², for each picture (§2, Eq. 8)."""
    latents = flow.interpolate(data, noise, t[:, None, None, None])
    error = velocity(latents, t).float() - flow.velocity_target(data, noise)
    return error.square().mean(dim=(1, 2, 3))
