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
# # 4. Patches and positions
#
# A transformer takes rows of tokens. Latents become tokens by cutting them into patches of 2 x 2,
# and since attention knows no order, each token is told where it stands (Esser et al. 2024, §4 and
# §5.3.2, "Positional Encodings for Varying Aspect Ratios").

# %%
import matplotlib.pyplot as plt
import torch
from einops import rearrange

import sd3min
from sd3min.mmdit import position_table

pipe = sd3min.load()  # sd3-tiny
model = pipe.mmdit.requires_grad_(False)
defaults, grid, width = pipe.defaults, model.config.grid, model.config.width
rows, columns = defaults.height // 16, defaults.width // 16
prompt = "a blue triangle left of a yellow square on white"
picture = pipe(prompt, seed=1, progress=False)[0]
latents = pipe.autoencoder.encode(sd3min.pipeline.to_tensor(picture))

# %% [markdown]
# ## A patch is a token
#
# A patch has 2 x 2 places of 16 channels, 64 numbers, and one linear layer makes a token of them.
# It is written as a convolution with a stride of 2, which is the same.

# %%
patches = rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
weight, bias = model.x_embedder.proj.weight.flatten(1), model.x_embedder.proj.bias
tokens = patches @ weight.T + bias
torch.testing.assert_close(tokens, model.x_embedder(latents))
print(f"picture {picture.size}, latents {list(latents.shape)}, tokens {list(tokens.shape)}")

# %% [markdown]
# ## The table
#
# A patch in row $i$ of $N$ stands at $p_i$. Sines and cosines of $d/4$ frequencies say where that
# is, and fill half of the channels; its column fills the other half:
#
# $$p_i = \left(i - \frac{N - s}{2}\right)\frac{S_0}{S}, \qquad
# \big(\sin(p_i\,\omega_j),\ \cos(p_i\,\omega_j)\big), \qquad \omega_j = 10000^{-4j/d}$$
#
# Here $S$ is the resolution in pixels, $s$ the number of patches along it, and $S_0$ the resolution
# of pretraining: 256 for the official models, whose finer patches at 1024 pixels are put between
# the coarse ones of 256. sd3-tiny has known one resolution, $S_0 = S$.
#
# What does a table of sines say? Near places have like rows: below is the cosine between one
# patch's row and all others.

# %%
size = max(defaults.width, defaults.height)
table = position_table(width, grid, resolution=size, pretrained=size)
torch.testing.assert_close(table, model.pos_embed, rtol=0, atol=1e-3)  # stored in half precision

maps = rearrange(table, "1 (h w) d -> h w d", h=grid)
unit = torch.nn.functional.normalize(maps, dim=-1)
figure, panels = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
channels = (2, width // 2 + 2)
for panel, channel, name in zip(panels, channels, ("column", "row"), strict=False):
    panel.imshow(maps[..., channel], cmap="RdBu", vmin=-1, vmax=1)
    panel.set_title(f"channel {channel}: a sine of the {name}", fontsize=9)
for panel, place in zip(panels[2:], ((grid // 2, grid // 2), (grid // 4, grid - 3)), strict=True):
    panel.imshow(unit @ unit[place], cmap="viridis", vmin=0, vmax=1)
    panel.scatter(*place[::-1], color="white", s=8)
    panel.set_title("likeness to the dot's row", fontsize=9)
plt.show()

# %% [markdown]
# ## The crop
#
# The table is larger than any picture. A picture of $h \times w$ patches gets its **centre**, so
# that the middle of a picture is always in the same place, and a wider picture's extra columns lie
# outside of the narrower one's.

# %%
wide = min(16 * (columns * 3 // 2), 16 * grid)
shapes = {"default": (defaults.width, defaults.height), "wide": (wide, defaults.height)}
shapes["tall"] = (defaults.width, min(16 * (rows * 3 // 2), 16 * grid))

figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.imshow(unit @ unit[grid // 2, grid // 2], cmap="Greys", vmin=0, vmax=2)
styles = (("C0", "--"), ("C1", "-"), ("C2", "-"))
for (name, (across, down)), (colour, line) in zip(shapes.items(), styles, strict=True):
    w, h = across // 16, down // 16
    corner = (grid - w) // 2 - 0.5, (grid - h) // 2 - 0.5
    look = {"edgecolor": colour, "linestyle": line, "linewidth": 2, "zorder": 3 - (line == "-")}
    axes.add_patch(plt.Rectangle(corner, w, h, fill=False, label=name, **look))
axes.legend(loc="upper right")
axes.set_title(f"the table's {grid} x {grid} places, and three pictures'")
plt.show()

# %% [markdown]
# ## Exercise 1: cut it out yourself
#
# Write the crop for a picture of 3 x 5 patches, row by row, and compare it with
# `model.positions(3, 5)`. Which row of the table has the picture's first patch?

# %% jupyter={"source_hidden": true}
# answer: the row of place (top, left), with the same margin on both sides, the odd one at the end
h, w = 3, 5
top, left = (grid - h) // 2, (grid - w) // 2
cut = rearrange(model.pos_embed, "1 (h w) d -> h w d", h=grid)[top : top + h, left : left + w]
assert torch.equal(cut.flatten(0, 1)[None], model.positions(h, w))
assert torch.equal(model.positions(h, w)[0, 0], model.pos_embed[0, top * grid + left])

# %% [markdown]
# ## Exercise 2: the official table
#
# Stable Diffusion 3 has a grid of 192, $S$ = 1024 and $S_0$ = 256. At which places $p$ do the first
# and the last patch of a row stand in a picture of 1024 pixels? Check with `position_table`, whose
# first channel is $\sin p$ of the column (a small width does).

# %% jupyter={"source_hidden": true}
# answer: 64 patches from 0 to 15.75 in steps of a quarter: where pretraining had 16, from 0 to 15
official = rearrange(position_table(16, 192), "1 (h w) d -> h w d", h=192)
first = (192 - 64) // 2
places = torch.arange(64) / 4
torch.testing.assert_close(official[0, first : first + 64, 0], places.sin())
print(f"from {places[0]} to {places[-1]}")

# %% [markdown]
# ## Without positions, nobody knows where
#
# Everything else in the network treats the tokens alike, whatever their order. Take the table away,
# shuffle the patches, and the answer is shuffled just so.

# %% [markdown]
# ## Exercise 3: prove it
#
# Set the table to zero, move the latents' patches into another order, and compare the velocities.
# Then do the same with the table in place.


# %% jupyter={"source_hidden": true}
# answer: the same but for the order without a table, and another answer with it
def shuffled(latents, order):
    """Latents with their patches in another order."""
    cut = rearrange(latents, "b c (h p) (w q) -> b (h w) c p q", p=2, q=2)[:, order]
    return rearrange(cut, "b (h w) c p q -> b c (h p) (w q)", h=latents.shape[2] // 2)


with torch.no_grad():
    text = pipe.encode_prompt([prompt])
order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
t = torch.tensor([500.0])
table, differences = model.pos_embed.clone(), {}
for name, values in (("with the table", table), ("without", torch.zeros_like(table))):
    model.pos_embed.copy_(values)
    one = shuffled(model(latents, t, *text), order)
    other = model(shuffled(latents, order), t, *text)
    differences[name] = ((one - other).norm() / one.norm()).item()
    print(f"{name}: {differences[name]:.1e} apart")
model.pos_embed.copy_(table)
assert differences["without"] < 1e-4 < 1e-2 < differences["with the table"]

# %% [markdown]
# ## Other sizes
#
# Nothing forbids another size, as the table goes on. The official models have been trained on many
# shapes of picture; sd3-tiny has seen its own alone and has to guess what lies beyond.

# %%
with torch.no_grad():
    drawn = {
        name: pipe(prompt, seed=1, width=across, height=down, progress=False)[0]
        for name, (across, down) in shapes.items()
    }
figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for panel, (name, image) in zip(panels, drawn.items(), strict=True):
    panel.imshow(image, interpolation="nearest")
    panel.set_title(f"{name}, {image.width} x {image.height}")
    panel.set(xticks=[], yticks=[])
plt.show()
assert drawn["wide"].size == (wide, defaults.height)
assert drawn["default"].tobytes() == picture.tobytes()
