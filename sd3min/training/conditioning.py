"""Leaving encoders out while a network learns, so that it can do without them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float

from sd3min.config import CLIPConfig
from sd3min.text_encoders import Conditioning, TextEncoders


class Layout(NamedTuple):
    """Where each encoder speaks: widths of the CLIPs' columns, and the rows that they share."""

    clip_l: int
    clip_g: int
    rows: int

    @classmethod
    def of(cls, clip_l: CLIPConfig, clip_g: CLIPConfig) -> "Layout":
        """The layout of encoders of these sizes."""
        return cls(clip_l.width, clip_g.width, clip_l.length)

    @classmethod
    def heard(cls, encoders: TextEncoders) -> "Layout":
        """The layout of what encoders say."""
        clip_l, clip_g = encoders.clip_l.config, encoders.clip_g.config
        return cls(clip_l.hidden_size, clip_g.hidden_size, clip_l.max_position_embeddings)


def leave_out(
    layout: Layout, conditioning: Conditioning, kept: Float[torch.Tensor, "b 3"]
) -> Conditioning:
    """Zeros in the place of what CLIP-L, CLIP-G or T5 says, where `kept` is 0 (App. B.3)."""
    context, pooled = conditioning
    kept = kept.to(context)
    clips = kept[:, :2].repeat_interleave(torch.tensor(layout[:2], device=kept.device), dim=1)
    columns = F.pad(clips, (0, context.shape[-1] - clips.shape[-1]))[:, None]
    clip_rows, t5_rows = context[:, : layout.rows], context[:, layout.rows :]
    masked = torch.cat([clip_rows * columns, t5_rows * kept[:, 2, None, None]], dim=1)
    return Conditioning(masked, pooled * clips.to(pooled))
