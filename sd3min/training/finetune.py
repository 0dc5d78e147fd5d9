"""Fine-tuning of a model on pictures with captions: a LoRA, or the whole network.

With pictures of a class beside those of one subject (DreamBooth's prior preservation, Ruiz et al.
2022, Eq. 2), half of every batch is of the class.
"""

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd3min import flow, lora
from sd3min.autoencoder import SCALE, SHIFT
from sd3min.config import Refusal
from sd3min.mmdit import MMDiT
from sd3min.text_encoders import Conditioning
from sd3min.training.conditioning import Layout, leave_out
from sd3min.training.data import Encoded, batches
from sd3min.training.objective import (
    Objective,
    paper,
    validation_figures,
    validation_losses,
    velocity_errors,
)
from sd3min.training.trainer import Losses, Task

FEW = 128  # rows of attention: a small picture's and its caption's


class Material(NamedTuple):
    """Examples, encoded: posteriors by bucket, all captions, how much an example counts, what the
    examples are called, and whether the network is held to what it said of them before it learnt,
    and not to themselves. Lines of a caption are wordings of it.
    """

    encoded: list[Encoded]
    captions: list[str]
    weight: float = 1.0
    names: Sequence[str] = ()
    by_network: bool = False


class Drawn(NamedTuple):
    """A step's batch of a material: examples' places in a bucket, their captions and names."""

    material: Material
    bucket: Encoded
    places: list[int]
    captions: list[str]
    names: list[str]


def wordings(caption: str) -> list[str]:
    """The lines of a caption in which something is; "" where there is none."""
    return [line for line in caption.split("\n") if line.strip()] or [""]


def draw(material: Material, step: int, size: int, seed: int) -> Drawn:
    """A step's batch, each caption in one of its wordings; the seed and the step decide it."""
    rng = random.Random(f"wordings {seed} {step}")
    which, places = batches([len(e.indices) for e in material.encoded], size, seed, step)
    bucket = material.encoded[which]
    indices = [bucket.indices[place] for place in places]
    captions = [rng.choice(wordings(material.captions[index])) for index in indices]
    names = [material.names[index] for index in indices] if material.names else captions
    return Drawn(material, bucket, places, captions, names)


@dataclass(frozen=True)
class Tuning:
    """What is changed, and how it is taught."""

    rank: int | None = 4  # of the LoRA; None changes the whole network
    alpha: float | None = None  # by default the rank
    targets: Sequence[str] | None = None  # ends of layers' names; by default diffusers'
    clips: bool = True  # whether a LoRA is beside those that are given, too
    words: Mapping[str, Sequence[lora.Word]] = field(default_factory=dict)  # learnt, by part
    faster: float = 1.0  # than the LoRA they learn
    objective: Objective = field(default_factory=paper)
    dropout: float = 0.0  # how often each encoder is left out, each by itself
    gradient_checkpointing: bool = False  # less memory, for a third more time
    seed: int = 0

    def adapt(self, parts: dict[str, nn.Module]) -> lora.LoRA | None:
        """Make parts ready to be changed: by a LoRA beside their layers, or as they are."""
        for module in parts.values():
            module.eval().requires_grad_(self.rank is None)
        if self.rank is None:
            if "clip_l" in parts:  # whose projection is the identity, and in no official file
                parts["clip_l"].get_submodule("text_projection").requires_grad_(False)
            return None
        generator = torch.Generator().manual_seed(self.seed)
        beside = parts if self.clips else {"mmdit": parts["mmdit"]}
        made = lora.add(beside, self.rank, self.alpha, self.targets, generator)
        return lora.LoRA([*made, *lora.add_words(parts, self.words, self.faster)])


def quickened(mmdit: MMDiT) -> None:
    """Let attention among few rows be computed plainly, on a CPU quicker than fused."""

    def forward(of: Callable[..., Any], context: Tensor, image: Tensor, cond: Tensor) -> Any:
        few = image.device.type == "cpu" and context.shape[1] + image.shape[1] <= FEW
        with sdpa_kernel(SDPBackend.MATH) if few else contextlib.nullcontext():
            return of(context, image, cond)

    for block in mmdit.joint_blocks:
        block.forward = partial(forward, block.forward)


def checkpointed(mmdit: MMDiT) -> None:
    """Keep no activations inside of blocks: they are computed again for the gradient."""
    from torch.utils.checkpoint import checkpoint

    for block in mmdit.joint_blocks:
        block.forward = lambda *tensors, of=block.forward: checkpoint(
            of, *tensors, use_reentrant=False
        )


class FineTuning(Task):
    """Velocities of encoded pictures from noise and captions (§2, Eq. 8)."""

    def __init__(
        self,
        parts: dict[str, nn.Module],
        encode: Callable[[list[str]], Conditioning],
        layout: Layout,
        tuning: Tuning,
        materials: Sequence[Material],
        batch: int,
    ):
        """`parts`: what is changed, "mmdit" and maybe "clip_l" and "clip_g"; `encode`: with those,
        or with what was kept of others; `batch`: pictures of all materials, the same of each.
        """
        super().__init__()
        if batch % len(materials):
            raise Refusal(f"a batch of {batch} does not divide among {len(materials)} materials")
        self.lora = tuning.adapt(parts)
        self.parts_ = nn.ModuleDict(parts)
        self.encode, self.layout = encode, layout
        self.tuning, self.materials, self.batch = tuning, materials, batch
        quickened(self.mmdit)
        if tuning.gradient_checkpointing:
            checkpointed(self.mmdit)

    @property
    def mmdit(self) -> MMDiT:
        """The network that learns."""
        mmdit = self.parts_["mmdit"]
        assert isinstance(mmdit, MMDiT)
        return mmdit

    def drawn(self, step: int) -> list[Drawn]:
        """A step's batch of each material."""
        size = self.batch // len(self.materials)
        return [draw(material, step, size, self.tuning.seed) for material in self.materials]

    def describe(self, step: int) -> str:
        """Name the pictures of a step."""
        names = [name for drawn in self.drawn(step) for name in drawn.names]
        return f"the pictures {', '.join(map(repr, dict.fromkeys(names)))}"

    def forward(self, step: int, part: slice) -> Losses:
        """Losses of a part of a step's batch, as much of each material; the step decides draws.

        Their mean is the sum of every material's mean loss, times its weight.
        """
        drawn = self.drawn(step)
        if part.start % len(drawn) or part.stop % len(drawn):
            raise Refusal(f"a batch of {self.batch} gives each process an uneven share")
        share = slice(part.start // len(drawn), part.stop // len(drawn))
        found = [self.losses(each, f"{step} {i}", share) for i, each in enumerate(drawn)]
        values = torch.cat(
            [len(drawn) * each.material.weight * f[0] for each, f in zip(drawn, found, strict=True)]
        )
        return Losses(values, torch.cat([times for _, times in found]))

    def losses(self, drawn: Drawn, seed: str, share: slice) -> tuple[Tensor, Tensor]:
        """Losses of a process's share of a material's batch, and their times."""
        bucket, count = drawn.bucket, len(drawn.places)
        rng = random.Random(f"{self.tuning.seed} {seed}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        sampling, noise = torch.randn((2, count, *bucket.mean.shape[1:]), generator=generator)
        t = self.tuning.objective.times.sample(count, generator)[share]
        kept = torch.tensor(
            [[float(rng.random() >= self.tuning.dropout) for _ in range(3)] for _ in range(count)]
        )
        sample = bucket.mean[drawn.places] + torch.exp(0.5 * bucket.logvar[drawn.places]) * sampling
        data = ((sample - SHIFT) * SCALE)[share].to(self.mmdit.pos_embed.device)
        velocity, before = self.velocities(drawn.captions[share], kept[share])
        teacher = before if drawn.material.by_network else None
        t = t.to(data)
        errors = velocity_errors(velocity, data, noise[share].to(data), t, teacher)
        return self.tuning.objective.weighted(errors, t), t

    def velocities(self, captions: list[str], kept: Tensor) -> tuple[flow.Velocity, flow.Velocity]:
        """The network's answer to captions, and what it was before anything was learnt."""

        def asked() -> flow.Velocity:
            return self.velocity(leave_out(self.layout, self.encode(captions), kept))

        @torch.no_grad()
        def before(z: Tensor, t: Tensor) -> Tensor:
            assert self.lora is not None
            with self.lora.left_out():
                return asked()(z, t)

        return asked(), before

    def velocity(self, told: Conditioning) -> flow.Velocity:
        """The network's answer to what the encoders say."""
        context, pooled = (part.to(self.mmdit.pos_embed) for part in told)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return self.mmdit(z.to(context), flow.TRAINED_TIMES * t, context, pooled)

        return velocity


@torch.no_grad()
def validate(task: FineTuning, material: Material, batch: int) -> dict[str, float]:
    """The paper's validation loss of pictures, and its part at each time (§5.3.3).

    It is of the posteriors' modes under captions' first wordings, each picture with its own noise,
    the same at each time and call.
    """
    device, losses = task.mmdit.pos_embed.device, []
    for bucket in material.encoded:
        for first in range(0, len(bucket.indices), batch):
            indices = bucket.indices[first : first + batch]
            data = ((bucket.mean[first : first + batch] - SHIFT) * SCALE).to(device)
            generators = [torch.Generator().manual_seed(index) for index in indices]
            noise = [torch.randn(data.shape[1:], generator=g) for g in generators]
            told = task.encode([wordings(material.captions[index])[0] for index in indices])
            found = validation_losses(task.velocity(told), data, torch.stack(noise).to(data))
            losses += [found] * len(indices)
    return validation_figures(torch.stack(losses).double().mean(dim=0))
