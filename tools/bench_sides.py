"""One side of tools/bench.py: a process that holds one implementation and times what it is told.

It reads a line of JSON for each piece of work, does it once, and answers with the seconds of the
clock and of the processor. Weights are random, of official width, and the same for nobody: only
their shapes decide the time.
"""

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sd3min.autoencoder import Autoencoder
from sd3min.config import HEAD_WIDTH, AutoencoderConfig, MMDiTConfig
from sd3min.fast.decoder import FastDecoder
from sd3min.fast.linear import Int8Linear, packed
from sd3min.fast.mmdit import FastMMDiT
from sd3min.mmdit import MMDiT
from sd3min.text_encoders import Conditioning

TYPE = torch.bfloat16
HEADS, CLIP_ROWS, T5_ROWS = 24, 77, 256
WIDTHS = (128, 256, 512, 512)
Work = Callable[[], Any]


@dataclass(frozen=True)
class Wide(MMDiTConfig):
    """SD3-medium's width at any depth."""

    @property
    def width(self) -> int:
        """Channels of a token."""
        return HEAD_WIDTH * HEADS


def random(*shape: int) -> Tensor:
    """Small random values."""
    return torch.randn(*shape, dtype=TYPE) / 50


def filled(module: nn.Module) -> nn.Module:
    """A module of the meta device with random weights, for inference."""
    module = module.to(TYPE).to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(random(*tensor.shape))
    return module.eval().requires_grad_(False)


class Side(ABC):
    """An implementation: what makes a step of the MMDiT, and what decodes."""

    def __init__(self, depth: int):
        self.depth = depth

    def inputs(self, size: int, batch: int, zeros: bool) -> tuple[Tensor, Conditioning]:
        """Latents of guided pictures, and their text, perhaps without T5."""
        context = random(2 * batch, CLIP_ROWS + T5_ROWS, 4096)
        if zeros:
            context[:, CLIP_ROWS:] = 0
        return random(2 * batch, 16, size // 8, size // 8), Conditioning(
            context, random(2 * batch, 2048)
        )

    @abstractmethod
    def step(self, size: int, batch: int = 1, zeros: bool = False) -> Work:
        """A guided step at a size."""

    @abstractmethod
    def decode(self, size: int) -> Work:
        """The decoding of a picture."""


class Plain(Side):
    """sd3min as it is read."""

    def step(self, size: int, batch: int = 1, zeros: bool = False) -> Work:
        """As above."""
        with torch.device("meta"):
            network = MMDiT(Wide(self.depth))
        network = self.made(filled(network))
        latents, text = self.inputs(size, batch, zeros)
        return lambda: network(latents, torch.full((len(latents),), 700.0), *text)

    def decode(self, size: int) -> Work:
        """As above."""
        with torch.device("meta"):
            decoder = Autoencoder(AutoencoderConfig(WIDTHS, 2)).decoder
        decoder = self.made(filled(decoder))
        return partial(decoder, random(1, 16, size // 8, size // 8))

    def made(self, module: nn.Module) -> nn.Module:
        """What is done to the plain module."""
        return module


class Compiled(Plain):
    """sd3min through torch.compile."""

    def made(self, module: nn.Module) -> nn.Module:
        """As above."""
        module.compile(fullgraph=True)
        return module


class Fast(Side):
    """sd3min with all that is equal to the plain path."""

    make = staticmethod(packed)

    def step(self, size: int, batch: int = 1, zeros: bool = False) -> Work:
        """As above."""
        with torch.device("meta"):
            shapes = {
                name: tensor.shape for name, tensor in MMDiT(Wide(self.depth)).state_dict().items()
            }
        network = FastMMDiT(Wide(self.depth), lambda name: random(*shapes[name]), self.make)
        latents, text = self.inputs(size, batch, zeros)
        run = network.prepare(text, torch.tensor([1000.0, 700.0]))
        return lambda: run(latents, 1)

    def decode(self, size: int) -> Work:
        """As above."""
        with torch.device("meta"):
            decoder = Autoencoder(AutoencoderConfig(WIDTHS, 2)).decoder
        return partial(FastDecoder(filled(decoder)), random(1, 16, size // 8, size // 8))


class Int8(Fast):
    """The same with linear layers of 8 bits."""

    make = staticmethod(Int8Linear)


class Diffusers(Side):
    """diffusers as it comes."""

    def step(self, size: int, batch: int = 1, zeros: bool = False) -> Work:
        """As above."""
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            network = SD3Transformer2DModel(
                sample_size=128,
                num_layers=self.depth,
                num_attention_heads=HEADS,
                caption_projection_dim=HEADS * HEAD_WIDTH,
                joint_attention_dim=4096,
                pooled_projection_dim=2048,
                out_channels=16,
                pos_embed_max_size=192,
            )
        network = self.made(filled(network))
        latents, text = self.inputs(size, batch, zeros)
        times = torch.full((len(latents),), 700.0)
        return lambda: network(latents, *text, times, return_dict=False)

    def decode(self, size: int) -> Work:
        """As above."""
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            autoencoder = AutoencoderKL(
                block_out_channels=WIDTHS,
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        decoder = self.made(filled(autoencoder.decoder))
        return partial(decoder, random(1, 16, size // 8, size // 8))

    def made(self, module: nn.Module) -> nn.Module:
        """What is done to the module."""
        return module


class DiffusersLaidOut(Diffusers):
    """diffusers with its convolutions' weights channels last, as its guide has it."""

    def made(self, module: nn.Module) -> nn.Module:
        """As above."""
        return module.to(memory_format=torch.channels_last)


class DiffusersCompiled(Diffusers):
    """diffusers through torch.compile."""

    def made(self, module: nn.Module) -> nn.Module:
        """As above."""
        module.compile()
        return module


class OpenVINO(Diffusers):
    """diffusers' networks converted to OpenVINO, in bfloat16."""

    def step(self, size: int, batch: int = 1, zeros: bool = False) -> Work:
        """As above."""
        import openvino
        import openvino.preprocess

        self.network: nn.Module | None = None
        super().step(size, batch, zeros)
        latents, text = self.inputs(size, batch, zeros)
        example = {"hidden_states": latents, "encoder_hidden_states": text.context}
        example |= {
            "pooled_projections": text.pooled,
            "timestep": torch.full((len(latents),), 700.0),
        }
        model = openvino.convert_model(self.network, example_input=example)
        inputs = openvino.preprocess.PrePostProcessor(model)
        for place in range(len(example)):  # numpy has no bfloat16
            inputs.input(place).tensor().set_element_type(openvino.Type.f32)
        model = inputs.build()
        hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.compile_model(model, "CPU", hints)
        self.network = None
        arrays = [tensor.float().numpy() for tensor in example.values()]
        return lambda: compiled(arrays)

    def made(self, module: nn.Module) -> nn.Module:
        """The module, which is kept for its conversion."""
        self.network = module
        return module


SIDES = {
    "diffusers": Diffusers,
    "plain": Plain,
    "fast": Fast,
    "int8": Int8,
    "plain, compiled": Compiled,
    "diffusers, channels last": DiffusersLaidOut,
    "diffusers, compiled": DiffusersCompiled,
    "OpenVINO": OpenVINO,
}


@torch.no_grad()
def main() -> None:
    """Answer every line; a new piece of work replaces the one before."""
    name, depth, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side, held, work = SIDES[name](depth), None, None
    for line in sys.stdin:
        asked = json.loads(line)
        began, busy = time.perf_counter(), time.process_time()
        if asked != held:
            work = None  # frees the weights of the one before
            kind, arguments = asked
            work, held = getattr(side, kind)(**arguments), asked
            work()  # compiles, and fills caches
        else:
            assert work is not None
            work()
        seconds = time.perf_counter() - began, time.process_time() - busy
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
