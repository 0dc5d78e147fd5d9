"""A diffusers folder around its weights: which class reads each part, and with which config.

The configs say in diffusers' and transformers' words what the shapes of the tensors tell. One says
more, and is read: the scheduler's, which has the shift.
"""

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sd3min.autoencoder import SCALE, SHIFT
from sd3min.config import (
    HEAD_WIDTH,
    LATENT_CHANNELS,
    LATENT_DOWNSCALING,
    PATCH,
    AutoencoderConfig,
    Defaults,
    MMDiTConfig,
    Refusal,
)
from sd3min.flow import TRAINED_TIMES
from sd3min.parts import Part
from sd3min.settings import is_number

GB = 1_000_000_000
VERSION = "0.42.1"  # of the diffusers whose words these are


class Component(NamedTuple):
    """A part's place in a diffusers folder."""

    folder: str
    package: str
    kind: str  # the class that reads it
    tokenizer: tuple[str, str] | None = None  # folder and class

    @property
    def stem(self) -> str:
        """How the names of its weights begin."""
        return "diffusion_pytorch_model" if self.package == "diffusers" else "model"

    @property
    def shard(self) -> int:
        """Bytes above which the released folders are split."""
        return (10 if self.package == "diffusers" else 5) * GB


CLIP = "CLIPTextModelWithProjection"
COMPONENTS = {
    "mmdit": Component("transformer", "diffusers", "SD3Transformer2DModel"),
    "autoencoder": Component("vae", "diffusers", "AutoencoderKL"),
    "clip_l": Component("text_encoder", "transformers", CLIP, ("tokenizer", "CLIPTokenizer")),
    "clip_g": Component("text_encoder_2", "transformers", CLIP, ("tokenizer_2", "CLIPTokenizer")),
    "t5": Component(
        "text_encoder_3", "transformers", "T5EncoderModel", ("tokenizer_3", "T5Tokenizer")
    ),
}
ABSENT = [None, None]
SCHEDULER = "scheduler/scheduler_config.json"
KIND = "FlowMatchEulerDiscreteScheduler"
USUAL = {  # what decides its times besides the shift, as the released folders have it
    "_class_name": KIND,
    "num_train_timesteps": TRAINED_TIMES,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


def model_index(parts: Iterable[str]) -> dict[str, Any]:
    """What the folder holds, and the pipeline that it makes."""
    held = set(parts)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": VERSION,
        "feature_extractor": ABSENT,
        "image_encoder": ABSENT,
        "scheduler": ["diffusers", KIND],
    }
    for part, component in COMPONENTS.items():
        index[component.folder] = [component.package, component.kind] if part in held else ABSENT
        if component.tokenizer:
            folder, kind = component.tokenizer
            index[folder] = [component.package, kind] if part in held else ABSENT
    return index


def scheduler_config(defaults: Defaults) -> dict[str, Any]:
    """The schedule of the paper's recipe, with the weights' shift (§5.3.2, Eq. 23)."""
    return {
        "_class_name": KIND,
        "_diffusers_version": VERSION,
        "num_train_timesteps": TRAINED_TIMES,
        "shift": defaults.shift,
    }


def read_shift(folder: Path) -> float | None:
    """The shift of a folder's scheduler: 1 where its config names none, as in diffusers, and None
    where there is no scheduler.

    A config that asks for other times than a fixed shift makes is a warning.
    """
    path = folder / SCHEDULER
    if not os.path.lexists(path):
        return None
    try:
        config = json.loads(path.read_bytes())
        shift = config.get("shift", 1.0)
    except (AttributeError, OSError, RecursionError, ValueError):
        raise Refusal(f"{path} cannot be read: copy or download it again") from None
    if isinstance(shift, bool) or not is_number(shift, 0.001, 1000):
        raise Refusal(f"{path} has the shift {shift!r}, not a number from 0.001 to 1000: mend it")
    unusual = [
        f"{name} {config[name]}" for name in USUAL if config.get(name, USUAL[name]) != USUAL[name]
    ]
    if unusual:
        instead = f"pictures are made with the fixed shift {shift} unless another is passed"
        warnings.warn(f"{path} asks for {', '.join(unusual)}: {instead}", stacklevel=3)
    return float(shift)


def component_config(part: Part, defaults: Defaults) -> dict[str, Any]:
    """The config of one part; the text encoders are transformers' own and know theirs."""
    kind = COMPONENTS[part.name].kind
    module: Any = part.skeleton()
    if COMPONENTS[part.name].package == "transformers":
        return json.loads(module.config.to_json_string()) | {"architectures": [kind]}
    settings = mmdit_config if part.name == "mmdit" else autoencoder_config
    named = {"_class_name": kind, "_diffusers_version": VERSION}
    return named | settings(part.config, defaults)


def mmdit_config(config: MMDiTConfig, defaults: Defaults) -> dict[str, Any]:
    """The MMDiT in diffusers' words; the size of the latents is that of the default picture."""
    return {
        "sample_size": defaults.width // LATENT_DOWNSCALING,
        "patch_size": PATCH,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": config.depth,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": config.depth,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.grid,
        "dual_attention_layers": list(range(config.dual_blocks)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def autoencoder_config(config: AutoencoderConfig, defaults: Defaults) -> dict[str, Any]:
    """The autoencoder in diffusers' words."""
    levels = len(config.widths)
    return {
        "sample_size": defaults.width,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }
