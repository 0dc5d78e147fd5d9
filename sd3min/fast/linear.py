"""Linear layers in forms that are made once, when the weights are read."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd3min.fast import kernels

SIGNED = torch.cpu._is_amx_tile_supported()  # else oneDNN is quick for activations from 0 to 255


class PackedLinear(nn.Module):
    """Weights in the order in which oneDNN's product wants them, in bfloat16 on a CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def on_cpu(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a tensor is in one of these types on the CPU."""
    return tensor.device.type == "cpu" and tensor.dtype in dtypes


def packed(linear: nn.Linear) -> nn.Module:
    """The layer, packed where that is for something and where this CPU's oneDNN takes it."""
    able = on_cpu(linear.weight, torch.bfloat16) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return PackedLinear(linear) if able else linear


class Int8Linear(nn.Module):
    """Weights and activations of 8 bits, with a scale for each row of either.

    Both are rotated first, W·x = (W·H)·(H·x), so that the few large values that trained networks
    have do not take the others' digits. Products and sums are exact; what is lost is lost in
    rounding the factors to 255 levels.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scales = kernels.quantise(linear.weight.float())
        self.packed = on_cpu(linear.weight, torch.float32, torch.bfloat16)
        if self.packed:
            weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.flatten())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        whole, scales = kernels.quantise(x)
        return kernels.rescale_(self.product(whole, x.dtype), scales, self.bias)

    def product(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of whole numbers by the weights, with their scales, in a type or a longer one;
        128ths keep the sums of float16 within its range.
        """
        if not self.packed:
            sums = F.linear(whole.to(dtype) / 128, self.weight.to(dtype))
            return sums * (128 * self.scales)
        zero = 0 if SIGNED else 128
        whole = whole if SIGNED else whole.view(torch.uint8) ^ 128  # the same, and 128 more
        zeros = torch.zeros_like(self.scales, dtype=torch.int32)
        return torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, zero, self.weight, self.scales, zeros, None, 1.0, 0, dtype, "none", [], ""
        )
