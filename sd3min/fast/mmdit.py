"""The MMDiT for one run: whatever the steps share is done once, before the first.

- The modulation of every block at every step follows from the times and the pooled text alone. It
  is made block by block before the run, and its weights, a third of the network, are not kept.
- The context enters the network embedded once.
- Rows of zeros, which stand for a T5 that was left out, are equal tokens in a stream without
  positions, and stay equal in every block. One row that counts as often in the softmax does.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.config import MMDiTConfig
from sd3min.fast.blocks import MODULATION, FastBlock, build, without_modulation
from sd3min.fast.linear import packed
from sd3min.fast.native import trim
from sd3min.mmdit import PATCH, MMDiT, joint_block, sinusoid, unpatchify
from sd3min.parts import fill
from sd3min.text_encoders import Conditioning

Read = Callable[[str], Tensor]  # of an official name, in the type and on the device to work with
STEPS_AHEAD = 64  # for which the modulation is kept: 2 MB each for a guided picture at depth 24


def equal_rows(context: Float[Tensor, "b l i"]) -> int:
    """How many of the last rows are zeros in all of the batch; at least 1."""
    filled = context.ne(0).any(-1).any(0).nonzero()
    last = int(filled[-1]) if len(filled) else -1
    return max(context.shape[1] - last - 1, 1)


class FastMMDiT(nn.Module):
    """The network, whose weights `read` gives by their official names.

    It is called through `prepare`. `make` makes its linear layers; `sequence` makes, of a function
    from index to block, what gives the blocks one after the other at every step.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        read: Read,
        make: Callable[[nn.Linear], nn.Module] = packed,
        sequence: Callable[[Callable[[int], FastBlock], int], Iterable[nn.Module]] | None = None,
    ):
        super().__init__()
        self.config, self.read, self.make = config, read, make
        with torch.device("meta"):
            outer = MMDiT(config)
        outer.joint_blocks = nn.ModuleList()
        self.outer = fill(outer, {name: read(name) for name in outer.state_dict()})
        self.blocks = (sequence or kept)(self.block, config.depth)

    @classmethod
    def of(cls, mmdit: MMDiT, make: Callable[[nn.Linear], nn.Module] = packed) -> "FastMMDiT":
        """The fast form of a plain network, whose weights it shares as far as it can."""
        return cls(mmdit.config, mmdit.state_dict().__getitem__, make)

    def block(self, index: int) -> FastBlock:
        """Read a block."""
        with torch.device("meta"):
            block = without_modulation(joint_block(self.config, index))
        names = block.state_dict().keys()
        tensors = {name: self.read(f"joint_blocks.{index}.{name}") for name in names}
        return build(block, tensors, self.make)

    def prepare(self, text: Conditioning, timesteps: Float[Tensor, " steps"]) -> "Run":
        """Everything that depends on the text and on the timesteps (0 to 1000) alone."""
        outer, repeats = self.outer, equal_rows(text.context)
        rows = text.context[:, : text.context.shape[1] - repeats + 1]
        time = outer.t_embedder(sinusoid(timesteps).to(rows.dtype))
        cond = rearrange(time, "s d -> s 1 d") + outer.y_embedder(text.pooled)
        return Run(lambda: self, outer.context_embedder(rows), repeats, cond)

    def modulation(self, cond: Float[Tensor, "s b d"]) -> list[tuple[Tensor, Tensor]]:
        """Shifts, scales and gates of every block, of the context and of the image [s b parts d].

        Their weights are read block by block, and not kept.
        """
        active, width = F.silu(cond), self.config.width

        def parts(index: int, stream: str) -> Tensor:
            name = f"joint_blocks.{index}.{stream}.{MODULATION}.1"
            made = F.linear(active, self.read(f"{name}.weight"), self.read(f"{name}.bias"))
            return rearrange(made, "s b (parts d) -> s b parts d", d=width)

        made = []
        for index in range(self.config.depth):
            made.append((parts(index, "context_block"), parts(index, "x_block")))
            trim()  # or the weights of all blocks are kept as room for others
        return made


def kept(block: Callable[[int], FastBlock], depth: int) -> nn.ModuleList:
    """All blocks, read once; what a block was made of is gone before the next one is read."""
    blocks = nn.ModuleList()
    for index in range(depth):
        blocks.append(block(index))
        trim()
    return blocks


class Run:
    """The network under one text, at steps that are known."""

    def __init__(
        self,
        network: Callable[[], FastMMDiT],
        context: Float[Tensor, "b l d"],
        repeats: int,
        cond: Float[Tensor, "s b d"],
    ):
        """`network`: where it is, or what loads it again; `repeats`: how many equal rows the last
        one of the context stands for.
        """
        self.network, self.context, self.repeats, self.cond = network, context, repeats, cond
        self.first, self.tables = 0, network().modulation(cond[:STEPS_AHEAD])

    def __call__(self, latents: Float[Tensor, "b c h w"], i: int) -> Float[Tensor, "b c h w"]:
        """The velocity at step i."""
        network = self.network()
        if not self.first <= i < self.first + STEPS_AHEAD:
            self.first, self.tables = i, network.modulation(self.cond[i : i + STEPS_AHEAD])
        outer, h, w = network.outer, latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        image = outer.x_embedder(latents) + outer.positions(h, w)
        context = self.context.clone()
        for block, tables in zip(network.blocks, self.tables, strict=True):
            parts = (table[i - self.first] for table in tables)
            context, image = block(context, image, *parts, self.repeats)
        return unpatchify(outer.final_layer(image, self.cond[i]), h)
