"""The networks' sizes, read from tensor shapes.

Paper §4: "we parameterize the size of the model in terms of the model's depth d": the width is
64·d, and d heads of 64 channels attend. What depth does not decide is a field here, and only if two
released models differ in it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HEAD_WIDTH = 64
LATENT_CHANNELS = 16
PATCH = 2
LATENT_DOWNSCALING = 8
SIZE_STEP = PATCH * LATENT_DOWNSCALING  # a picture's sides are multiples of this many pixels

LONGEST_SENTENCE = 1000  # characters of a refusal

Shapes = Mapping[str, Sequence[int]]


class Refusal(ValueError):
    """A call that cannot be carried out: one sentence that names the value and the mend.

    The middle of a very long one, as where a damaged file is quoted, is left out.
    """

    def __init__(self, sentence: str):
        if len(sentence) > LONGEST_SENTENCE:
            half = LONGEST_SENTENCE // 2
            sentence = f"{sentence[:half]} … {sentence[-half:]}"
        super().__init__(sentence)


def count(shapes: Shapes, pattern: str) -> int:
    """Length of a numbered list of modules: how many numbers `pattern` captures."""
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of the multimodal diffusion transformer (paper §4, Fig. 2)."""

    depth: int
    context_width: int = 4096
    pooled_width: int = 2048
    grid: int = 192  # side of the positional table, in patches
    qk_norm: bool = False  # RMSNorm on queries and keys, §5.3.2
    dual_blocks: int = (
        0  # leading blocks whose image stream also attends to itself alone (SD3.5-medium)
    )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return HEAD_WIDTH * self.depth

    @property
    def largest_side(self) -> int:
        """Longest side of a picture that the positional table covers, in pixels."""
        return self.grid * SIZE_STEP

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "MMDiTConfig":
        """Read the sizes from official names and shapes; a missing positional table is 192x192."""
        return cls(
            depth=count(shapes, r"joint_blocks\.(\d+)\."),
            context_width=shapes["context_embedder.weight"][1],
            pooled_width=shapes["y_embedder.mlp.0.weight"][1],
            grid=round(shapes["pos_embed"][1] ** 0.5) if "pos_embed" in shapes else cls.grid,
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
            dual_blocks=count(shapes, r"joint_blocks\.(\d+)\.x_block\.attn2\."),
        )


SD3_MEDIUM = MMDiTConfig(depth=24)
"""Stable Diffusion 3 medium, the paper's recipe at 2,028,328,000 parameters."""

SD3_5_MEDIUM = MMDiTConfig(depth=24, grid=384, qk_norm=True, dual_blocks=13)
"""Stable Diffusion 3.5 medium, 2,243,171,520 parameters: the MMDiT-X variant."""

SD3_5_LARGE = MMDiTConfig(depth=38, qk_norm=True)
"""Stable Diffusion 3.5 large and turbo, 8,056,627,520 parameters: the paper's greatest depth."""

PRESETS = {"SD3-medium": SD3_MEDIUM, "SD3.5-medium": SD3_5_MEDIUM, "SD3.5-large": SD3_5_LARGE}


def released_name(config: MMDiTConfig) -> str:
    """The name of the released model of these sizes, or nothing."""
    return next((name for name, preset in PRESETS.items() if preset == config), "")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder (paper §5.2.1); the official ones give 83,819,683 parameters."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level, full resolution first
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "AutoencoderConfig":
        """Read the sizes from official tensor names and shapes."""
        levels = count(shapes, r"encoder\.down\.(\d+)\.")
        widths = (
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)
        )
        return cls(tuple(widths), count(shapes, r"encoder\.down\.0\.block\.(\d+)\."))


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text encoder; heads are 64 wide."""

    layers: int
    width: int
    mlp_width: int
    vocabulary: int = 49408
    length: int = 77  # rows of the position table, and so of the context

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "CLIPConfig":
        """Read the sizes from the names and shapes of transformers' CLIPTextModelWithProjection."""
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        return cls(
            layers=count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
            width=width,
            mlp_width=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            vocabulary=vocabulary,
            length=shapes["text_model.embeddings.position_embedding.weight"][0],
        )


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; heads are 64 wide."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    vocabulary: int = 32128
    distances: int = 32  # buckets of the relative position bias

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "T5Config":
        """Read the sizes from the names and shapes of transformers' T5EncoderModel."""
        bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
        return cls(
            layers=count(shapes, r"encoder\.block\.(\d+)\."),
            width=shapes[embedding][1],
            mlp_width=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            heads=shapes[bias][1],
            vocabulary=shapes[embedding][0],
            distances=shapes[bias][0],
        )


CLIP_L = CLIPConfig(layers=12, width=768, mlp_width=3072)
"""OpenAI's CLIP ViT-L/14 text encoder."""

CLIP_G = CLIPConfig(layers=32, width=1280, mlp_width=5120)
"""OpenCLIP's ViT-bigG/14 text encoder, 694,659,840 parameters."""

T5_XXL = T5Config(layers=24, width=4096, mlp_width=10240, heads=64)
"""The encoder of T5 v1.1 XXL, 4,762,310,656 parameters."""


@dataclass(frozen=True)
class Defaults:
    """Settings of a picture where a call leaves them open; a file's metadata may hold its own."""

    width: int = 1024  # pixels
    height: int = 1024
    steps: int = 28
    guidance_scale: float = 7.0
    shift: float = 3.0
    t5_length: int = 256  # rows that T5 adds to the context
