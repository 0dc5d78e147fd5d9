"""The same weights in diffusers: our small random modules, converted by the project's own table."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models import normalization
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from sd3min import formats
from sd3min.autoencoder import Autoencoder
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline

RUNG_1 = 1e-10  # float64, relative
RUNG_1_QK_NORM = 1e-6  # diffusers takes the variance of queries and keys in float32


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |a − b| / max |b|."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def transformer(mmdit: MMDiT) -> SD3Transformer2DModel:
    config = mmdit.config
    model = SD3Transformer2DModel(
        sample_size=config.grid * 2,
        patch_size=2,
        in_channels=16,
        num_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=config.depth,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        out_channels=16,
        pos_embed_max_size=config.grid,
        dual_attention_layers=tuple(range(config.dual_blocks)),
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    model.load_state_dict(formats.to_diffusers(mmdit.state_dict(), config))
    return model.to(mmdit.pos_embed.dtype).eval()


def inputs(mmdit: MMDiT, batch: int = 3, h: int = 6, w: int = 10, seed: int = 7) -> tuple:
    """Random latents, timesteps, context and pooled vector in float64."""
    generator = torch.Generator().manual_seed(seed)
    config, options = mmdit.config, {"generator": generator, "dtype": torch.float64}
    return (
        torch.randn(batch, 16, h, w, **options),
        torch.tensor([999.9, 512.3, 8.9])[:batch],
        torch.randn(batch, 5, config.context_width, **options),
        torch.randn(batch, config.pooled_width, **options),
    )


def velocity(model: SD3Transformer2DModel, latents, timesteps, context, pooled) -> torch.Tensor:
    """diffusers' velocity for the same arguments in our order."""
    return model(latents, context, pooled, timesteps, return_dict=False)[0]


def with_exact_norms(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The same model with PyTorch's RMSNorm on queries and keys, which keeps float64's digits."""
    for attention in model.modules():
        for name, child in list(attention.named_children()):
            if isinstance(child, normalization.RMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.eps, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(attention, name, norm)
    return model


def vae(autoencoder: Autoencoder) -> AutoencoderKL:
    config = autoencoder.config
    levels = len(config.widths)
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        latent_channels=16,
        norm_num_groups=32,
        scaling_factor=1.5305,  # of the official vae/config.json
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    model.load_state_dict(formats.to_diffusers(autoencoder.state_dict(), config))
    return model.to(autoencoder.decoder.conv_in.weight.dtype).eval()


def clip(ours: CLIPTextModelWithProjection, activation: str) -> CLIPTextModelWithProjection:
    """A CLIP with the settings of the diffusers release's config.json, and our weights."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = CLIPTextConfig(
        **{name: getattr(ours.config, name) for name in sizes},
        num_attention_heads=ours.config.hidden_size // 64,
        max_position_embeddings=ours.config.max_position_embeddings,
        projection_dim=ours.config.hidden_size,
        hidden_act=activation,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = CLIPTextModelWithProjection(config)
    state = dict(ours.state_dict())
    if activation == "quick_gelu":  # CLIP-L: diffusers' release has the identity for a projection
        state["text_projection.weight"] = torch.eye(ours.config.hidden_size)
    model.load_state_dict(state)
    return model.to(ours.dtype).eval()


def t5(ours: T5EncoderModel) -> T5EncoderModel:
    """A T5 encoder with the settings of the diffusers release's config.json, and our weights."""
    config = T5Config(
        vocab_size=ours.config.vocab_size,
        d_model=ours.config.d_model,
        d_kv=64,
        d_ff=ours.config.d_ff,
        num_layers=ours.config.num_layers,
        num_heads=ours.config.num_heads,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )
    model = T5EncoderModel(config)
    model.load_state_dict(ours.state_dict())
    return model.to(ours.dtype).eval()


def pipeline(ours: Pipeline, kind: type = StableDiffusion3Pipeline):
    """diffusers' text-to-image (or image-to-image) pipeline with our weights and tokenizers."""
    encoders = ours.text_encoders
    tokenizers = [*encoders.tokenizers, None][:3]
    pipe = kind(
        transformer=with_exact_norms(transformer(ours.mmdit)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=ours.defaults.shift),
        vae=vae(ours.autoencoder),
        text_encoder=clip(encoders.clip_l, "quick_gelu"),
        tokenizer=tokenizers[0],
        text_encoder_2=clip(encoders.clip_g, "gelu"),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5(encoders.t5) if encoders.t5 else None,
        tokenizer_3=tokenizers[2],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
