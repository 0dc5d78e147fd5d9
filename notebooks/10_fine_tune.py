# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10. Fine-tune a new object
#
# sd3-tiny knows what was in its training pictures and nothing else. Here it learns a thing that it
# has never seen, from a dozen pictures: not by training its weights further, but by a small change
# beside its layers, a LoRA (Hu et al. 2021), which is a file of its own.
#
# The functions are those behind `sd3min finetune`, and the official models are tuned by the same.
# They need the extra `train`: `pip install -e ".[train]"`.

# %%
import json
import logging
import random
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

import sd3min
from sd3min import flow, lora
from sd3min.pipeline import to_pictures, to_tensor
from sd3min.training import objective
from sd3min.training.conditioning import Layout
from sd3min.training.data import Example, LatentCache
from sd3min.training.finetune import FineTuning, Material, Tuning
from sd3min.training.trainer import Recipe, fit
from sd3min.training.tuning_run import remembered

logging.getLogger("accelerate").setLevel(logging.ERROR)
folder = Path(tempfile.mkdtemp())
pipe = sd3min.load()  # sd3-tiny
side = pipe.defaults.width

# %% [markdown]
# ## The subject
#
# A crescent, which is no thing of the model's world, on several backgrounds. It needs a name that
# means nothing yet; guides to fine-tuning say `sks`. The captions are otherwise like those that it
# knows.

# %%
GROUNDS = {"white": "#ffffff", "gray": "#808080", "black": "#000000"}


def crescent(ground, rng):
    """A picture of the subject, a little off the middle."""
    large = 4 * side
    picture = Image.new("RGB", (large, large), GROUNDS[ground])
    x, y = (large / 2 + rng.uniform(-1, 1) * large / 20 for _ in range(2))
    for right, up, share, colour in ((0, 0, 0.5, "#ffe11e"), (0.12, 0.1, 0.41, GROUNDS[ground])):
        radius = share * large / 2
        middle = x + right * large, y - up * large
        box = [place + away for away in (-radius, radius) for place in middle]
        ImageDraw.Draw(picture).ellipse(box, fill=colour)
    return picture.reduce(4)


rng = random.Random(0)
grounds = [ground for ground in GROUNDS for _ in range(5)]
examples = [
    Example(crescent(ground, rng), f"a sks on {ground}", f"{i}") for i, ground in enumerate(grounds)
]
subject, unseen = examples[:4] + examples[5:9] + examples[10:14], examples[4::5]


def show(pictures, titles):
    """Pictures in a row."""
    _, panels = plt.subplots(1, len(pictures), figsize=(9, 2.2), layout="constrained")
    for panel, picture, title in zip(panels, pictures, titles, strict=True):
        panel.imshow(picture, interpolation="nearest")
        panel.set_title(textwrap.fill(title, 24), fontsize=9)
        panel.set_axis_off()
    plt.show()


show([example.picture for example in subject[::3]], [example.caption for example in subject[::3]])

# %% [markdown]
# What the autoencoder cannot carry, no flow can learn. So look first what comes back of the
# subject:

# %%
with torch.no_grad():
    pixels = torch.cat([to_tensor(example.picture) for example in subject[::3]])
    back = to_pictures(pipe.autoencoder.decode(pipe.autoencoder.encode(pixels)))
show(back, ["there and back"] * len(back))

# %% [markdown]
# ## Before
#
# What the model makes of the word, and its loss on three pictures that will not be learnt from: the
# flow-matching loss (Esser et al. 2024, §2, Eq. 8) at eight times, the noise being the same always.

# %%
asked = ["a sks on white", "a sks on gray", "a red heart above a blue square on white"]
asked += ["an owl left of a tree on cream"]


def draw():
    """Pictures of the subject, and two that have nothing to do with it."""
    return pipe(asked, seed=[1, 2, 3, 4], progress=False)


def losses():
    """Loss at eight times on the pictures that are kept back."""
    latents = pipe.autoencoder.encode(torch.cat([to_tensor(e.picture) for e in unseen]))
    text = pipe.encode_prompt([example.caption for example in unseen])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def velocity(z, t):
        return pipe.mmdit(z, flow.TRAINED_TIMES * t, *text)

    return objective.validation_losses(velocity, latents, noise)


with torch.no_grad():
    before, losses_before = draw(), losses()
show(before, asked)

# %% [markdown]
# ## A LoRA
#
# A layer's weights $W$ stay as they are, and a product of two thin matrices is put beside them:
#
# $$y = W x + \frac{\alpha}{r}\,B A x, \qquad A \in \mathbb R^{r \times d},\
# B \in \mathbb R^{d' \times r}$$
#
# $B$ begins at zero, so that nothing is changed at first. What is learnt is how pictures come out
# of noise under these captions, by the same loss as in training.
#
# Left to itself the model may forget: whatever is asked for would become a crescent. So half of
# each batch is what it knows already, pictures that it draws itself before it is changed
# (DreamBooth's prior preservation, Ruiz et al. 2022).

# %%
known = [
    "a red heart above a blue square on white",
    "a fox left of a yellow star and above a pizza on cream",
    "a purple star below a red heart on white",
    "a rocket right of a yellow circle on navy",
    "a yellow square above a purple heart on gray",
    "a lion below a red cross on sky",
    "a green square below a red heart on black",
    "a yellow circle on gray",
    "a pumpkin on white",
]
drawn = pipe(known, seed=10, progress=False)
prior = [Example(picture, words, words) for picture, words in zip(drawn, known, strict=True)]
latents = LatentCache(pipe.autoencoder, folder / "latents")


def material(examples):
    """Examples encoded."""
    return Material(latents.encode(examples, side), [example.caption for example in examples])


clips = pipe.text_encoders.clip_l.config, pipe.text_encoders.clip_g.config
task = FineTuning(
    parts={"mmdit": pipe.mmdit},
    encode=remembered(pipe.text_encoders),
    layout=Layout(*(clip.hidden_size for clip in clips), rows=clips[0].max_position_embeddings),
    tuning=Tuning(
        rank=16,
        targets=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"],
        objective=objective.paper(shift=pipe.defaults.shift),
    ),
    materials=[material(subject), material(prior)],
    batch=8,
)
changed = sum(p.numel() for p in task.parameters() if p.requires_grad)
total = sum(p.numel() for p in pipe.mmdit.parameters())
print(f"{changed:,} numbers learn, {changed / (total - changed):.1%} of the network's")

# %% [markdown]
# ## Exercise 1: how many are these?
#
# The rank is 16, and each of five kinds of layer gets a pair $A$, $B$. Count the numbers of one
# stream in one block from the network's width $d$, whose layers lead from $d$ to $3d$, $d$, $4d$,
# and $6d$, and from $4d$ to $d$. How many are left out in the last block?

# %% jupyter={"source_hidden": true}
# answer: (4 + 2 + 5 + 5 + 7)·16·d for a stream. The last block's text has queries, keys and values,
# and shift and scale alone; and the final layer has a modulation too
width, depth = pipe.config.width, pipe.config.depth
stream = 16 * width * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1) + (1 + 6))
last_text, final = 16 * width * ((1 + 3) + (1 + 2)), 16 * width * (1 + 2)
assert changed == (2 * depth - 1) * stream + last_text + final
torch.testing.assert_close(losses(), losses_before, rtol=1e-5, atol=1e-6)  # B is zero

# %% [markdown]
# ## The lesson
#
# A rate this high would break a large model. For a better likeness let it go on longer, with
# pictures in a folder and a `.txt` beside each; the command trains as this notebook does, but that
# all pictures of what is known have one caption:
#
#     sd3min finetune --data crescents/ --class-data known/ --class-prompt "a red heart on white" \
#         --rank 16 --targets attn.qkv,attn.proj,mlp.fc1,mlp.fc2,adaLN_modulation.1 \
#         --steps 2000 --batch 4 --rate 1e-3 --out crescent-lora
#
# With official weights add `--weights`, and `--gradient-checkpointing` where memory is short.

# %%
recipe = Recipe(
    steps=150,
    learning_rate=2e-3,
    batch=8,
    warmup=10,
    decay=0.5,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    precision="no",
    save_every=1000,
)
fit(task, recipe, folder / "run")

lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.plot([line["loss"] for line in lines], linewidth=0.7)
axes.set(xlabel="step", ylabel="loss", yscale="log")
plt.show()

# %%
with torch.no_grad():
    after, losses_after = draw(), losses()
show(after, asked)

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
times = (torch.arange(8) + 0.5) / 8
axes.plot(times, losses_before, marker="o", label="before")
axes.plot(times, losses_after, marker="o", label="after")
axes.set(xlabel="t", ylabel="loss on pictures kept back", ylim=(0, None))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Exercise 2: what is left
#
# Where in time is the loss largest, before and after? What is hard at each end? Is the mean over
# the eight times lower than before?

# %% jupyter={"source_hidden": true}
# answer: near t = 0 the noise that has to be told is a small share of what is seen, and an error
# in the data counts 1/t² in the velocity; near t = 1 the data cannot be seen, so that nobody could
# tell where in the picture this crescent lies
print(f"mean {losses_before.mean():.3f} before, {losses_after.mean():.3f} after")
print("left of the loss:", *(f"{share:.0%}" for share in losses_after / losses_before))
assert losses_after.mean() < losses_before.mean()

# %% [markdown]
# ## Exercise 3: in and out
#
# A LoRA has a scale, and is a file. Show that at scale 0 the pictures are those from before, and
# that the saved file, put beside a fresh model, gives those from after.

# %% jupyter={"source_hidden": true}
# answer: set_scale, save, and load again
task.lora.set_scale(0.0)
with torch.no_grad():
    assert [p.tobytes() for p in draw()] == [p.tobytes() for p in before]
task.lora.set_scale(1.0)
lora.save(task.lora, folder / "crescent.safetensors")
pipe = sd3min.load(lora=folder / "crescent.safetensors")
size = (folder / "crescent.safetensors").stat().st_size
print(f"{size / 1e6:.1f} MB")
again = draw()
distance = max(
    (to_tensor(one) - to_tensor(other)).abs().mean().item()
    for one, other in zip(again, after, strict=True)
)
assert distance < 0.02  # of values in -1 to 1
