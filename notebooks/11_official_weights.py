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
# # 11. The official weights
#
# Everything so far ran on sd3-tiny. The same code runs the official files of Stability AI, which
# are behind a licence:
#
# 1. accept it on the page of
#    [stable-diffusion-3-medium](https://huggingface.co/stabilityai/stable-diffusion-3-medium);
# 2. `hf auth login`;
# 3. `hf download stabilityai/stable-diffusion-3-medium sd3_medium_incl_clips_t5xxlfp8.safetensors
#    --local-dir weights`, and for the tokenizers beside it
#    `hf download stabilityai/stable-diffusion-3-medium-diffusers --include "tokenizer*/*"
#    --local-dir weights`;
# 4. put the path of the file into `SD3MIN_WEIGHTS`.
#
# The file is 11 GB. Without it this notebook says so, and goes as far as one can.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import sd3min
from sd3min.autoencoder import Autoencoder
from sd3min.checkpoint import TITLES, Checkpoint
from sd3min.config import CLIP_G, CLIP_L, PRESETS, T5_XXL, AutoencoderConfig
from sd3min.mmdit import MMDiT
from sd3min.probes import verify
from sd3min.text_encoders import clip, t5

named = os.environ.get("SD3MIN_WEIGHTS")
weights = Path(named).resolve() if named else None
if weights and not weights.exists():
    raise FileNotFoundError(f"SD3MIN_WEIGHTS names {weights}, which is not there")
if weights is None:
    print("The official weights are not here: set SD3MIN_WEIGHTS to their file and run this again.")

# %% [markdown]
# ## What has to be in it
#
# A network's sizes follow from few numbers (Esser et al. 2024, §4: the width is 64 times the depth,
# and there are as many heads as layers). So the file can be known before it is there: here all
# parts are built without memory, on the "meta" device, and counted.


# %%
def count(module):
    """Parameters of a module, buffers left out."""
    return sum(parameter.numel() for parameter in module.parameters())


with torch.device("meta"):
    counts = {name: count(MMDiT(config)) for name, config in PRESETS.items()}
    others = {
        "autoencoder": count(Autoencoder(AutoencoderConfig())),
        "CLIP-L": count(clip(CLIP_L, "clip_l")),
        "CLIP-G": count(clip(CLIP_G, "clip_g")),
        "T5": count(t5(T5_XXL)),
    }
everything = counts | others
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
bars = axes.barh(list(everything), [number / 1e9 for number in everything.values()])
axes.bar_label(bars, [f"{number:,}" for number in everything.values()], padding=3, fontsize=8)
axes.set(xlabel="billion parameters", xlim=(0, 10.5))
axes.invert_yaxis()
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Exercise 1: the size of a file
#
# `sd3_medium.safetensors` holds the network, its positional table and the autoencoder in half
# precision. How large is it? The page on the hub says 4.34 GB.

# %% jupyter={"source_hidden": true}
# answer: two bytes for each of the parameters and of the table's 192·192 rows
table = PRESETS["SD3-medium"].grid ** 2 * PRESETS["SD3-medium"].width
size = 2 * (counts["SD3-medium"] + table + others["autoencoder"])
print(f"{size / 1e9:.2f} GB")
assert round(size / 1e9, 2) == 4.34

# %% [markdown]
# ## Exercise 2: what the modulation costs
#
# In every block a linear layer makes six vectors for each stream from the condition. Which share of
# SD3-medium's parameters is that? Count it from width and depth, and compare with the modules.

# %% jupyter={"source_hidden": true}
# answer: a third. 12·width² + 12·width in each block, but 8 of both in the last, and 2 at the end
width, depth = PRESETS["SD3-medium"].width, PRESETS["SD3-medium"].depth
parts = 12 * (depth - 1) + 8 + 2
modulation = parts * (width * width + width)
with torch.device("meta"):
    model = MMDiT(PRESETS["SD3-medium"])
named_so = {name: p for name, p in model.named_parameters() if "adaLN_modulation" in name}
print(f"{modulation / counts['SD3-medium']:.1%}")
assert modulation == sum(p.numel() for p in named_so.values())

# %% [markdown]
# ## Load
#
# Opening reads the header alone; every tensor's name and shape has to fit.

# %%
if weights:
    opened = Checkpoint.open(weights)
    print(f"{weights.name} {opened.described()}")
    for name, part in opened.parts.items():
        print(f"{TITLES[name]:12} {len(part.tensors):5} tensors {part.parameters:15,} parameters")
else:
    print("Skipped without the weights.")

# %% [markdown]
# ## Verify
#
# Every part is run beside diffusers' on these very weights, a block at a time, so that it needs
# little memory. Expect some minutes.

# %%
if weights:
    checks = list(verify(weights))
    for check in checks:
        print(f"{check.part:12} {check.what:12} {check.verdict}")
    assert all(check.passed is not False for check in checks)
else:
    print("Skipped without the weights.")

# %% [markdown]
# ## Generate
#
# With `memory="resident"` one part at a time is in memory: the text encoders, then the network,
# then the autoencoder. `pipe.plan` says how much that is. On a CPU a picture takes minutes.

# %%
if weights:
    pipe = sd3min.load(weights, memory="resident")
    prompt = "a green circle below a red heart on white"
    print(pipe.plan(prompt))
    picture = pipe(prompt, seed=2, progress=False)[0]
    plt.imshow(picture)
    plt.axis("off")
    plt.show()
else:
    print("Skipped without the weights.")

# %% [markdown]
# What a part costs in memory is known as well, and the table of parameters agrees with what was
# released:

# %%
assert counts == {
    "SD3-medium": 2_028_328_000,
    "SD3.5-medium": 2_243_171_520,
    "SD3.5-large": 8_056_627_520,
}
assert others["autoencoder"] == 83_819_683
