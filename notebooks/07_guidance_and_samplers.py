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
# # 7. Guidance, steps and samplers
#
# How many steps does a picture need, does a cleverer sampler need fewer, and how strongly should
# the prompt be followed? On sd3-tiny these can be measured: a detector says whether a picture's
# things are those that were asked for, where they were asked for (the ground does not count).

# %%
import matplotlib.pyplot as plt
import torch

import sd3min
from sd3min import flow
from sd3min.training import captions, scenes
from sd3min.training.detector import judge

pipe = sd3min.load()  # sd3-tiny
wanted = scenes.prompts("seen", 30)  # the first scenes of its test, not picked
prompts = [captions.caption(scene) for scene in wanted]


def accuracy(pictures):
    """Share of pictures that show what their prompts ask for, which is the better part of ±0.1 off
    the share among all prompts: 30 are few.
    """
    pairs = zip(pictures, wanted, strict=True)
    return sum(judge(picture, scene).right for picture, scene in pairs) / len(wanted)


def draw(**settings):
    """A picture of every prompt, from the same noise under all settings."""
    return pipe(prompts, seed=list(range(len(prompts))), progress=False, **settings)


# %% [markdown]
# ## Guidance
#
# The network is asked twice in every step, for the prompt ($v_+$) and for an empty prompt ($v_-$),
# and what the prompt adds is exaggerated (Ho and Salimans 2022):
#
# $$v = v_- + s\,(v_+ - v_-)$$
#
# At $s = 1$ this is $v_+$ alone, and the network needs to be asked once. Larger $s$ holds pictures
# to the prompt, and beyond some point drives them out of what pictures are.

# %%
scales = (1.0, 2.0, 3.0, 6.0, 12.0)
steps = min(pipe.defaults.steps, 12)
guided = {scale: draw(guidance_scale=scale, steps=steps) for scale in scales}

figure, panels = plt.subplots(2, len(scales), figsize=(9, 4.2), layout="constrained")
for column, (scale, pictures) in enumerate(guided.items()):
    for row in range(2):
        panels[row, column].imshow(pictures[row], interpolation="nearest")
        panels[row, column].set_axis_off()
    panels[0, column].set_title(f"s = {scale:g}: {accuracy(pictures):.0%}")
figure.suptitle(f"right among {len(prompts)} prompts, of which two are shown")
plt.show()

# %% [markdown]
# ## Exercise 1: guidance by hand
#
# Write $v$ from two calls of `pipe.mmdit`, and compare it with `flow.guide`, which makes one call
# of a doubled batch. What does `flow.guide` ask at $s = 1$?

# %% jupyter={"source_hidden": true}
# answer: the two calls agree with the doubled one; at s = 1 the empty prompt does not count, and
# the velocity is asked as it is
generator = torch.Generator().manual_seed(0)
h, w = pipe.defaults.height // 8, pipe.defaults.width // 8
z, t = torch.randn(1, 16, h, w, generator=generator), torch.tensor(0.6)
with torch.no_grad():
    empty, text = pipe.encode_prompt([""]), pipe.encode_prompt(prompts[:1])
    doubled = [torch.cat(pair) for pair in zip(empty, text, strict=True)]
    negative, positive = (pipe.mmdit(z, 1000 * t[None], *said) for said in (empty, text))

    def both(z, t):
        """The velocities of both prompts."""
        return pipe.mmdit(z, 1000 * t.expand(len(z)), *doubled)

    by_hand = negative + 4 * (positive - negative)
    torch.testing.assert_close(flow.guide(both, 4.0)(z, t), by_hand, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(negative + 1 * (positive - negative), positive)
assert flow.guide(both, 1.0) is both

# %% [markdown]
# ## Steps and samplers
#
# Euler's method follows the tangent (Esser et al. 2024, §2, Eq. 1). DPM-Solver++(2M), which the
# code of Stable Diffusion 3.5 uses, remembers the step before and leans into the curve (Lu et al.
# 2022). Both ask the network once a step, for two prompts under guidance, so cost is counted in
# velocities. The first step, with nothing to remember, is the same in both, and so is the last.

# %%
counts = (1, 2, 3, 4, 6, 10)
found = {
    sampler: {count: draw(sampler=sampler, steps=count) for count in counts}
    for sampler in flow.SAMPLERS
}
cost = 1 + (pipe.defaults.guidance_scale > 1)

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for sampler, by_count in found.items():
    right = [accuracy(pictures) for pictures in by_count.values()]
    axes.plot([cost * count for count in counts], right, marker="o", label=sampler, alpha=0.8)
axes.set(xlabel="velocities", ylabel=f"right of {len(prompts)}", ylim=(-0.05, 1.05))
axes.legend(frameon=False)
plt.show()

figure, panels = plt.subplots(2, len(counts), figsize=(9, 3.4), layout="constrained")
for row, (sampler, by_count) in zip(panels, found.items(), strict=True):
    for panel, (count, pictures) in zip(row, by_count.items(), strict=True):
        panel.imshow(pictures[0], interpolation="nearest")
        panel.set_title(f"{sampler}, {count}", fontsize=9)
        panel.set_axis_off()
plt.show()

# %% [markdown]
# Without guidance one step would show the mean of all pictures that fit, as the first notebook's
# points did; guidance exaggerates it. A few settle what is where; later ones sharpen. Which of the
# samplers needs fewer? To continue a curve from two of its points helps where they are close. With
# few steps they are far apart, and the guess may overshoot: the plot decides.
#
# ## Exercise 2: the same end?
#
# With more and more steps both samplers should reach the same picture, as both solve the same
# equation. How far apart are their latents at 4, 8 and 16 steps? Use `on_step` to get at them.


# %% jupyter={"source_hidden": true}
# answer: they come together
def last_latents(**settings):
    """Latents after the last step."""
    kept = []
    pipe(prompts[:2], seed=0, progress=False, on_step=kept.append, **settings)
    return kept[-1].next_latents


apart = {}
for count in (4, 8, 16):
    euler, other = (last_latents(steps=count, sampler=sampler) for sampler in flow.SAMPLERS)
    apart[count] = (euler - other).square().mean().sqrt().item()
    print(f"{count:2} steps: {apart[count]:.3f} apart")
assert apart[16] < apart[8] < apart[4]

# %% [markdown]
# ## Exercise 3: a straight way needs one step
#
# If the velocity did not depend on the time and the place, how many steps would Euler need? Give
# `flow.sample` such a velocity, and check both samplers.

# %% jupyter={"source_hidden": true}
# answer: one, and any number gives the same
data, noise = torch.zeros(1, 16, 4, 4) + 0.5, torch.randn(1, 16, 4, 4, generator=generator)
for sampler in flow.SAMPLERS:
    for count in (1, 5):
        end = flow.sample(lambda z, t: noise - data, noise, flow.sigmas(count), sampler)
        torch.testing.assert_close(end, data, rtol=0, atol=1e-5)
assert accuracy(found["euler"][10]) > accuracy(found["euler"][1])
