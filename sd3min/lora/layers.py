"""LoRA (Hu et al. 2021): a weight stays as it is, and a product of two narrow matrices is added.

    W' = W + s·(α/r)·B·A        A [r, inputs], B [rows, r]

Queries, keys and values are rows of one layer here, so that a LoRA of one of them is a LoRA of
some rows. A layer can carry several. In a table of tokens' rows, those are words that are learnt
(textual inversion, Gal et al. 2022). DoRA (Liu et al. 2024, Eq. 5) then scales every row of W' to a
length that is learnt.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class LowRank(nn.Module):
    """A change of some rows of a layer: s·(α/r)·B·A, with A `down` and B `up`."""

    def __init__(
        self,
        down: Float[Tensor, "r i"],
        up: Float[Tensor, "o r"],
        alpha: float,
        rows: slice,
        magnitude: Float[Tensor, "a b"] | None = None,
    ):
        """`rows`: those of the layer that change; `magnitude`: DoRA's lengths of rows [o, 1], or of
        columns [1, i] as some of LyCORIS' files have them.
        """
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha, self.rows, self.scale = alpha, rows, 1.0

    @property
    def rank(self) -> int:
        """The narrow side of both matrices."""
        return len(self.down)

    @property
    def factor(self) -> float:
        """What the product counts: s·α/r."""
        return self.scale * self.alpha / self.rank

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """What is added to the layer's output, in the longer type of x and of A and B."""
        dtype = torch.promote_types(x.dtype, self.down.dtype)
        down, up = self.down.to(dtype), self.up.to(dtype)
        return F.linear(F.linear(x.to(dtype), down), up) * self.factor

    def of_tokens(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... i"]:
        """What is added to the rows of a table that ids pick: those of B·A, or none."""
        own = (ids >= self.rows.start) & (ids < self.rows.stop)
        dtype = torch.promote_types(self.up.dtype, self.down.dtype)
        up, down = self.up.to(dtype), self.down.to(dtype)
        picked = up[(ids - self.rows.start) * own] * own[..., None]
        return (picked @ down) * self.factor

    def delta(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """What is added to the rows of the weight; DoRA's scale s is inside of the norm, as PEFT
        has it, and the norm takes no gradient (§4.3 there).
        """
        down, up = self.down.to(weight), self.up.to(weight)
        product = (up @ down) * self.factor
        if self.magnitude is None:
            return product
        changed, lengths = weight + product, self.magnitude.to(weight)
        along = 1 if lengths.shape[1] == 1 else 0
        return changed * (lengths / changed.norm(dim=along, keepdim=True).detach()) - weight


def changed(weight: Tensor, changes: Iterable[LowRank]) -> Tensor:
    """A weight with all its changes, each made of the weight as it was, rounded once to its type.

    A convolution over patches is a layer of flattened patches.
    """
    base = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    made = base.clone()
    for change in changes:
        made[change.rows] += change.delta(base[change.rows])
    return made.view(weight.shape).to(weight.dtype)


class Adapted(nn.Module, ABC):
    """A layer with changes beside it; its own tensors keep their names."""

    weight: Tensor
    kept: Tensor | None

    def adopt(self) -> None:
        """Begin without a change."""
        self.loras = nn.ModuleList()
        self.register_buffer("kept", None, persistent=False)

    @property
    def changes(self) -> list[LowRank]:
        """The changes in the order in which they came."""
        return [change for change in self.loras if isinstance(change, LowRank)]

    def merge(self) -> None:
        """Put the changes into the weight, and keep it as it was."""
        if self.kept is None:
            self.kept = self.weight.data
            self.weight.data = changed(self.weight.data, self.changes).detach()

    def unmerge(self) -> None:
        """The weight as it was, bit for bit."""
        if self.kept is not None:
            self.weight.data, self.kept = self.kept, None

    @abstractmethod
    def plain(self) -> nn.Module:
        """The layer as it is, without what is beside it."""


class LoRALinear(Adapted, nn.Linear):
    """A linear layer with changes beside it."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adopt()

    def forward(self, input: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """The layer's output and every change's; with DoRA, that of the changed weight."""
        if any(change.magnitude is not None for change in self.changes) and self.kept is None:
            return F.linear(input, changed(self.weight, self.changes), self.bias)
        output = super().forward(input)
        if self.kept is None:
            for change in self.changes:
                around = change.rows.start, self.out_features - change.rows.stop
                output = output + F.pad(change(input).to(output.dtype), around)
        return output

    def plain(self) -> nn.Linear:
        """The layer as it is, without what is beside it."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


class LoRAEmbedding(Adapted, nn.Embedding):
    """A table of tokens' rows with changes beside it."""

    def __init__(self, table: nn.Embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.weight = table.weight
        self.adopt()

    def forward(self, input: Int[Tensor, "..."]) -> Float[Tensor, "... o"]:
        """The rows of ids, with every change's."""
        output = F.embedding(input, self.weight)
        if self.kept is None:
            for change in self.changes:
                output = output + change.of_tokens(input).to(output.dtype)
        return output

    def plain(self) -> nn.Embedding:
        """The table as it is, without what is beside it."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=self.weight)
