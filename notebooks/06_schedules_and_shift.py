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
# # 6. Schedules and shift
#
# A run goes from noise, $t = 1$, to data, $t = 0$, in a few dozen steps. Where the steps are taken
# is the schedule. Four stacks run Stable Diffusion 3: diffusers, the two reference implementations
# and ComfyUI. This notebook puts theirs into one plot, derives the shift that all have, and finds
# out why the official one is shifted twice.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import sd3min
from sd3min import CONVENTIONS, flow

# %% [markdown]
# ## Four stacks, one plot
#
# Each line has the number of steps and the shift that its stack uses where nobody says otherwise. A
# dot is a time at which the network is asked, but for the last one, $t = 0$, where a run ends.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, stack in CONVENTIONS.items():
    own = stack.settings("SD3-medium")
    times = flow.sigmas(own["steps"], own["shift"], own["schedule"])
    label = f"{name}: {own['steps']} steps, shift {own['shift']:g}"
    for panel in panels:
        panel.plot(torch.linspace(0, 1, len(times)), times, marker=".", label=label)
panels[0].legend(frameon=False)
panels[0].set(xlabel="share of the steps", ylabel="t", title="from noise to data")
panels[1].set(xlabel="share of the steps", yscale="log", title="the same, and where the end lies")
plt.show()

# %% [markdown]
# ## Why a shift at all
#
# The more pixels, the more noise is needed to hide a picture. Esser et al. (§5.3.2) take a picture
# of one grey $c$, with $n$ pixels. From $z_t = (1 - t)\,c + t\,\epsilon$ one can guess $c$ by the
# mean of the pixels, and is off by
#
# $$\sigma(t, n) = \frac{t}{1 - t}\,\sqrt{\frac1n}$$
#
# To be as uncertain with $m$ pixels as at $t_n$ with $n$, the time has to be $t_m$ with
# $\sigma(t_m, m) = \sigma(t_n, n)$, which gives (Eq. 23)
#
# $$t_m = \frac{\alpha\,t_n}{1 + (\alpha - 1)\,t_n}, \qquad \alpha = \sqrt{m / n}$$
#
# The experiment agrees with the formula:

# %%
generator = torch.Generator().manual_seed(0)


def uncertainty(t, pixels, grey=0.3, trials=4000):
    """How far the guess is off, measured."""
    noisy = flow.interpolate(grey, torch.randn(trials, pixels, generator=generator), t)
    guesses = noisy.mean(dim=1) / (1 - t)
    return (guesses - grey).square().mean().sqrt().item()


n, m, t_n = 64, 576, 0.5
t_m = flow.shift_times(t_n, (m / n) ** 0.5)
for t, pixels in ((t_n, n), (t_n, m), (t_m, m)):
    formula = t / (1 - t) / pixels**0.5
    print(f"t = {t:.2f}, {pixels:3} pixels: off by {uncertainty(t, pixels):.4f} ({formula:.4f})")
assert abs(uncertainty(t_m, m) / uncertainty(t_n, n) - 1) < 0.1

# %% [markdown]
# By this rule the step from 256 to 1024 pixels a side would ask for $\alpha = 4$. People clearly
# preferred pictures made with shifts above 1.5, with little between the higher ones, and the
# authors took 3 (§5.3.2).
#
# ## Exercise 1: there and back
#
# Which shift undoes a shift of $\alpha$? And what do two shifts in a row make, of $\alpha$ and
# $\beta$? Check with `flow.shift_times`.

# %% jupyter={"source_hidden": true}
# answer: 1/α undoes α, and α then β is αβ: t/(1 − t) is multiplied by α each time
t = torch.linspace(0, 0.99, 100).double()
torch.testing.assert_close(flow.shift_times(flow.shift_times(t, 3.0), 1 / 3), t)
twice = flow.shift_times(flow.shift_times(t, 3.0), 2.0)
torch.testing.assert_close(twice, flow.shift_times(t, 6.0))
shifted = flow.shift_times(t, 3.0)
torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t))

# %% [markdown]
# ## Shifted twice
#
# The official code, and diffusers after it, proceeds like this:
#
# 1. The trained times are $1/1000, \dots, 1000/1000$. **Shift them.** The smallest is then about
#    0.003 and not 0.001.
# 2. Put the steps evenly between the largest and the smallest.
# 3. **Shift these.**
#
# So the smallest time has been shifted in step 1 and again in step 3. Nothing in the paper asks for
# it; it happens because the table of shifted times, and not the trained times, says where a run
# ends.


# %%
def official(steps, shift):
    """The recipe above."""
    trained = np.arange(1, 1001, dtype=np.float32) / 1000
    table = shift * trained / (1 + (shift - 1) * trained)  # 1
    even = np.linspace(table[-1], table[0], steps)  # 2
    return shift * even / (1 + (shift - 1) * even)  # 3


def once(steps, shift):
    """Without step 1."""
    even = np.linspace(1, 1 / 1000, steps)
    return shift * even / (1 + (shift - 1) * even)


np.testing.assert_allclose(flow.sigmas(28, 3.0)[:-1], official(28, 3.0), rtol=1e-5)
np.testing.assert_allclose(flow.sigmas(28, 3.0, "single_shift")[:-1], once(28, 3.0), rtol=1e-5)

figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, times in (("shifted twice", official(28, 3.0)), ("once", once(28, 3.0))):
    panels[0].plot(range(1, 29), times, marker=".", label=name)
    panels[1].plot(range(23, 29), times[-6:], marker="o", label=name)
panels[0].set(xlabel="step", ylabel="t at which it starts")
panels[1].set(xlabel="step", title="the last six", yscale="log")
panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Exercise 2: the last step
#
# With exercise 1, say without any code from which $t$ the last step starts, under a shift of 3 in
# both schedules. Which step does the official one make longer?

# %% jupyter={"source_hidden": true}
# answer: two shifts of 3 are one of 9: 9·0.001/(1 + 8·0.001) = 0.0089, against 0.0030 for one; the
# last step, down to 0, is three times as long
double, single = 9 * 0.001 / (1 + 8 * 0.001), 3 * 0.001 / (1 + 2 * 0.001)
print(f"{double:.4f} and {single:.4f}")
assert abs(flow.sigmas(28, 3.0)[-2] - double) < 1e-6
assert abs(flow.sigmas(28, 3.0, "single_shift")[-2] - single) < 1e-6

# %% [markdown]
# ## Exercise 3: can it be seen?
#
# Draw the same picture with both schedules, and with shifts of 1 and 6, from few steps. Which
# change is larger: that of the second shift, or that of another $\alpha$?

# %% jupyter={"source_hidden": true}
# answer: another α is; the second shift moves the small times, where little is left to decide
pipe = sd3min.load()  # sd3-tiny
prompt = "a purple star right of a green cross on white"
settings = {
    "official": {},
    "shifted once": {"schedule": "single_shift"},
    "shift 1": {"shift": 1.0},
    "shift 6": {"shift": 6.0},
}
pictures = {
    name: pipe(prompt, seed=3, steps=8, progress=False, **setting)[0]
    for name, setting in settings.items()
}
whole = np.asarray(pictures["official"], dtype=float)
change = {name: np.abs(np.asarray(p) - whole).mean() for name, p in pictures.items()}

figure, panels = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
for panel, (name, picture) in zip(panels, pictures.items(), strict=True):
    panel.imshow(picture, interpolation="nearest")
    panel.set_title(f"{name}: {change[name]:.2f} levels off" if change[name] else name, fontsize=9)
    panel.set_axis_off()
plt.show()
assert 0 < change["shifted once"] < max(change["shift 1"], change["shift 6"])
