"""The same weights in diffusers: its modules, built on the meta device and given our own tensors.

Nothing is copied where the table of names can do without: a twin and the module that it was made of
share their storage. This module and `verify`, which imports it, need diffusers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from sd3min import formats
from sd3min.autoencoder import Autoencoder
from sd3min.config import HEAD_WIDTH, LATENT_CHANNELS, PATCH
from sd3min.mmdit import MMDiT
from sd3min.parts import fill
from sd3min.text_encoders import TextEncoders


def transformer(mmdit: MMDiT) -> SD3Transformer2DModel:
    """diffusers' MMDiT."""
    config = mmdit.config
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=config.grid * PATCH,
            patch_size=PATCH,
            in_channels=LATENT_CHANNELS,
            num_layers=config.depth,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=config.width // HEAD_WIDTH,
            joint_attention_dim=config.context_width,
            caption_projection_dim=config.width,
            pooled_projection_dim=config.pooled_width,
            out_channels=LATENT_CHANNELS,
            pos_embed_max_size=config.grid,
            dual_attention_layers=tuple(range(config.dual_blocks)),
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    return fill(model, formats.to_diffusers(mmdit.state_dict(), config))


def vae(autoencoder: Autoencoder) -> AutoencoderKL:
    """diffusers' autoencoder, with the settings of the official `vae/config.json`."""
    config = autoencoder.config
    levels = len(config.widths)
    with torch.device("meta"):
        model = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=32,
            scaling_factor=1.5305,  # of the official vae/config.json, and not from our own module
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return fill(model, formats.to_diffusers(autoencoder.state_dict(), config))


def clip(
    ours: CLIPTextModelWithProjection, activation: str, projection: Tensor | None = None
) -> CLIPTextModelWithProjection:
    """A CLIP with the settings of the official `text_encoder/config.json`.

    `projection`: CLIP-L's where a folder has one, else the identity of diffusers' release.
    """
    config = transformers.CLIPTextConfig(
        vocab_size=ours.config.vocab_size,
        hidden_size=ours.config.hidden_size,
        intermediate_size=ours.config.intermediate_size,
        num_hidden_layers=ours.config.num_hidden_layers,
        num_attention_heads=ours.config.hidden_size // HEAD_WIDTH,
        max_position_embeddings=ours.config.max_position_embeddings,
        projection_dim=ours.config.hidden_size,
        hidden_act=activation,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    state = dict(ours.state_dict())
    if activation == "quick_gelu":
        projection = torch.eye(config.hidden_size) if projection is None else projection
        state["text_projection.weight"] = projection.to(ours.dtype)
    return fill(model, state)


def t5(ours: T5EncoderModel) -> T5EncoderModel:
    """A T5 encoder with the settings of the official `text_encoder_3/config.json`."""
    config = transformers.T5Config(
        vocab_size=ours.config.vocab_size,
        d_model=ours.config.d_model,
        d_kv=HEAD_WIDTH,
        d_ff=ours.config.d_ff,
        num_layers=ours.config.num_layers,
        num_heads=ours.config.num_heads,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
        model.encoder.embed_tokens = model.shared
    return fill(model, ours.state_dict())


def sigmas(steps: int, shift: float) -> Tensor:
    """The times of a run, by diffusers' scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return torch.as_tensor(scheduler.sigmas)


def pipeline(
    encoders: TextEncoders,
    mmdit: MMDiT | None = None,
    autoencoder: Autoencoder | None = None,
    shift: float = 3.0,
    kind: Any = StableDiffusion3Pipeline,
    projection: Tensor | None = None,
) -> Any:
    """diffusers' pipeline around our weights and tokenizers; without networks it only encodes.

    `projection`: CLIP-L's, if it has one.
    """
    tokenizers: Sequence[PreTrainedTokenizerBase | None] = [*encoders.tokenizers, None][:3]
    pipe = kind(
        transformer=transformer(mmdit) if mmdit else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(autoencoder) if autoencoder else None,
        text_encoder=clip(encoders.clip_l, "quick_gelu", projection),
        tokenizer=tokenizers[0],
        text_encoder_2=clip(encoders.clip_g, "gelu"),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5(encoders.t5) if encoders.t5 else None,
        tokenizer_3=tokenizers[2],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
