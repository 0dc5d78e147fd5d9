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
# # 5. One joint block, term by term
#
# The network of Stable Diffusion 3 is a stack of joint blocks (Esser et al. 2024, §4,
# Fig. 2b). In a block the
# text's tokens and the picture's tokens are transformed by **weights of their own**, and meet in
# one place: an attention over both together.
#
# Here one block is worked out from its bare weight tensors, in the order of the figure, with
# nothing but sums, products, exponentials and roots. At the end every number has to agree with
# `sd3min.mmdit.JointBlock`.

# %%
import math

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from matplotlib.colors import PowerNorm

import sd3min
from sd3min import flow
from sd3min.mmdit import sinusoid
from sd3min.pipeline import to_tensor

pipe = sd3min.load()  # sd3-tiny
prompt = "a yellow heart left of a purple cross on gray"
picture = pipe(prompt, seed=3, progress=False)[0]
picture.resize((256, 256), 0)

# %% [markdown]
# ## What comes in (Fig. 2a)
#
# Three things: the rows of the text, CLIP's and below them T5's; the patches of a noisy latent, 2x2
# each, with their positions added; and one vector, the condition, made from the time and from the
# whole text at once. The latent is the picture's above, at time 0.7 of the way to noise.

# %%
t = 0.7
text, pooled = (part.double() for part in pipe.encode_prompt([prompt]))
latents = pipe.autoencoder.encode(to_tensor(picture))
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
latents = flow.interpolate(latents, noise, t).double()
time = sinusoid(torch.tensor([1000 * t])).double()

model = pipe.mmdit.double()
rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
context = model.context_embedder(text)
image = model.x_embedder(latents) + model.positions(rows, columns)
cond = model.t_embedder(time) + model.y_embedder(pooled)
print(f"text {list(context.shape)}, image {list(image.shape)}, condition {list(cond.shape)}")

# %% [markdown]
# ## Modulation
#
# Each stream makes six vectors from the condition, three for its attention and three for its MLP:
#
# $$(\beta,\ \gamma,\ g,\ \beta',\ \gamma',\ g') = W\,\mathrm{SiLU}(\mathrm{cond}) + b,
# \qquad \mathrm{SiLU}(u) = \frac{u}{1 + e^{-u}}$$
#
# The shift $\beta$ and the scale $\gamma$ change what the attention sees, the gate $g$ how much of
# its answer is kept.

# %%
block = model.joint_blocks[0]
own = {
    "text": dict(block.context_block.named_parameters()),
    "image": dict(block.x_block.named_parameters()),
}
tokens = {"text": context, "image": image}


def linear(x, stream, name):
    """W x + b, with the tensors of one stream."""
    return x @ own[stream][f"{name}.weight"].T + own[stream][f"{name}.bias"]


silu = cond / (1 + torch.exp(-cond))
parts = {stream: linear(silu, stream, "adaLN_modulation.1").chunk(6, dim=-1) for stream in own}

# %% [markdown]
# ## Normalisation, then queries, keys and values
#
# Every token is brought to mean 0 and variance 1 over its own channels, then scaled and shifted:
#
# $$\tilde x = (1 + \gamma) \cdot \frac{x - \mu(x)}{\sqrt{\sigma^2(x) + 10^{-6}}} + \beta,
# \qquad (q, k, v) = W\tilde x + b$$
#
# The channels of $q$, $k$ and $v$ are then divided among heads, 64 for each.


# %%
def modulated(x, shift, scale):
    """The layer norm without weights of its own, and the condition in their place."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (1 + scale) * centred / deviation + shift


def heads(stream):
    """Queries, keys and values of one stream, a head at a time."""
    shift, scale, *_ = parts[stream]
    qkv = linear(modulated(tokens[stream], shift, scale), stream, "attn.qkv")
    return rearrange(qkv, "1 n (three head e) -> three head n e", three=3, e=64)


q_text, k_text, v_text = heads("text")
q_image, k_image, v_image = heads("image")

# %% [markdown]
# ## One attention over both
#
# The two sequences are put behind one another, the text first, and every token asks all the others:
#
# $$A = \mathrm{softmax}\!\left(\frac{q\,k^\top}{\sqrt{64}}\right), \qquad a = A\,v$$
#
# Nothing here knows which token is text and which is image: only the weights that made $q$, $k$ and
# $v$ did.

# %%
q = torch.cat([q_text, q_image], dim=1)
k = torch.cat([k_text, k_image], dim=1)
v = torch.cat([v_text, v_image], dim=1)

weights = torch.exp(q @ k.transpose(1, 2) / math.sqrt(64))
attention = weights / weights.sum(-1, keepdim=True)
attended = rearrange(attention @ v, "head n e -> 1 n (head e)")

# %% [markdown]
# ## Apart again: gates and MLPs
#
# Each stream takes its own rows of the answer and goes on alone, with two residuals:
#
# $$x \leftarrow x + g\,(W_o\,a + b_o),
# \qquad x \leftarrow x + g'\,\mathrm{MLP}\big(\mathrm{mod}(x;\ \beta', \gamma')\big)$$
#
# The MLP is four times as wide inside, with $\mathrm{GELU}(u) \approx \tfrac{u}{2}\left(1 +
# \tanh\!\big(\sqrt{2/\pi}\,(u + 0.044715\,u^3)\big)\right)$ between its two layers.

# %%
length = context.shape[1]
answers = {"text": attended[:, :length], "image": attended[:, length:]}
by_hand = {}
for stream, x in tokens.items():
    _, _, gate, shift_mlp, scale_mlp, gate_mlp = parts[stream]
    x = x + gate * linear(answers[stream], stream, "attn.proj")
    u = linear(modulated(x, shift_mlp, scale_mlp), stream, "mlp.fc1")
    u = u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    by_hand[stream] = x + gate_mlp * linear(u, stream, "mlp.fc2")

# %% [markdown]
# ## What the tokens look at
#
# The matrix $A$, averaged over the heads. A row is a token that asks, and its values add up to 1; a
# column is a token that answers. Cut between text and image, the matrix has four parts, and they
# are how the two modalities talk: through the lower left, the patches ask the words. Each title
# says which part of the attention goes there. Padding asks and answers like any word.

# %%
matrix = attention.mean(0)
sizes = {"text": slice(0, length), "image": slice(length, None)}
counts = [length, rows * columns]
half = length // 2
marks = {  # where a label stands on an axis
    "text": ([(half - 1) / 2, half + (half - 1) / 2], ["CLIP", "T5"]),
    "image": ([columns * (row + 0.5) - 0.5 for row in range(rows)], range(1, rows + 1)),
}
titles = {"text": "text tokens", "image": "patches by row"}

figure, panels = plt.subplots(
    2,
    2,
    figsize=(8, 8.8),
    layout="constrained",
    sharex="col",
    sharey="row",
    width_ratios=counts,
    height_ratios=counts,
)
for i, asking in enumerate(sizes):
    for j, answering in enumerate(sizes):
        quadrant = matrix[sizes[asking], sizes[answering]]
        panel = panels[i, j]
        drawn = panel.imshow(quadrant, norm=PowerNorm(0.5, 0, matrix.max()), cmap="Blues")
        panel.set_title(f"{asking} asks {answering}: {quadrant.sum(-1).mean():.0%}")
        panel.set_xticks(*marks[answering])
        panel.set_yticks(*marks[asking], rotation=90, va="center")
        panel.tick_params(length=0)
    panels[i, 0].set_ylabel(f"asking: {titles[asking]}")
    panels[1, i].set_xlabel(f"answering: {titles[asking]}")
figure.colorbar(
    drawn,
    ax=panels,
    location="bottom",
    label="attention, mean of the heads",
    shrink=0.7,
)
plt.show()

# %% [markdown]
# ## The module says the same
#
# In 64-bit numbers two ways of adding the same terms differ by about $10^{-15}$; $10^{-10}$ leaves
# no room for another formula.

# %%
for_text, for_image = block(context, image, cond)
for name, ours, theirs in (
    ("text", by_hand["text"], for_text),
    ("image", by_hand["image"], for_image),
):
    print(f"{name}: largest difference {(ours - theirs).abs().max():.1e}")
torch.testing.assert_close(
    (by_hand["text"], by_hand["image"]), (for_text, for_image), rtol=0, atol=1e-10
)

# %% [markdown]
# ## Exercise 1: does the order matter?
#
# Put the image's tokens before the text's in the attention, and work out its answers again. Which
# of them change?

# %% jupyter={"source_hidden": true}
# answer: none. A softmax is a sum over all tokens, in whatever order
q_, k_, v_ = (
    torch.cat(pair, dim=1) for pair in ((q_image, q_text), (k_image, k_text), (v_image, v_text))
)
swapped = torch.softmax(q_ @ k_.transpose(1, 2) / math.sqrt(64), dim=-1) @ v_
swapped = torch.cat([swapped[:, -length:], swapped[:, :-length]], dim=1)
torch.testing.assert_close(rearrange(swapped, "head n e -> 1 n (head e)"), attended)

# %% [markdown]
# ## Exercise 2: two transformers
#
# Forbid all attention between text and image, by logits of $-\infty$ in two quadrants. What does
# the image then know of the prompt? Show that its tokens no longer depend on the text's.

# %% jupyter={"source_hidden": true}
# answer: only what the condition says through shift, scale and gate: the block falls apart into two
# transformers, and other rows of text change nothing for the image
crossing = torch.zeros_like(matrix)
crossing[:length, length:] = crossing[length:, :length] = -math.inf


def image_answers(k_text, v_text, mask):
    """What the image's tokens get to hear."""
    k, v = torch.cat([k_text, k_image], dim=1), torch.cat([v_text, v_image], dim=1)
    logits = q @ k.transpose(1, 2) / math.sqrt(64) + mask
    return (torch.softmax(logits, dim=-1) @ v)[:, length:]


others = torch.randn_like(k_text), torch.randn_like(v_text)
apart = image_answers(k_text, v_text, crossing)
torch.testing.assert_close(image_answers(*others, crossing), apart)
alone = torch.nn.functional.scaled_dot_product_attention(q_image, k_image, v_image)
torch.testing.assert_close(apart, alone)
assert not torch.allclose(image_answers(*others, 0), image_answers(k_text, v_text, 0))
