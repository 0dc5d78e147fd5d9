"""What happens to the tokens of both streams on their way through the blocks (paper §4, Fig. 2b):
how they are modulated at each time, how large they grow, and how alike they become."""

from typing import Any

import torch
from torch import Tensor

from sd3min import flow
from sd3min.config import Refusal
from sd3min.mmdit import JointBlock, MMDiT, sinusoid
from sd3min.probes.hooks import hooked
from sd3min.probes.named import Named
from sd3min.text_encoders import Conditioning

PARTS = ("shift", "scale", "gate", "MLP's shift", "MLP's scale", "MLP's gate")
STREAMS = {"context": "context_block", "image": "x_block"}


@torch.no_grad()
def modulation(mmdit: MMDiT, pooled: Tensor, times: Tensor, stream: str = "image") -> Named:
    """Root mean square of each part of the modulation, [time, layer, part], of one pooled text
    [1, p] at times in 0 to 1. The last block's text, of which nothing is read but keys and values,
    has two parts, the others being zero; SD3.5-medium's second attention is left out.
    """
    if stream not in STREAMS:
        raise Refusal(f"stream {stream} is not one of {', '.join(STREAMS)}")
    found = torch.zeros(len(times), len(mmdit.joint_blocks), len(PARTS))
    for i, t in enumerate(times):
        steps = torch.as_tensor(flow.TRAINED_TIMES * t).reshape(1).to(mmdit.pos_embed.device)
        time = mmdit.t_embedder(sinusoid(steps).to(mmdit.pos_embed.dtype))
        cond = time + mmdit.y_embedder(pooled.to(mmdit.pos_embed))
        for layer, block in enumerate(mmdit.joint_blocks):
            made = getattr(block, STREAMS[stream]).adaLN_modulation(cond)[0].float()
            parts = made.view(-1, mmdit.config.width)[: len(PARTS)]
            found[i, layer, : len(parts)] = parts.square().mean(dim=1).sqrt().cpu()
    return Named(found, ("time", "layer", "part"))


@torch.no_grad()
def tokens(mmdit: MMDiT, latents: Tensor, t: float, conditioning: Conditioning) -> dict[str, Named]:
    """Both streams after every block of one pass, [layer, picture, token, channel]: "context" and
    "image". Their order is that of the context's rows, and of the patches row by row.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in STREAMS}

    def hook(block: JointBlock, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        for name, tokens in zip(STREAMS, output, strict=True):
            kept[name].append(tokens.float().cpu())

    times = torch.full((len(latents),), flow.TRAINED_TIMES * t, device=latents.device)
    with hooked(mmdit.joint_blocks, hook):
        mmdit(latents, times.to(latents.dtype), *conditioning)
    axes = ("layer", "picture", "token", "channel")
    return {name: Named(torch.stack(layers), axes) for name, layers in kept.items()}


def norms(tokens: Named) -> Named:
    """Root mean square of every token, [layer, picture, token]."""
    return Named(tokens.values.square().mean(dim=-1).sqrt(), tokens.axes[:-1])


def similarity(tokens: Named) -> Named:
    """Cosine of the angle between any two tokens, [layer, picture, token, other]."""
    unit = torch.nn.functional.normalize(tokens.values, dim=-1)
    return Named(unit @ unit.mT, (*tokens.axes[:-1], "other"))
