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
# # 3. Sixteen channels
#
# The flow does not run on pixels. An autoencoder turns a picture into **latents**, eight times
# smaller on each side, and back. Its channels decide what can come back at all: earlier models had
# 4, Stable Diffusion 3 has 16, since the quality of its reconstructions bounds that of any picture
# that is generated with it (Esser et al. 2024, §5.2.1, Tab. 3).

# %%
import random

import matplotlib.pyplot as plt
import torch

import sd3min
from sd3min.autoencoder import SCALE, SHIFT
from sd3min.pipeline import to_pictures, to_tensor
from sd3min.training import captions, scenes

pipe = sd3min.load()  # sd3-tiny, whose autoencoder was trained on drawn scenes
autoencoder = pipe.autoencoder.requires_grad_(False)
side = pipe.defaults.width


def draw(words, seed=0):
    """A scene as a tensor in -1 to 1."""
    return to_tensor(scenes.draw(captions.parse(words), random.Random(seed), side))


picture = draw("a red heart above an owl on gray")

# %% [markdown]
# ## There and back
#
# The encoder gives a mean and a variance for every latent; the mean alone is the best guess. A
# scale and a shift make the latents about as large as the noise that they will be mixed with:
#
# $$z = (\mu(x) - 0.0609) \cdot 1.5305, \qquad \hat x = D\!\left(\frac{z}{1.5305} + 0.0609\right)$$

# %%
latents = autoencoder.encode(picture)
back = autoencoder.decode(latents)
mean, _ = autoencoder.moments(picture)
torch.testing.assert_close(latents, (mean - SHIFT) * SCALE)


def psnr(one, other):
    """Peak signal-to-noise ratio of values in -1 to 1, in dB: 20 more is a tenth of the error."""
    return 10 * torch.log10(4 / (one - other).square().mean()).item()


print(f"picture {list(picture.shape)}, latents {list(latents.shape)}")
print(f"latents: mean {latents.mean():.2f}, deviation {latents.std():.2f}")

figure, panels = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
error = (back - picture).abs().amax(dim=1)[0]
for panel, image, title in zip(
    panels,
    (to_pictures(picture)[0], to_pictures(back)[0], error),
    ("picture", f"there and back: {psnr(back, picture):.1f} dB", "largest error of a pixel"),
    strict=True,
):
    shown = panel.imshow(image, interpolation="nearest", cmap="magma")
    panel.set_title(title)
    panel.set_axis_off()
figure.colorbar(shown, ax=panels[2])
plt.show()

# %% [markdown]
# ## Exercise 1: how much smaller?
#
# How many numbers make a picture, and how many its latents? How many would there be with 4
# channels?

# %% jupyter={"source_hidden": true}
# answer: 12 times fewer; with 4 channels 48 times
ratio = picture.numel() / latents.numel()
print(f"{ratio:.0f} times fewer numbers")
assert ratio == 3 * 8 * 8 / 16 == 12
assert 3 * 8 * 8 / 4 == 48

# %% [markdown]
# ## What a channel holds
#
# Each channel is a small picture. None is "red" or "edges" by design, but one can ask what is lost
# when a channel says nothing: when it has its mean in every place.

# %%
figure, panels = plt.subplots(4, 8, figsize=(10, 5.4), layout="constrained")
for channel in range(16):
    row, column = divmod(channel, 8)
    silent = latents.clone()
    silent[:, channel] = latents[:, channel].mean()
    panels[2 * row, column].imshow(latents[0, channel], cmap="RdBu", vmin=-3, vmax=3)
    panels[2 * row, column].set_title(f"channel {channel}", fontsize=8)
    image = autoencoder.decode(silent)
    panels[2 * row + 1, column].imshow(to_pictures(image)[0])
    panels[2 * row + 1, column].set_title(f"without: {psnr(image, picture):.0f} dB", fontsize=8)
for panel in panels.flat:
    panel.set_axis_off()
plt.show()

# %% [markdown]
# ## How many channels are needed?
#
# The latents of many scenes are points in a space of 16 directions. Their principal directions, the
# ones in which they differ most, can be kept, and the others set to their mean. This shows how
# quickly quality falls with fewer numbers. An autoencoder that was trained with fewer channels, as
# those with 4, 8 and 16 in the paper's Tab. 3, would use them better.

# %%
rng = random.Random(0)
scene = scenes.random_scene
pictures = torch.cat([to_tensor(scenes.draw(scene(rng), rng, side)) for _ in range(24)])
all_latents = autoencoder.encode(pictures)
points = all_latents.movedim(1, -1).flatten(0, 2)
centre = points.mean(dim=0)
_, spread, directions = torch.linalg.svd(points - centre, full_matrices=False)


def kept(latents, count):
    """Latents with what lies in the first directions alone."""
    basis = directions[:count]
    moved = latents.movedim(1, -1) - centre
    return (moved @ basis.T @ basis + centre).movedim(-1, 1)


counts = (1, 2, 4, 8, 12, 16)
quality = {n: psnr(autoencoder.decode(kept(all_latents, n)), pictures) for n in counts}
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(counts, quality.values(), marker="o")
axes.set(xlabel="directions kept of 16", ylabel="PSNR, dB", xticks=counts)
plt.show()

figure, panels = plt.subplots(1, len(counts), figsize=(10, 2), layout="constrained")
for panel, count in zip(panels, counts, strict=True):
    panel.imshow(to_pictures(autoencoder.decode(kept(latents, count)))[0])
    panel.set_title(count)
    panel.set_axis_off()
plt.show()

# %% [markdown]
# ## Exercise 2: where is a latent?
#
# Move the latents by one place to the right, and decode. By how many pixels has the picture moved?
# Is it a latent's channels or its place that say where things are?

# %% jupyter={"source_hidden": true}
# answer: by 8 pixels: place is place, and the channels say what is there
moved = autoencoder.decode(latents.roll(1, dims=-1))
inside = slice(16, side - 8)  # away from what came in at the border
distances = {
    pixels: psnr(moved[..., inside], picture.roll(pixels, dims=-1)[..., inside])
    for pixels in range(17)
}
best = max(distances, key=distances.get)
print(f"most like the picture moved by {best} pixels, at {distances[best]:.1f} dB")
assert best == 8

# %% [markdown]
# ## Exercise 3: what it has never seen
#
# This autoencoder has seen plain grounds, plain shapes and flat drawings alone. What becomes of a
# photograph's finest detail? Take static, each pixel black or white by chance, and a smooth slope
# of grey, and compare.

# %% jupyter={"source_hidden": true}
# answer: both are lost. A slope is simple to us, but the autoencoder has learnt no slopes; the
# static has no pattern at all that fewer numbers could stand for
static = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).sign()
static = static.expand(1, 3, side, side)
slope = torch.linspace(-1, 1, side).expand(1, 3, side, side)
images = {"scene": picture, "slope": slope, "static": static}
found = {name: autoencoder.decode(autoencoder.encode(image)) for name, image in images.items()}

figure, panels = plt.subplots(2, 3, figsize=(6, 4.3), layout="constrained")
for column, (name, image) in enumerate(images.items()):
    panels[0, column].imshow(to_pictures(image)[0], interpolation="nearest")
    panels[0, column].set_title(name)
    panels[1, column].imshow(to_pictures(found[name])[0], interpolation="nearest")
    panels[1, column].set_title(f"{psnr(found[name], image):.1f} dB")
for panel in panels.flat:
    panel.set_axis_off()
plt.show()
known = psnr(found["scene"], picture)
assert max(psnr(found[name], images[name]) for name in ("slope", "static")) < known - 3
