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
# # 1. Rectified flow in two dimensions
#
# Stable Diffusion 3 makes pictures as this notebook makes points: it learns a velocity that carries
# noise to data, and follows it. In two dimensions everything can be seen, and learnt in seconds.
#
# The data are two half circles. Nothing of Stable Diffusion is used but `sd3min.flow`, which knows
# nothing of networks.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from sd3min import flow

torch.manual_seed(0)


def draw_data(count):
    """Points on two half circles, a little off them, around (1, 0.5)."""
    angle, side = torch.pi * torch.rand(count), torch.randint(2, (count,)) * 2 - 1
    x = 1 + side * (2 * torch.cos(angle) - 1)
    y = 0.5 + side * (2 * torch.sin(angle) - 0.5)
    return torch.stack([x, y], dim=1) + 0.1 * torch.randn(count, 2)


# %% [markdown]
# ## The path from data to noise is straight
#
# A point of data $x_0$ and a point of noise $\epsilon \sim \mathcal N(0, I)$ are joined by a line
# (Esser et al. 2024, §3, "Rectified Flow"), and along it the velocity is the same everywhere:
#
# $$z_t = (1 - t)\,x_0 + t\,\epsilon, \qquad \frac{dz_t}{dt} = \epsilon - x_0$$
#
# Time runs from data, $t = 0$, to noise, $t = 1$. Which point is joined with which is left to
# chance, so the lines cross.

# %%
data, noise = draw_data(2000), torch.randn(2000, 2)

figure, panels = plt.subplots(
    1, 5, figsize=(12, 2.6), sharex=True, sharey=True, layout="constrained"
)
for panel, t in zip(panels, (0.0, 0.4, 0.7, 1.0), strict=False):
    panel.scatter(*flow.interpolate(data, noise, t).T, s=1)
    panel.set_title(f"t = {t}")
for start, end in zip(data[:25], noise[:25], strict=True):
    panels[4].plot(*torch.stack([start, end]).T, color="tab:orange", linewidth=0.8)
panels[4].scatter(*data[:25].T, s=8, color="tab:blue", zorder=3)
panels[4].scatter(*noise[:25].T, s=8, color="black", zorder=3)
panels[4].set_title("from data to noise (black)")
for panel in panels:
    panel.set_aspect("equal")
plt.show()

# %% [markdown]
# ## Learning the velocity
#
# A network is shown $z_t$ and $t$ and has to say $\epsilon - x_0$ (§2, Eq. 8, on straight paths):
#
# $$\mathcal L = \mathbb E_{t,\,x_0,\,\epsilon}\,
# \big\lVert v_\Theta(z_t, t) - (\epsilon - x_0) \big\rVert^2$$
#
# It cannot: through one point lead many lines, and it does not see which of them it is on. What
# makes the loss smallest is the **mean** of their velocities, $v(z, t) = \mathbb E[\epsilon - x_0
# \mid z_t = z]$. So the loss stays well above zero, and that is no fault.


# %%
def train(pairs, steps=1500):
    """A network that has learnt the velocity between pairs of data and noise, and its losses."""
    network = nn.Sequential(
        *(nn.Linear(3, 128), nn.SiLU()),
        *(nn.Linear(128, 128), nn.SiLU()),
        *(nn.Linear(128, 128), nn.SiLU()),
        *(nn.Linear(128, 128), nn.SiLU()),
        nn.Linear(128, 2),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for _ in range(steps):
        data, noise = pairs(512)
        t = torch.rand(len(data), 1)
        predicted = network(torch.cat([flow.interpolate(data, noise, t), t], dim=1))
        loss = (predicted - flow.velocity_target(data, noise)).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return network.requires_grad_(False), losses


network, losses = train(lambda count: (draw_data(count), torch.randn(count, 2)))
first, last = sum(losses[:10]) / 10, sum(losses[-100:]) / 100
print(f"mean loss of the first ten steps {first:.2f}, of the last hundred {last:.2f}")

figure, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
axes.plot(losses, linewidth=0.5)
axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
plt.show()

# %% [markdown]
# ## Following it
#
# From noise at $t = 1$, small steps along the velocity lead to data (§2, Eq. 1):
#
# $$z_{t'} = z_t + (t' - t)\,v_\Theta(z_t, t)$$
#
# `flow.steps` does just that, for points as for latents. The paths bend: training drew straight
# lines, but their mean turns as the choice of where to go narrows. And two paths never meet at the
# same place and time, since they would go on as one (on the plane they may cross, at two times).


# %%
def velocity_of(network):
    """The network as a function of points and one time."""
    return lambda z, t: network(torch.cat([z, t.expand(len(z), 1)], dim=1))


def follow(network, noise, steps):
    """Where points are after every step, noise first."""
    times = torch.linspace(1, 0, steps + 1)
    run = flow.steps(velocity_of(network), noise, times)
    return torch.stack([noise, *(step.next_latents for step in run)])


noise = torch.randn(2000, 2)
ways = follow(network, noise, 50)

figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")
panels[0].plot(*ways[:, :60].permute(2, 0, 1), color="tab:orange", linewidth=0.7)
panels[0].scatter(*noise[:60].T, s=6, color="black", zorder=3)
panels[0].set_title("60 ways, from the dots")
panels[1].scatter(*ways[-1].T, s=1)
panels[1].set_title("2000 points after 50 steps")
for panel in panels:
    panel.set_aspect("equal")
plt.show()

# %% [markdown]
# ## Exercise 1: where does the velocity point at the very beginning?
#
# At $t = 1$ a point is pure noise and says nothing about its data. What is the best velocity there?
# Write it as a function of $z$ and of the data's mean, and compare it with the network's.

# %% jupyter={"source_hidden": true}
# answer: E[ε − x0 | ε = z] = z − E[x0], a pull of every point towards the mean of the data
answer = noise - data.mean(dim=0)
learnt = velocity_of(network)(noise, torch.tensor(1.0))
error = (learnt - answer).norm(dim=1).median() / answer.norm(dim=1).median()
print(f"the network is {error:.0%} off")
assert error < 0.3

# %% [markdown]
# ## Exercise 2: how many steps are needed?
#
# Guess what **one** step makes of noise, by exercise 1. Then measure how far points are from data
# after 1, 2, 4, 8 and 32 steps, and how far they are spread.


# %% jupyter={"source_hidden": true}
# answer: one step lands everything near the mean of the data, where no data are
def miss(points):
    """Mean distance to the nearest point of data."""
    return torch.cdist(points, data).min(dim=1).values.mean().item()


made = {steps: follow(network, noise, steps)[-1] for steps in (1, 2, 4, 8, 32)}
for steps, points in made.items():
    print(f"{steps:2} steps: {miss(points):.2f} from data, spread {points.std(dim=0).norm():.2f}")
assert made[1].std(dim=0).norm() < 0.3 * data.std(dim=0).norm()
assert miss(made[32]) < miss(made[4]) < miss(made[1])

# %% [markdown]
# ## Exercise 3: straighten the flow
#
# No two ways meet. So join each noise with the data that *its own way* ends in, and train a
# second network on these pairs ("reflow", Liu et al. 2022). How straight are its ways, and what
# does one step make now? (Stable Diffusion 3 is not trained so; its fast relatives are distilled.)

# %% jupyter={"source_hidden": true}
# answer: the new pairs' lines hardly cross, their mean hardly bends, and one step is enough
start = torch.randn(20_000, 2)
end = follow(network, start, 30)[-1]


def own_pairs(count):
    """Noise, and what the first network made of it."""
    some = torch.randint(len(start), (count,))
    return end[some], start[some]


straight, _ = train(own_pairs)


def straightness(ways):
    """Distance between the ends over the length of the way, in the mean."""
    return ((ways[-1] - ways[0]).norm(dim=1) / ways.diff(dim=0).norm(dim=2).sum(dim=0)).mean()


before, after = straightness(ways), straightness(follow(straight, noise, 50))
once = follow(straight, noise, 1)[-1]
print(f"straightness {before:.3f} before, {after:.3f} after")
print(f"one step ends {miss(made[1]):.2f} from data before, {miss(once):.2f} after")

figure, panels = plt.subplots(1, 2, figsize=(7, 3), sharex=True, sharey=True, layout="constrained")
for panel, points, title in zip(panels, (made[1], once), ("before", "after"), strict=True):
    panel.scatter(*points.T, s=1)
    panel.set_title(f"one step, {title}")
    panel.set_aspect("equal")
plt.show()
assert after > before and miss(once) < 0.5 * miss(made[1])
