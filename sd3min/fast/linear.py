"""Linear layers in forms that are made once, when the weights are read."""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """Weights in the order in which oneDNN's product wants them, in bfloat16 on a CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(linear: nn.Linear) -> nn.Module:
    """The layer, packed where that is for something."""
    weight = linear.weight
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return PackedLinear(linear) if fits else linear
