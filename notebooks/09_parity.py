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
# # 9. Parity: find the planted bug
#
# Two implementations of one network should give the same numbers. When they do not, the last output
# says *that* they differ and not *where*: after some hundred layers everything differs. The cure is
# to keep every tensor of both runs and to ask for the **first** that differs. All that it was
# computed from agrees, so its own line or its own weights are to blame.

# %%
import copy

import matplotlib.pyplot as plt
import torch

import sd3min
from sd3min.probes import first_difference, trace
from sd3min.probes.trace import relative

pipe = sd3min.load()  # sd3-tiny
model = pipe.mmdit.requires_grad_(False)
defaults = pipe.defaults
latents = torch.randn(
    1, 16, defaults.height // 8, defaults.width // 8, generator=torch.Generator().manual_seed(0)
)
with torch.no_grad():
    text = pipe.encode_prompt(["a red heart above a blue square on gray"])
inputs = (latents, torch.tensor([600.0]), *text)

right = trace(model, *inputs)
names = list(right.tensors)
print(f"{len(names)} tensors, from {names[0]} to {names[-1]}")

# %% [markdown]
# ## A bug that converters make
#
# diffusers writes the last layer's modulation as scale and shift, the official files as shift and
# scale. A converter that forgets to swap the halves gives weights that load without complaint.

# %%
broken = copy.deepcopy(model)
modulation = broken.final_layer.adaLN_modulation[1]
for tensor in (modulation.weight, modulation.bias):
    tensor.copy_(torch.cat(tensor.chunk(2)[::-1]))

wrong = trace(broken, *inputs)
print(first_difference(right, wrong))


# %% [markdown]
# Below, the difference of every tensor in the order of computation. Up to the culprit there is none
# at all; after it, everything is off: here little is left, since the last layer is the culprit.


# %%
def errors(one, other):
    """Names and relative errors of the tensors of two runs."""
    return [(name, relative(one.tensors[name], other.tensors[name])) for name in one.tensors]


def draw(runs):
    """The errors of some runs against the right one, over the tensors."""
    _, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    for title, run in runs.items():
        found = [max(error, 1e-9) for _, error in errors(right, run)]
        axes.plot(found, label=title, alpha=0.8)
    axes.set(yscale="log", xlabel="tensor, in the order of computation", ylabel="relative error")
    axes.legend(frameon=False)
    plt.show()


draw({"halves of the final modulation swapped": wrong})

# %% [markdown]
# ## Rounding is no bug
#
# The same network in half precision differs everywhere, by a little. So the first difference has a
# tolerance: 1e-5 of a tensor's values, what float32 runs differ by, unless another is given. Here
# float64 is asked for with 1e-3, far above any rounding and far below any bug.

# %%
half = copy.deepcopy(model).bfloat16()
rounded = trace(half, *(tensor.bfloat16() for tensor in inputs))
double = copy.deepcopy(model).double()
exact = trace(double, *(tensor.double() for tensor in inputs))
draw({"bfloat16": rounded, "float64": exact, "the bug": wrong})
print("bfloat16:", first_difference(right, rounded))
print("float64:", first_difference(right, exact, tolerance=1e-3))
assert first_difference(right, exact, tolerance=1e-3) is None


# %% [markdown]
# ## Three bugs
#
# Each function below breaks a copy of the network in a way that has happened to people. **Do not
# read them**: trace the broken networks, and say what is wrong in each.


# %% jupyter={"source_hidden": true}
def bug_1(network):
    """Break it."""
    table = network.pos_embed.unflatten(1, (network.config.grid, -1))
    network.pos_embed.copy_(table.transpose(1, 2).flatten(1, 2))


def bug_2(network):
    """Break it."""
    stream = network.joint_blocks[1].x_block
    keys = stream.attn.qkv.weight
    queries, keys, values = keys.chunk(3)
    stream.attn.qkv.weight.copy_(torch.cat([keys, queries, values]))


def bug_3(network):
    """Break it."""
    stream = network.joint_blocks[2].context_block
    stream.mlp.act = torch.nn.GELU()


def planted(plant):
    """The trace of a copy of the network that has been broken."""
    network = copy.deepcopy(model)
    plant(network)
    return trace(network, *inputs)


# %% [markdown]
# ## Exercise 1
#
# `first_difference(right, planted(bug_1))` names a tensor that goes *into* something. What was
# added to the patches just before? (A picture of it may help.)

# %% jupyter={"source_hidden": true}
# answer: the positions: rows and columns of the table were exchanged
found = first_difference(right, planted(bug_1))
print(found)
assert found.name == "joint_blocks.0.in.image"
assert right.tensors["x_embedder.proj.out"].equal(planted(bug_1).tensors["x_embedder.proj.out"])

# %% [markdown]
# ## Exercise 2
#
# In `bug_2` a layer's input agrees and its output does not: the weights are to blame. Look at the
# three thirds of the output, the queries, keys and values. Which is which?

# %% jupyter={"source_hidden": true}
# answer: weights of queries and keys were exchanged (their biases were not)
run = planted(bug_2)
found = first_difference(right, run)
print(found)
assert found.name == "joint_blocks.1.x_block.attn.qkv.out"
bias = model.joint_blocks[1].x_block.attn.qkv.bias
ours, theirs = (side.tensors[found.name] - bias for side in (right, run))
(q, k, v), (q_, k_, v_) = ours.chunk(3, dim=-1), theirs.chunk(3, dim=-1)
torch.testing.assert_close((q, k, v), (k_, q_, v_), rtol=1e-3, atol=1e-4)

# %% [markdown]
# ## Exercise 3
#
# `bug_3` is small, and close to what rounding does. Between which two tensors does it lie, and what
# stands there? Is its error larger or smaller than bfloat16's at the same tensor?
#
# Two runs of one network in one precision agree to the last bit, so you may ask with a tolerance
# far below that of rounding.

# %% jupyter={"source_hidden": true}
# answer: between fc1 and fc2 of a text MLP: GELU by its exact formula, and not tanh's approximation
run = planted(bug_3)
found = first_difference(right, run, tolerance=1e-7)
print(found)
assert found.name == "joint_blocks.2.context_block.mlp.fc2.in"
draw({"exact GELU": run, "bfloat16": rounded})
torch.testing.assert_close(
    run.tensors[found.name],
    torch.nn.functional.gelu(right.tensors["joint_blocks.2.context_block.mlp.fc1.out"]),
)
name = "joint_blocks.2.context_block.mlp.fc2.in"
assert found.error < relative(right.tensors[name], rounded.tensors[name])
