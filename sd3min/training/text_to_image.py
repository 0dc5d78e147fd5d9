"""The training of an MMDiT and both CLIPs on drawn scenes, together, through the flow loss alone.

Differs from the paper: both CLIPs learn too, where all three encoders stay as they were (App. B.2).
T5 has had its lesson (`reading`) and does so here as well.
"""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd3min import flow
from sd3min.autoencoder import SCALE, SHIFT, Autoencoder
from sd3min.mmdit import MMDiT, position_table
from sd3min.text_encoders import Conditioning, TextEncoders
from sd3min.training import captions, scenes
from sd3min.training.conditioning import Layout, leave_out
from sd3min.training.data import encoder_digest
from sd3min.training.images import drawn
from sd3min.training.objective import (
    paper,
    validation_figures,
    validation_losses,
    velocity_errors,
)
from sd3min.training.records import load, save
from sd3min.training.trainer import Losses, Task

NO_CAPTION = 0.1  # of the captions are left empty, for guidance
LEFT_OUT = 0.15  # how often each encoder is left out, each by itself
DRAWS = 2  # times and noises for each picture and caption of a batch
VALIDATED = 64  # pictures


def initialise(mmdit: MMDiT, encoders: TextEncoders, resolution: int) -> None:
    """Starting values: every block is the identity, and positions weigh as much as words."""
    table = position_table(mmdit.config.width, mmdit.config.grid, resolution, resolution)
    mmdit.pos_embed.copy_(table)
    for module in mmdit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in mmdit.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)
    for clip in (encoders.clip_l, encoders.clip_g):
        nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(clip.text_model.embeddings.position_embedding.weight, std=0.5)
    for name, parameter in encoders.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter)  # logits of attention: T5's only sense of order
    nn.init.eye_(encoders.clip_l.text_projection.weight)
    encoders.clip_l.text_projection.requires_grad_(False)


class Latents:
    """Latents of many drawn scenes, encoded once and kept in a file with the scenes (App. E.1),
    whose name tells the encoder.

    They are the posteriors' modes: a sample's noise would only slow the learning.
    """

    def __init__(self, autoencoder: Autoencoder, count: int, folder: Path, chunk: int = 64):
        """Read them from `folder`, or draw and encode `count` scenes and write them there."""
        path = folder / f"latents-{encoder_digest(autoencoder)[:16]}.pt"
        if not path.exists():
            save(self.encode(autoencoder, count, chunk), path)
        state = load(path)
        self.means = state["mean"]
        self.scenes = [captions.parse(caption) for caption in state["captions"]]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Latents of some scenes, scaled and shifted, in float32."""
        return (self.means[indices].float() - SHIFT) * SCALE

    @staticmethod
    @torch.no_grad()
    def encode(autoencoder: Autoencoder, count: int, chunk: int) -> dict[str, object]:
        """Mean of every picture's posterior in bfloat16, and its caption; chunk by chunk."""
        means, words = [], []
        for first in tqdm(range(0, count, chunk), desc="latents"):
            rng = random.Random(f"latents {first}")
            wanted = [scenes.random_scene(rng) for _ in range(min(chunk, count - first))]
            with torch.autocast("cpu", torch.bfloat16):
                mean, _ = autoencoder.moments(drawn(wanted, rng))
            means.append(mean.bfloat16())
            words += [captions.caption(scene) for scene in wanted]
        return {"mean": torch.cat(means), "captions": words}


def rearranged(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """The scene with its relations by chance, though never a held-out one."""
    while True:
        sides = rng.sample([rng.choice(axis) for axis in scenes.AXES], len(scene.others))
        others = [(side, thing) for side, (_, thing) in zip(sides, scene.others, strict=True)]
        heard = dataclasses.replace(scene, others=tuple(others))
        if scenes.count_held_out_triples(heard) == 0:
            return heard


def recoloured(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """The scene with its shapes' colours by chance, though never a held-out pair.

    Two of a kind are told apart by their colours alone, and such a scene stays as it is.
    """
    nouns = [thing.noun for thing in scene.things]
    if len(set(nouns)) < len(nouns):
        return scene
    while True:
        colours = rng.sample(list(scenes.COLOURS), len(scene.things))
        heard = scene.with_things(
            scenes.Thing(thing.noun, colour) if thing.colour else thing
            for thing, colour in zip(scene.things, colours, strict=True)
        )
        if scenes.count_held_out_pairs(heard) == 0:
            return heard


def encode(
    encoders: TextEncoders, wanted: Sequence[scenes.Scene], rng: random.Random
) -> Conditioning:
    """What the encoders say of the scenes; each is left out of some of them, as zeros.

    Each has something to say that the others may have wrong, and so the network learns to ask
    each. Where T5 is heard, both CLIPs read the caption with its relations by chance; where CLIP-L
    is heard, CLIP-G and T5 read it with its colours by chance. Differs from the paper, where all
    three read the same (App. B.3): a caption this short is read by any one encoder, and the network
    would do without the others. Differs from the paper, where each is left out of 46.4 %
    (App. B.3): here of `LEFT_OUT`, and `NO_CAPTION` are empty.
    """
    kept = torch.tensor([[float(rng.random() >= LEFT_OUT) for _ in range(3)] for _ in wanted])
    read: list[list[str]] = [[], [], []]
    for scene, (has_clip_l, _, has_t5) in zip(wanted, kept.tolist(), strict=True):
        other = recoloured(scene, rng) if has_clip_l else scene
        clip_l, clip_g = (rearranged(s, rng) if has_t5 else s for s in (scene, other))
        told, seed = rng.random() >= NO_CAPTION, rng.random()
        for texts, heard in zip(read, (clip_l, clip_g, other), strict=True):
            texts.append(captions.worded(heard, random.Random(seed)) if told else "")
    to_clip_l, to_clip_g, to_t5 = read
    clip, pooled = encoders.both_clips(to_clip_l, to_clip_g=to_clip_g)
    with torch.no_grad():
        t5 = encoders.t5_rows(to_t5, encoders.t5_length)
    said = Conditioning(torch.cat([clip, t5.to(clip)], dim=1), pooled)
    return leave_out(Layout.heard(encoders), said, kept)


class TextToImage(Task):
    """Velocities of drawn scenes from noise and words (§2, Eq. 8), at shifted times."""

    def __init__(
        self,
        mmdit: MMDiT,
        encoders: TextEncoders,
        latents: Latents,
        batch: int,
        shift: float,
        seed: int = 0,
    ):
        """Two runs of the same seed draw the same."""
        super().__init__()
        self.seed = seed
        self.mmdit, self.encoders = mmdit, encoders
        self.latents, self.batch, self.objective = latents, batch, paper(shift=shift)
        self.compiled = torch.compile(mmdit.forward)

    def forward(self, step: int, part: slice) -> Losses:
        """Losses of a part of a step's batch; seed and step decide every draw."""
        seed = self.seed + step
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        indices = torch.randint(
            len(self.latents.scenes), (self.batch // DRAWS,), generator=generator
        )
        wanted = [self.latents.scenes[i] for i in indices.tolist()]
        data = self.latents[indices].repeat_interleave(DRAWS, dim=0)
        noise = torch.randn(data.shape, generator=generator)
        t = self.objective.times.sample(len(data), generator)[part]
        context, pooled = (
            whole.repeat_interleave(DRAWS, dim=0)[part]
            for whole in encode(self.encoders, wanted, rng)
        )
        velocity = self.velocity(Conditioning(context, pooled))
        return Losses(velocity_errors(velocity, data[part], noise[part], t), t)

    def velocity(self, told: Conditioning) -> flow.Velocity:
        """The network's answer to what the encoders say."""

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return self.compiled(z, flow.TRAINED_TIMES * t, *told)

        return velocity


class Validation:
    """The paper's validation loss of pictures that are not learnt from (§5.3.3), under plain
    captions that every encoder reads; the same noise at each time and call.
    """

    def __init__(self, autoencoder: Autoencoder, count: int = VALIDATED):
        """Draw and encode `count` scenes."""
        rng = random.Random("validation")
        wanted = [scenes.random_scene(rng) for _ in range(count)]
        with torch.no_grad():
            self.data = autoencoder.encode(drawn(wanted, rng))
        self.noise = torch.randn(self.data.shape, generator=torch.Generator().manual_seed(0))
        self.captions = [captions.caption(scene) for scene in wanted]

    @torch.no_grad()
    def __call__(self, task: TextToImage) -> dict[str, float]:
        """The loss now, and its part at each time."""
        velocity = task.velocity(task.encoders.encode(self.captions))
        return validation_figures(validation_losses(velocity, self.data, self.noise))
