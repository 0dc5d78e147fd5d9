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
# # 2. From a prompt to its conditioning
#
# The network never sees a prompt. Three text encoders read it, CLIP-L, CLIP-G and T5, and hand over
# two things (Esser et al. 2024, §4 and App. B.2): the **context**, a table with a row for every
# token, which is attended to, and the **pooled** vector, which modulates every layer.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import sd3min
from sd3min.probes import ablate
from sd3min.probes.ablation import ENCODERS
from sd3min.training import captions

pipe = sd3min.load()  # sd3-tiny
encoders = pipe.text_encoders
prompt = "a green circle above a red heart on white"

# %% [markdown]
# ## Tokens
#
# Each encoder has a tokenizer of its own. The CLIPs mark start and end of the text, T5 the end
# alone. Unused places are filled with padding: CLIP-L repeats the end, CLIP-G writes token 0, which
# is spelt `!`, and T5 has a token for it.

# %%
lengths = {name: encoders.clip_l.config.max_position_embeddings for name in ENCODERS[:2]}
lengths["t5"] = encoders.t5_length
for (name, length), tokenizer in zip(lengths.items(), encoders.tokenizers, strict=True):
    ids = tokenizer(prompt, padding="max_length", max_length=length).input_ids
    print(f"{name:7}", " ".join(tokenizer.convert_ids_to_tokens(ids)))

# %% [markdown]
# ## Rows side by side, and rows below
#
# CLIP's rows are taken before its last layer, T5's after it. CLIP-L's and CLIP-G's stand side by
# side, are filled up with zeros to T5's width, and T5's rows follow below. With official weights
# that is $77 \times (768 + 1280 + 2048)$ above $256 \times 4096$ (256 rows of T5 is what diffusers
# chose; the paper has 77). sd3-tiny's CLIPs fill the width of its T5, and leave no zeros.
#
# $$c_\text{ctxt} = \begin{pmatrix} \text{CLIP-L} \;|\; \text{CLIP-G} \;|\; 0 \\ \text{T5}
# \end{pmatrix}, \qquad c_\text{vec} = (\text{CLIP-L's pooled} \;|\; \text{CLIP-G's pooled})$$

# %%
with torch.no_grad():
    context, pooled = encoders.encode([prompt])
rows = lengths["clip_l"]
widths = [encoders.clip_l.config.hidden_size, encoders.clip_g.config.hidden_size]
both = sum(widths)

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
shown = axes.imshow(context[0], aspect="auto", cmap="RdBu", vmin=-3, vmax=3, interpolation="none")
axes.axhline(rows - 0.5, color="black", linewidth=1)
for edge in (widths[0], both):
    axes.plot([edge - 0.5] * 2, [-0.5, rows - 0.5], color="black", linewidth=1)
width = context.shape[-1]
for x, y, name in (
    (widths[0] / 2, rows / 2, "CLIP-L"),
    (widths[0] + widths[1] / 2, rows / 2, "CLIP-G"),
    ((both + width) / 2, rows / 2, "zeros" if both < width else ""),
    (width / 2, rows + encoders.t5_length / 2, "T5"),
):
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    axes.text(x, y, name, ha="center", va="center", bbox=box)
axes.set(xlabel="channel", ylabel="row", title=f"the context of {prompt!r}")
figure.colorbar(shown, label="value")
plt.show()

# %% [markdown]
# The same by hand, from the encoders' own modules of `transformers`:

# %%
with torch.no_grad():
    said, vectors = [], []
    for index, model in enumerate((encoders.clip_l, encoders.clip_g)):
        ids = encoders.tokenizers[index](
            prompt, padding="max_length", max_length=rows, return_tensors="pt"
        ).input_ids
        output = model(ids, output_hidden_states=True)
        said.append(output.hidden_states[-2])
        vectors.append(output.text_embeds)
    above = torch.cat(said, dim=-1)
    above = F.pad(above, (0, width - above.shape[-1]))
    ids = encoders.tokenizers[2](
        prompt, padding="max_length", max_length=encoders.t5_length, return_tensors="pt"
    ).input_ids
    below = encoders.t5(ids).last_hidden_state
torch.testing.assert_close(torch.cat([above, below], dim=1), context)
torch.testing.assert_close(torch.cat(vectors, dim=-1), pooled)

# %% [markdown]
# ## Exercise 1: which rows know the word?
#
# CLIP reads from left to right, each token seeing those before it; T5 reads in both directions.
# Which rows of the context change when `heart` becomes `star`? Does padding change?

# %% jupyter={"source_hidden": true}
# answer: CLIP's rows from the word on, padding included; all rows of T5, padding too, since nothing
# tells T5 which rows are padding
with torch.no_grad():
    other, _ = encoders.encode([prompt.replace("heart", "star")])
change = (context - other)[0].norm(dim=1)
words = encoders.tokenizers[0].convert_ids_to_tokens(encoders.tokenizers[0](prompt).input_ids)
place = next(i for i, word in enumerate(words) if word.startswith("heart"))

figure, axes = plt.subplots(figsize=(8, 2.4), layout="constrained")
axes.bar(range(rows), change[:rows], label="CLIP")
axes.bar(range(rows, len(change)), change[rows:], label="T5")
axes.axvline(place, color="black", linewidth=0.8, linestyle=":")
axes.set(xlabel="row", ylabel="change", title="heart → star; the dotted line is the word in CLIP")
axes.legend(frameon=False)
plt.show()
assert not change[:place].any() and (change[place:] > 0).all()

# %% [markdown]
# ## Leaving an encoder out
#
# In training each encoder is now and then left out, zeros standing for what it says (App. B.3; in
# the paper 46.4 % of the time, each by itself). So the network can do without, and one can ask what
# each is there for.

# %%
found = {name: ablate(pipe, prompt, seed=4, encoder=name) for name in ENCODERS}
pictures = {"with all three": found["t5"].whole}
pictures |= {f"without {name}": each.without for name, each in found.items()}

figure, panels = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for panel, (title, picture) in zip(panels, pictures.items(), strict=True):
    panel.imshow(picture, interpolation="nearest")
    panel.set_title(title)
    panel.set_axis_off()
figure.suptitle(prompt)
plt.show()

# %% [markdown]
# ## Exercise 2: less memory
#
# T5 is the largest part of the official files, 4.8 billion parameters, and `sd3min.load(t5=False)`
# goes without it. Is that the same as zeros in the place of its rows? Compare pictures.

# %% jupyter={"source_hidden": true}
# answer: yes, to the last pixel
small = sd3min.load(t5=False)
alone = small(prompt, seed=4, progress=False)[0]
assert alone.tobytes() == found["t5"].without.tobytes()

# %% [markdown]
# ## What T5 adds
#
# In the paper, going without T5 hardly changes how pictures look, and costs most where a prompt is
# long or text is to be written (§5.3.3). The captions of sd3-tiny are short: any one encoder could
# tell all of them, and the CLIPs do where T5 is left out. Where all are there, sd3-tiny was taught
# to ask T5 **how things stand**: in training the CLIPs read such captions with other relations.
# That can be seen by telling them different stories.

# %%
opposite = prompt.replace("above", "below")
with torch.no_grad():
    other = encoders.encode([opposite])
stories = {
    "all: above": (context, pooled),
    "all: below": other,
    "CLIP: above, T5: below": (torch.cat([context[:, :rows], other.context[:, rows:]], 1), pooled),
    "CLIP: below, T5: above": (
        torch.cat([other.context[:, :rows], context[:, rows:]], 1),
        other.pooled,
    ),
}


def draw(story, seed=4):
    """A picture of a conditioning, the empty prompt being the negative one."""
    size = pipe.defaults
    noise = torch.randn(
        1, 16, size.height // 8, size.width // 8, generator=torch.Generator().manual_seed(seed)
    )
    empty = encoders.encode([""])
    text = [torch.cat(pair) for pair in zip(empty, story, strict=True)]

    def velocity(z, t):
        return pipe.mmdit(z, 1000 * t.expand(len(z)), *text)

    guided = sd3min.flow.guide(velocity, size.guidance_scale)
    times = sd3min.flow.sigmas(size.steps, size.shift)
    latents = sd3min.flow.sample(guided, noise, times)
    return sd3min.pipeline.to_pictures(pipe.autoencoder.decode(latents))[0]


with torch.no_grad():
    drawn = {title: draw(story) for title, story in stories.items()}
figure, panels = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
for panel, (title, picture) in zip(panels, drawn.items(), strict=True):
    panel.imshow(picture, interpolation="nearest")
    panel.set_title(title)
    panel.set_axis_off()
plt.show()
pixels = [np.asarray(each, dtype=int) for each in (drawn["all: above"], found["t5"].whole)]
assert abs(pixels[0] - pixels[1]).max() <= 2  # the pipeline's own picture, but for rounding

# %% [markdown]
# ## Exercise 3: whom does the network believe?
#
# Let CLIP and T5 disagree on the relation in five pictures, and count with
# `sd3min.training.detector.judge` how often the picture is as T5 has it, and how often as CLIP has.

# %% jupyter={"source_hidden": true}
# answer: T5
from sd3min.training.detector import judge

with torch.no_grad():
    torn = [draw(stories["CLIP: above, T5: below"], seed) for seed in range(5)]
as_t5 = sum(judge(picture, captions.parse(opposite)).right for picture in torn)
as_clip = sum(judge(picture, captions.parse(prompt)).right for picture in torn)
print(f"as T5 has it: {as_t5} of {len(torn)}; as CLIP has it: {as_clip}")
assert as_t5 > as_clip
