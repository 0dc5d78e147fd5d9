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
# # 8. Which word drew which pixel?
#
# In every joint block the picture's patches read the prompt's words (Esser et al. 2024, Fig. 2b).
# This notebook watches them, finds out how much of the attention is spent on words at all, and then
# doubts that looking is the same as using.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import sd3min
from sd3min.probes import ablate, attention, plots, word_rows

pipe = sd3min.load()  # sd3-tiny
prompt = "a green circle above a red heart on white"
words = ["green", "circle", "above", "red", "heart", "white"]
picture, seen = attention(pipe, prompt, words, seed=4)
print(seen.heat("heart"))
plt.figure(figsize=(2, 2))
plt.imshow(picture)
plt.axis("off")
plt.show()

# %% [markdown]
# `attention` draws the picture and computes every block's attention a second time beside it,
#
# $$A = \mathrm{softmax}\!\left(\frac{q\,k^\top}{\sqrt{64}}\right),$$
#
# a few rows at a time. The picture is what it is without being watched, and no matrix of all tokens
# is kept. A word's **heat** is the share of a patch's attention that goes to the word's rows,
# CLIP's and T5's together.

# %%
plots.heat(picture, seen)

# %% [markdown]
# That was the mean over all steps, layers and heads, and such means blur. Layer by layer there is
# more to be seen:

# %%
layers = pipe.config.depth
figure, panels = plt.subplots(2, layers, figsize=(9, 4.8), layout="constrained")
for row, word in zip(panels, ("circle", "heart"), strict=True):
    found = seen.heat(word).mean("step", "picture", "head").values
    for layer, panel in enumerate(row):
        panel.imshow(found[layer], cmap="inferno", interpolation="nearest")
        panel.set_title(f"{word}, layer {layer}: {found[layer].mean():.1%}", fontsize=9)
        panel.set_axis_off()
plt.show()

# %% [markdown]
# ## How much goes to words
#
# All of a token's attention adds up to 1. Cut by who asks and who answers, it has four shares.

# %%
plots.quadrants(seen)

# %% [markdown]
# ## Exercise 1: where is the rest?
#
# The six words' heat is less than the share of attention that the image spends on text. What else
# is there to be read? Watch that, and find what is left for the rest.

# %% jupyter={"source_hidden": true}
# answer: articles, "on", the marks of start and end, and padding, which nobody is told to leave out
rows = sorted({row for word in words for row in word_rows(pipe, prompt, word)})
texts = pipe.text_encoders.clip_l.config.max_position_embeddings + pipe.defaults.t5_length
share = seen.quadrants.mean("step", "layer", "picture", "head").values[2].item()
named = sum(seen.heat(word).values.mean().item() for word in words)
print(f"image to text {share:.1%}; to the six words {named:.1%}, {len(rows)} of {texts} rows")
print(f"to each row on average {share / texts:.2%}, to each of theirs {named / len(rows):.2%}")
_, others = attention(pipe, prompt, ["a", "on"], seed=4)
rest = sum(others.heat(word).values.mean().item() for word in ("a", "on"))
print(f"to 'a' and 'on' {rest:.1%}; to marks and padding {share - named - rest:.1%}")
assert 0 < named + rest < share

# %% [markdown]
# ## How sharp it is
#
# The entropy of a row of $A$ is $-\sum_j A_{ij} \ln A_{ij}$: 0 where one token gets everything, and
# $\ln n$ where all of $n$ tokens get the same. If no logit $q \cdot k / \sqrt{64}$ is larger than
# $L$ in size, it is at least $\ln n - 2L$: only large logits let attention narrow. In training at
# high resolution in half precision these logits grew until the attention was all on one token and
# training broke; normalising $q$ and $k$ holds them (§5.3.2, Fig. 5). The official SD3.5 models do
# so, SD3-medium and sd3-tiny do not.

# %%
plots.entropy(seen)

# %% [markdown]
# ## Exercise 2: the bound
#
# With $q$ and $k$ normalised to a root mean square of 1 in 64 channels (and no weights after that),
# how large can a logit be? Find it by hand, and check with random vectors.

# %% jupyter={"source_hidden": true}
# answer: |q| = |k| = 8, so q·k ≤ 64, and the logit at most 8, where q = k
generator = torch.Generator().manual_seed(0)
q, k = 100 * torch.randn(2, 1000, 64, generator=generator)
q, k = (x / x.square().mean(dim=-1, keepdim=True).sqrt() for x in (q, k))
logits = q @ k.T / 8
assert logits.abs().max() <= 8
torch.testing.assert_close((q * q).sum(-1) / 8, torch.full((1000,), 8.0))
print(f"bound 8; here, without normalisation, {seen.largest_logit.values.max():.1f}")

# %% [markdown]
# ## Looking is not using
#
# Heat says where a word is read. Whether it matters there, only an experiment tells: leave the word
# out, draw again from the same noise, and see which pixels change.

# %%
tried = ("green", "red", "heart", "above")
left_out = {word: ablate(pipe, prompt, seed=4, word=word) for word in tried}


def changed(found):
    """How much each pixel changes, of 255 levels."""
    whole, without = (np.asarray(p, dtype=float) for p in (found.whole, found.without))
    return np.abs(whole - without).mean(axis=-1)


figure, panels = plt.subplots(3, len(tried), figsize=(8, 6.4), layout="constrained")
for column, (word, found) in zip(panels.T, left_out.items(), strict=True):
    heat = seen.heat(word).mean("step", "layer", "picture", "head").values
    column[0].imshow(heat, cmap="inferno", interpolation="nearest")
    column[0].set_title(f"heat of {word!r}")
    column[1].imshow(found.without, interpolation="nearest")
    column[1].set_title("without it")
    column[2].imshow(changed(found), cmap="magma", vmin=0, vmax=255, interpolation="nearest")
    column[2].set_title("what changed")
for panel in panels.flat:
    panel.set_axis_off()
plt.show()

# %% [markdown]
# ## Exercise 3: do they agree?
#
# For each of these words, correlate its heat with the change over the patches. Then take the same
# heat in each layer alone. Does one layer tell better than the mean of all?


# %% jupyter={"source_hidden": true}
# answer: it depends on word and layer, which is the point: attention alone proves nothing
def by_patch(values):
    """Means over the pixels of each patch."""
    h, w = seen.size
    return values.reshape(h, 16, w, 16).mean(axis=(1, 3)).ravel()


table = {}
for word, found in left_out.items():
    heat = seen.heat(word).mean("step", "picture", "head").values.flatten(1).numpy()
    change = by_patch(changed(found))
    table[word] = [np.corrcoef(map_, change)[0, 1] for map_ in (heat.mean(axis=0), *heat)]
    told = " ".join(f"{value:5.2f}" for value in table[word])
    print(f"{word:7} mean of all and each layer: {told}")
better = [word for word, (mean, *layers_) in table.items() if max(layers_) > mean]
print(f"one layer tells better than the mean of all for {', '.join(better)}")
assert better and all(found.change > 0 for found in left_out.values())
