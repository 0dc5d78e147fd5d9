"""What LoRA files call a layer: every dialect's name for it, and the rows that it means.

The official files and diffusers name layers differently (see `formats`), and dialects put a prefix
before either, some with dots and some with underscores.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sd3min.config import MMDiTConfig, Shapes, count
from sd3min.formats import mmdit_rows

TABLE = "token_embedding"  # of CLIP, the rows of its tokens
EMBEDDINGS = ("position_embedding", "shared", "embed_tokens", "relative_attention_bias")
ENCODERS = ("clip_l", "clip_g", "t5")

Moved = Callable[[Tensor], Tensor]


def as_is(tensor: Tensor) -> Tensor:
    """Rows that are in the same order in both."""
    return tensor


@dataclass(frozen=True)
class Layer:
    """A layer that a LoRA can change: its official name, and diffusers' in its place."""

    part: str
    name: str
    height: int  # rows of its weight
    width: int  # inputs, of a convolution those of a patch
    convolution: bool
    pieces: tuple[str, ...]  # what diffusers calls its rows, one below the other
    there: Moved  # rows of the official layer to diffusers', and back
    back: Moved

    @property
    def table(self) -> bool:
        """Whether it has a row for each token, and no inputs."""
        return self.name.endswith(TABLE)

    @property
    def whole(self) -> slice:
        """All rows."""
        return slice(0, self.height)

    def rows(self, piece: str) -> slice:
        """The rows that diffusers knows by a name."""
        height = self.height // len(self.pieces)
        first = height * self.pieces.index(piece)
        return slice(first, first + height)


def layers(part: str, shapes: Shapes) -> list[Layer]:
    """The layers of a part, told by the official names and shapes of its tensors; of CLIP, the
    table of tokens among them.
    """
    sizes = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1 and not is_embedding(name)
    }

    def layer(
        name: str, pieces: tuple[str, ...], there: Moved = as_is, back: Moved = as_is
    ) -> Layer:
        height, *inputs = sizes[name]
        return Layer(part, name, height, math.prod(inputs), len(inputs) > 1, pieces, there, back)

    if part != "mmdit":
        return [layer(name, (name,)) for name in sizes] if part in ENCODERS else []
    rows = mmdit_rows(MMDiTConfig(count(shapes, r"joint_blocks\.(\d+)\.")))
    return [layer(*row) for row in rows if row.official in sizes]


def is_embedding(name: str) -> bool:
    """Whether a tensor is a table of rows, for all but CLIP's tokens, and no layer."""
    return name.split(".")[-2].endswith(EMBEDDINGS)


class Dialect(NamedTuple):
    """How one kind of file names layers: a prefix for each part, and whose names follow."""

    title: str
    starts: Mapping[str, str]
    official: bool  # or diffusers'
    dots: bool = True  # or underscores in their place

    def stems(self, layer: Layer) -> Iterator[tuple[str, slice]]:
        """The names of a layer, and the rows of it that each means."""
        if layer.part not in self.starts:
            return
        whole = self.official or len(layer.pieces) == 1
        for name in (layer.name,) if self.official else layer.pieces:
            written = name if self.dots else name.replace(".", "_")
            yield self.starts[layer.part] + written, layer.whole if whole else layer.rows(name)


PEFT = Dialect("PEFT", {"mmdit": "base_model.model."}, official=False)
DIFFUSERS = Dialect(
    "diffusers",
    {"mmdit": "transformer.", "clip_l": "text_encoder.", "clip_g": "text_encoder_2."}
    | {"t5": "text_encoder_3."},
    official=False,
)
TEXT = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}
KOHYA = Dialect("kohya", {"mmdit": "lora_unet_"} | TEXT, official=True, dots=False)
DIALECTS = (  # that come first where a name could be of two
    DIFFUSERS,
    KOHYA,
    Dialect(
        "ComfyUI",
        {"mmdit": "diffusion_model."}
        | {"clip_l": "text_encoders.clip_l.transformer."}
        | {"clip_g": "text_encoders.clip_g.transformer."}
        | {"t5": "text_encoders.t5xxl.transformer."},
        official=True,
    ),
    Dialect("OneTrainer", {"mmdit": "lora_transformer_"}, official=False, dots=False),
    Dialect("LyCORIS", {"mmdit": "lora_unet_"}, official=False, dots=False),
    PEFT,
)
KINDS = {  # how the name of a tensor ends, and what it is of its layer
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_embedding_A": "up",
    ".lora_embedding_B": "down",
    ".lora_embedding_A.default": "up",
    ".lora_embedding_B.default": "down",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".dora_scale": "magnitude",
}
LYING = "lora_embedding_"  # in the names of tensors that lie on their side: B is A's transpose
STRANGERS = {  # what a file is that holds such names
    "lokr_": "LoKr, which is not read",
    "hada_": "LoHa, which is not read",
    "oft_": "OFT, which is not read",
    ".diff.": "whole differences, which are not read",
    "double_blocks": "a LoRA of Flux",
    "single_transformer_blocks": "a LoRA of Flux",
    "input_blocks": "a LoRA of Stable Diffusion 1, 2 or XL",
    "down_blocks": "a LoRA of Stable Diffusion 1, 2 or XL",
    "controlnet": "a ControlNet",
    "model.diffusion_model.": "weights of a whole model",
}


class Place(NamedTuple):
    """What a name in a file means: rows of a layer, in one dialect."""

    dialect: Dialect
    layer: Layer
    rows: slice


def places(parts: Mapping[str, Shapes]) -> dict[str, Place]:
    """Every dialect's name for every layer of these parts, told by their shapes."""
    found: dict[str, Place] = {}
    for part, shapes in parts.items():
        for layer in layers(part, shapes):
            for dialect in DIALECTS:
                for stem, rows in dialect.stems(layer):
                    found.setdefault(stem, Place(dialect, layer, rows))
    return found


def split(name: str) -> tuple[str, str]:
    """The layer that a tensor's name begins with, and what it is of it; "" where nothing known."""
    ending = next((end for end in KINDS if name.endswith(end)), "")
    return name.removesuffix(ending), KINDS.get(ending, "")


def prefix(stem: str) -> tuple[Dialect | None, str]:
    """The dialect and the part that a layer's name begins with."""
    for dialect in DIALECTS:
        for part, start in dialect.starts.items():
            if stem.startswith(start):
                return dialect, part
    return None, ""
