"""One side of tools/bench.py: a process that holds one implementation and times what it is told.

It reads a line of JSON for each piece of work, does it once, and answers with the seconds of the
clock and of the processor, and the most bytes that were resident meanwhile, mapped pages counted.
Weights are random, of official width, and the same for nobody: only their shapes decide the time.
"""

import json
import os
import re
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sd3min.autoencoder import Autoencoder
from sd3min.config import CLIP_G, CLIP_L, HEAD_WIDTH, AutoencoderConfig, MMDiTConfig
from sd3min.fast.decoder import FastDecoder
from sd3min.fast.linear import Int8Linear, packed
from sd3min.fast.mapped import mapped_network
from sd3min.fast.mmdit import FastMMDiT
from sd3min.mmdit import MMDiT
from sd3min.parts import MODULES, PREFIXES, Part
from sd3min.stored import read_header
from sd3min.text_encoders import Conditioning
from sd3min.writer import Lazy, header, write_tensors

TYPE = torch.bfloat16
HEADS, CLIP_ROWS, T5_ROWS = 24, 77, 256
WIDTHS = (128, 256, 512, 512)
Shapes = dict[str, list[int]]


class Spent(NamedTuple):
    """Seconds of the clock and of the processor."""

    clock: float
    processor: float


Work = Callable[[], Any]  # which may say itself what it spent on what was asked


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


def shapes(module: nn.Module, prefix: str = "") -> Shapes:
    """Of every tensor."""
    return {prefix + name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def wide(depth: int) -> nn.Module:
    """The network of a depth on the meta device."""
    with torch.device("meta"):
        return MMDiT(Wide(depth))


class WidePart(Part):
    """The network in a file, of any depth."""

    @property
    def config(self) -> Wide:
        """Its sizes."""
        return Wide(sum(name.endswith("x_block.attn.qkv.weight") for name in self.tensors))


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

    def run(self, size: int, steps: int) -> Work:
        """All steps of a guided picture, with what is done once before them."""
        step = self.step(size)

        def work() -> None:
            for _ in range(steps):
                step()

        return work


class Plain(Side):
    """sd3min as it is read."""

    def step(self, size: int, batch: int = 1, zeros: bool = False) -> Work:
        """As above."""
        network = self.made(filled(wide(self.depth)))
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
        latents, text = self.inputs(size, batch, zeros)
        run = self.network().prepare(text, torch.tensor([1000.0, 700.0]))
        return lambda: run(latents, 1)

    def run(self, size: int, steps: int) -> Work:
        """As above; modulation and text are made for all steps at once."""
        latents, text = self.inputs(size, 1, zeros=False)
        network, times = self.network(), torch.linspace(1000, 1000 / steps, steps)

        def work() -> None:
            run = network.prepare(text, times)
            for i in range(steps):
                run(latents, i)

        return work

    def network(self) -> FastMMDiT:
        """The network for runs."""
        sizes = shapes(wide(self.depth))
        return FastMMDiT(Wide(self.depth), lambda name: random(*sizes[name]), self.make)

    def decode(self, size: int) -> Work:
        """As above."""
        with torch.device("meta"):
            decoder = Autoencoder(AutoencoderConfig(WIDTHS, 2)).decoder
        return partial(FastDecoder(filled(decoder)), random(1, 16, size // 8, size // 8))


class Int8(Fast):
    """The same with linear layers of 8 bits."""

    make = staticmethod(Int8Linear)


class Stream(Fast):
    """The same, whose weights stay in a file of float16, as the official one of SD3-medium is."""

    def network(self) -> FastMMDiT:
        """As above."""
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "mmdit.safetensors"
        lazy = {
            name: Lazy(shape, "F16", partial(lambda shape: random(*shape).half(), shape))
            for name, shape in shapes(wide(self.depth)).items()
        }
        write_tensors(path, lazy, {})
        stored, _ = read_header(path)
        return mapped_network(WidePart("mmdit", path, {one.name: one for one in stored}), TYPE)


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


class StableDiffusionCpp(Side):
    """stable-diffusion.cpp by cyllama, in float16, of SD3-medium alone and without T5.

    A step is timed between its own reports of progress: what it does around them is left out. It
    takes a width of 64 times the depth, and so the whole depth alone. It is not asked to log, since
    its threads that load would wait for Python's lock for ever.
    """

    def step(self, size: int, batch: int = 1, zeros: bool = False) -> Work:
        """As above, of zeros as weights: nothing in it is sparse."""
        from cyllama import sd

        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "sd3.safetensors"
        lazy = {name: Lazy(shape, "F16", torch.Tensor) for name, shape in self.tensors().items()}
        head = header(lazy, {})
        path.write_bytes(head)
        with path.open("r+b") as file:
            file.truncate(len(head) + sum(tensor.bytes for tensor in lazy.values()))
        params = sd.SDContextParams(model_path=str(path), n_threads=torch.get_num_threads())
        params.free_params_immediately = False  # there is more than one picture
        context = sd.SDContext(params)
        times: list[Spent] = []
        sd.set_progress_callback(lambda *_: times.append(now()))

        def work() -> Spent:
            times.clear()
            call = {"width": size, "height": size, "sample_steps": 2, "cfg_scale": 4.0}
            context.generate("a cat", batch_count=batch, **call)
            return Spent(*(b - a for a, b in zip(*times[-2:], strict=True)))

        return work

    def decode(self, size: int) -> Work:
        """Not timed apart."""
        raise ValueError("stable-diffusion.cpp reports steps alone")

    def tensors(self) -> Shapes:
        """Names and shapes of an official file."""
        with torch.device("meta"):
            modules = {
                "mmdit": wide(self.depth),
                "autoencoder": Autoencoder(AutoencoderConfig(WIDTHS, 2)),
                "clip_l": MODULES["clip_l"](CLIP_L),
                "clip_g": MODULES["clip_g"](CLIP_G),
            }
        found = [shapes(module, PREFIXES[name]) for name, module in modules.items()]
        return {name: shape for part in found for name, shape in part.items()}


SIDES = {
    "diffusers": Diffusers,
    "plain": Plain,
    "fast": Fast,
    "int8": Int8,
    "stream": Stream,
    "plain, compiled": Compiled,
    "diffusers, channels last": DiffusersLaidOut,
    "diffusers, compiled": DiffusersCompiled,
    "OpenVINO": OpenVINO,
    "stable-diffusion.cpp": StableDiffusionCpp,
}


def now() -> Spent:
    """Seconds that have passed, and that were computed."""
    return Spent(time.perf_counter(), time.process_time())


def resident() -> int:
    """Most bytes that were resident since the last time that this was asked; 0 beside Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return int(found[1]) << 10 if found else 0


@torch.no_grad()
def main() -> None:
    """Answer every line; a new piece of work replaces the one before."""
    name, depth, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print is no answer
    side, held, work = SIDES[name](depth), None, None
    for line in sys.stdin:
        asked = json.loads(line)
        resident()
        began = now()
        if asked != held:
            work = None  # frees the weights of the one before
            kind, arguments = asked
            work, held = getattr(side, kind)(**arguments), asked
            work()  # compiles, and fills caches
            spent = None
        else:
            assert work is not None
            spent = work()
        if not isinstance(spent, Spent):
            spent = Spent(*(b - a for a, b in zip(began, now(), strict=True)))
        print(json.dumps([*spent, resident()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
