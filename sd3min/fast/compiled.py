"""The plain networks through torch.compile: each is one graph without a break, for all sizes."""

from collections.abc import Callable
from typing import Any

import torch

from sd3min.config import Refusal
from sd3min.pipeline import Pipeline

GUIDE = {  # what diffusers' guide to Stable Diffusion 3 sets beside max-autotune
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
}
GUIDED = "max-autotune"


def compile_(
    pipe: Pipeline, mode: str | None = None, backend: str | Callable[..., Any] = "inductor"
) -> Pipeline:
    """Compile the MMDiT and the decoder in place, when each is first called; returns the pipeline.

    The first size is compiled for itself. When its height, its width, the rows of text or the batch
    first differs, all that differ are compiled for every later value; a batch of one is always
    compiled apart. The decoder's weights are laid out with their channels
    last, as convolutions want them. `mode` is torch.compile's, and "max-autotune" stands for all
    that diffusers' guide to Stable Diffusion 3 sets: it searches for the quickest kernels, which
    takes minutes, and on a GPU it multiplies float32 as TF32, whose fractions have 10 binary digits
    and not 23, from then on in the whole process. Raises Refusal where the mode is unknown.

    It does not add to the other tricks of this folder, whose loops are no graph.
    """
    options = mode_options(mode)
    layout: dict[str, Any] = {"memory_format": torch.channels_last}
    pipe.autoencoder.decoder.to(**layout)
    if mode == GUIDED and pipe.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    for network in (pipe.mmdit, pipe.autoencoder.decoder):
        network.compile(fullgraph=True, backend=backend, options=options)
    return pipe


def mode_options(mode: str | None) -> dict[str, Any] | None:
    """What a mode of torch.compile sets, with the guide's own settings; refused if unknown."""
    if mode is None:
        return None
    from torch._inductor import list_mode_options  # slow to import

    if mode not in list_mode_options():
        raise Refusal(f"mode {mode} is not one of {', '.join(list_mode_options())}")
    return list_mode_options(mode) | (GUIDE if mode == GUIDED else {})
