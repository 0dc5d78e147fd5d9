"""The training of an MMDiT and both CLIPs, together, through the flow loss alone.

T5 has had its lesson (`reading`) and stays as it is, as all three encoders did in the paper.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd3min import flow
from sd3min.autoencoder import SCALE, SHIFT, Autoencoder
from sd3min.mmdit import MMDiT, position_table
from sd3min.text_encoders import Conditioning, TextEncoders
from sd3min.training import scenes
from sd3min.training.images import drawn
from sd3min.training.loop import save
from sd3min.training.objective import flow_matching_loss, logit_normal_times

NO_CAPTION = 0.1  # of the captions are left empty, for guidance
NO_T5 = 0.2  # of the pictures see zeros in place of T5's rows
DRAWS = 2  # times and noises for each picture and caption of a batch


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
    """Latents of many drawn scenes, encoded once and kept in a file, with the scenes.

    They are the posteriors' modes: this autoencoder's posteriors are wide, and a sample's noise
    would only slow the learning.
    """

    def __init__(self, autoencoder: Autoencoder, count: int, path: Path, chunk: int = 64):
        """Read them from `path`, or draw and encode `count` scenes and write them there."""
        if not path.exists():
            save(self.encode(autoencoder, count, chunk), path)
        state = torch.load(path)
        self.data = (state["mean"].float() - SHIFT) * SCALE
        self.scenes = [scenes.parse(caption) for caption in state["captions"]]

    @staticmethod
    @torch.no_grad()
    def encode(autoencoder: Autoencoder, count: int, chunk: int) -> dict[str, object]:
        """Mean of every picture's posterior in bfloat16, and its caption; chunk by chunk."""
        means, captions = [], []
        for first in tqdm(range(0, count, chunk), desc="latents"):
            rng = random.Random(f"latents {first}")
            wanted = [scenes.random_scene(rng) for _ in range(chunk)]
            with torch.autocast("cpu", torch.bfloat16):
                mean, _ = autoencoder.moments(drawn(wanted, rng))
            means.append(mean.bfloat16())
            captions += [scene.caption for scene in wanted]
        return {"mean": torch.cat(means), "captions": captions}


def caption(scene: scenes.Scene, rng: random.Random) -> str:
    """A caption to train on: sometimes shortened, sometimes with a capital, sometimes none."""
    if rng.random() < NO_CAPTION:
        return ""
    words = scenes.training_caption(scene, rng)
    return words[0].upper() + words[1:] if rng.random() < 0.15 else words


def misread(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """The scene with a relation by chance, though never a held-out one."""
    if scene.relation is None:
        return scene
    others = [dataclasses.replace(scene, relation=relation) for relation in scenes.RELATIONS]
    return rng.choice([other for other in others if not scenes.has_held_out_triple(other)])


def encode(
    encoders: TextEncoders, wanted: Sequence[scenes.Scene], rng: random.Random
) -> Conditioning:
    """What the encoders say of the scenes; T5 is left out of some of them.

    Where T5 reads the caption, both CLIPs read it with a relation by chance: CLIP is told what
    there is and T5 how it stands, and the network learns to ask each for its own. Where T5 is left
    out, the CLIPs read the whole. Differs from the paper, which drops each of the three alone (App.
    B.3): a caption this short is read by any one encoder, and the network would do without T5.
    """
    with_t5 = [rng.random() >= NO_T5 for _ in wanted]
    wordings = [rng.random() for _ in wanted]
    told = [caption(s, random.Random(w)) for s, w in zip(wanted, wordings, strict=True)]
    heard = [misread(s, rng) if has else s for s, has in zip(wanted, with_t5, strict=True)]
    misheard = [caption(s, random.Random(w)) for s, w in zip(heard, wordings, strict=True)]

    clip, pooled = encoders.both_clips(misheard)
    with torch.no_grad():
        t5 = encoders.t5_rows(told, encoders.t5_length) * torch.tensor(with_t5)[:, None, None]
    return Conditioning(torch.cat([clip, t5], dim=1), pooled)


def batch_loss(
    mmdit: Callable[..., Tensor],
    encoders: TextEncoders,
    latents: Latents,
    step: int,
    batch: int,
    shift: float,
) -> Tensor:
    """The flow loss of one batch of scenes; `step` decides every draw."""
    rng, generator = random.Random(step), torch.Generator().manual_seed(step)
    indices = torch.randint(len(latents.scenes), (batch // DRAWS,), generator=generator)
    conditioning = encode(encoders, [latents.scenes[i] for i in indices.tolist()], rng)
    context, pooled = (part.repeat_interleave(DRAWS, dim=0) for part in conditioning)

    data = latents.data[indices].repeat_interleave(DRAWS, dim=0)
    noise = torch.randn(data.shape, generator=generator)
    t = logit_normal_times(len(data), shift, generator)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return mmdit(z, flow.TRAINED_TIMES * t, context, pooled)

    return flow_matching_loss(velocity, data, noise, t)
