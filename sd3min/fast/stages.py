"""A pipeline whose parts are loaded when they are asked for, and freed when the next one is.

The plan of memory is the order in which a picture is made: text encoders, network, autoencoder.
Under "fast" all stay; under "resident" one stays at a time; under "stream" one stays, and of the
encoders and of the network only two layers do. On a GPU the same order moves one part there at a
time, or two layers.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sd3min import flow
from sd3min.autoencoder import Autoencoder
from sd3min.checkpoint import TOKENIZERS, Checkpoint, encoder_names
from sd3min.fast.blocks import FastBlock
from sd3min.fast.decoder import FastDecoder
from sd3min.fast.linear import Int8Linear, packed
from sd3min.fast.mapped import mapped_network
from sd3min.fast.mmdit import FastMMDiT, Run
from sd3min.fast.native import trim
from sd3min.fast.prompts import CachedEncoders
from sd3min.fast.stream import Ahead, Turns, streamed_encoder
from sd3min.fast.t5 import load_t5
from sd3min.fast.tokens import load_tokenizer
from sd3min.parts import Part
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import Conditioning, TextEncoders

MEMORY = ("fast", "resident", "stream")


class Stages:
    """Parts by name, each loaded when it is asked for; one at a time, or all kept."""

    def __init__(self, loaders: Mapping[str, Callable[[], Any]], keep: bool = False):
        self.loaders, self.keep = loaders, keep
        self.held: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        """The part; asking for it ends the stage of another, which nobody should hold any more."""
        if name not in self.held:
            if not self.keep:
                self.free()
            self.held[name] = self.loaders[name]()
        return self.held[name]

    def free(self) -> None:
        """End the stage, and hand its memory back."""
        self.held.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim()


class StagedEncoders(TextEncoders):
    """The text encoders, each a stage of its own."""

    def __init__(self, stages: Stages, opened: Checkpoint, t5: bool):
        nn.Module.__init__(self)
        self.stages, self.left_out = stages, not t5
        self.context_width, self.t5_length = opened.context_width(), opened.defaults.t5_length
        self.tokenizers = [load_tokenizer(opened, name) for name in encoder_names(t5)]

    @property
    def has_t5(self) -> bool:
        """Whether T5 was not left out."""
        return not self.left_out

    def __getattr__(self, name: str) -> Any:
        """An encoder begins its stage."""
        if name == "t5" and self.left_out:
            return None
        return self.stages(name) if name in TOKENIZERS else super().__getattr__(name)


class StagedPipeline(Pipeline):
    """A whole Stable Diffusion 3 within a plan of memory."""

    def __init__(
        self,
        opened: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        t5: bool | str = True,
        memory: str = "resident",
        mmdit: str | None = None,
        cache: str | Path | None = None,
    ):
        """As `loading.load` has them; `cache` is the folder of prompts' embeddings."""
        kept = {"dtype": dtype, "device": device, "t5": t5, "memory": memory, "mmdit": mmdit}
        self.config, self.defaults = opened.parts["mmdit"].config, opened.defaults
        self.weights, self.loras = opened.fingerprint(), opened.loras
        self.device, self.dtype, self.kinds = device, dtype, {}
        self.stages = Stages(loaders(opened, **kept), keep=memory == "fast")
        encoders = partial(StagedEncoders, self.stages, opened, bool(t5))

        @once
        def needed() -> StagedEncoders:
            opened.require(encoder_names(bool(t5)))
            return encoders()

        cached = partial(CachedEncoders.of, opened, dtype=dtype, device=device, t5=t5)
        self.text_encoders: Any = cached(folder=cache, load=needed) if cache else encoders()
        names = [*([] if cache else encoder_names(bool(t5))), "network", "autoencoder"]
        for name in names if memory == "fast" else []:
            self.stages(name)

    def __getattr__(self, name: str) -> Any:
        """The autoencoder, and the plain network where it is asked for, begin their stages."""
        if name in ("mmdit", "autoencoder"):
            return self.stages(name)
        raise AttributeError(f"a pipeline has no {name}")

    def predictor(
        self, text: Conditioning, times: Float[Tensor, " times"], precision: torch.dtype
    ) -> flow.Velocity:
        """The network under a text; between two calls nothing here keeps it in memory."""
        steps = {time.item(): i for i, time in enumerate(times)}
        network = partial(self.stages, "network")

        @once
        def run() -> Run:
            made = network().prepare(text, flow.TRAINED_TIMES * times.to(self.device))
            made.network = network
            return made

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            return run()(latents.to(self.dtype), steps[t.item()]).to(precision)

        return predict


def loaders(
    opened: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    t5: bool | str,
    memory: str,
    mmdit: str | None,
) -> dict[str, Callable[[], Any]]:
    """How each part is loaded under a plan of memory."""
    load = {name: partial(opened.load, name, dtype, device) for name in opened.parts}
    load["autoencoder"] = partial(autoencoder, opened, dtype, device)
    make = Int8Linear if mmdit == "int8" else packed
    load["network"] = partial(network, opened.parts["mmdit"], dtype, device, make)
    if isinstance(t5, str):
        load["t5"] = partial(load_t5, opened.parts["t5"], dtype, device, t5)
    if memory == "stream":
        encoders = [name for name in opened.parts if name in TOKENIZERS]
        load["network"] = partial(streamed_network, opened.parts["mmdit"], dtype, device)
        load |= {
            name: partial(streamed_encoder, opened.parts[name], dtype, device) for name in encoders
        }
    return load


def autoencoder(opened: Checkpoint, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """The autoencoder, which decodes in strips."""
    made = opened.load("autoencoder", dtype, device)
    made.decoder = FastDecoder(made.decoder)
    return made


def network(
    part: Part, dtype: torch.dtype, device: torch.device, make: Callable[[nn.Linear], nn.Module]
) -> FastMMDiT:
    """The MMDiT for runs."""
    read = partial(part.tensor, dtype=dtype, device=device)
    return FastMMDiT(part.config, read, make)


def streamed_network(part: Part, dtype: torch.dtype, device: torch.device) -> FastMMDiT:
    """The MMDiT for runs, read block by block at every step."""
    return mapped_network(part, dtype) if device.type == "cpu" else sent(part, dtype, device)


def sent(part: Part, dtype: torch.dtype, device: torch.device) -> FastMMDiT:
    """The MMDiT for runs, each block of which goes to a GPU while the one before it computes."""

    def ahead(block: Callable[[int], FastBlock], depth: int) -> Ahead[FastBlock]:
        read: Any = weakref.WeakMethod(block)  # or the network would keep itself alive
        return Ahead(lambda i: read()(i), depth, device)

    turns = Turns(part, dtype, device)
    return FastMMDiT(part.config, turns, make=lambda linear: linear, sequence=ahead)
