"""The three text encoders: prompts to a context of token rows and one pooled vector (paper §4, App.
B.2).

Both CLIPs give their second-last layer, without the final norm, side by side and padded with zeros
to T5's width; T5's rows follow below them. The pooled vector is CLIP-L's, not projected, beside
CLIP-G's, projected. Padding is attended to.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.config import HEAD_WIDTH, CLIPConfig, T5Config
from sd3min.conventions import DIFFUSERS, Conventions

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel
else:  # transformers is slow to import, and waits until an encoder is built
    CLIPTextModelWithProjection = T5EncoderModel = nn.Module
    PreTrainedTokenizerBase = Callable

ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}


class Conditioning(NamedTuple):
    """What the prompts say to the network: rows for attention and one vector for modulation."""

    context: Float[Tensor, "b l c"]
    pooled: Float[Tensor, "b p"]


def clip(config: CLIPConfig, part: str) -> CLIPTextModelWithProjection:
    """A CLIP text encoder, `part` "clip_l" or "clip_g", that pools where the largest id stands: the
    end of the text.
    """
    import transformers

    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // HEAD_WIDTH,
            max_position_embeddings=config.length,
            hidden_act=ACTIVATIONS[part],
            bos_token_id=0,
            eos_token_id=2,  # transformers' sign for "the largest id", and not an id itself
        )
    )


def t5(config: T5Config) -> T5EncoderModel:
    """The encoder half of a T5 v1.1."""
    import transformers

    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocabulary,
            d_model=config.width,
            d_kv=HEAD_WIDTH,
            d_ff=config.mlp_width,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.distances,
            feed_forward_proj="gated-gelu",
        )
    )


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    length: int,
    name: str,
    zero_padding: bool = False,
) -> Tensor:
    """Ids of the prompts [b, length], padded or cut; cuts are one warning that quotes them.

    Padding is the tokenizer's, or 0.
    """
    whole = tokenizer(list(prompts), return_offsets_mapping=True, verbose=False)
    cut = [
        prompt[offsets[length - 1][0] :].strip()  # the last place belongs to the end of the text
        for prompt, offsets in zip(prompts, whole.offset_mapping, strict=True)
        if len(offsets) > length
    ]
    if cut:
        quoted = "; ".join(f'"{text}"' for text in cut)
        warnings.warn(f"{name} reads {length} tokens and did not see: {quoted}", stacklevel=4)
    padding = 0 if zero_padding else tokenizer.pad_token_id
    rows = [[*ids[: length - 1], ids[-1]] if len(ids) > length else ids for ids in whole.input_ids]
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows])


class TextEncoders(nn.Module):
    """CLIP-L, CLIP-G and, where it is not left out, T5, each with its tokenizer."""

    def __init__(
        self,
        clip_l: CLIPTextModelWithProjection,
        clip_g: CLIPTextModelWithProjection,
        t5: T5EncoderModel | None,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        context_width: int = 4096,
        t5_length: int = 256,
    ):
        """`context_width`: T5's, or its zeros'; `t5_length`: rows that it adds by default."""
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers = tokenizers
        self.context_width = context_width
        self.t5_length = t5_length

    @property
    def has_t5(self) -> bool:
        """Whether T5 was not left out."""
        return self.t5 is not None

    def clip_rows(
        self,
        model: CLIPTextModelWithProjection,
        index: int,
        prompts: Sequence[str],
        own: bool = True,
    ) -> Conditioning:
        """Rows of the second-last layer, and the vector that the model pools and projects.

        Ids are those of its `own` tokenizer, or CLIP-L's with padding of id 0.
        """
        name, tokenizer = ("CLIP-L", "CLIP-G")[index], self.tokenizers[index if own else 0]
        length = model.config.max_position_embeddings
        ids = token_ids(tokenizer, prompts, length, name, zero_padding=not own).to(model.device)
        outputs = model(ids, output_hidden_states=True)
        return Conditioning(outputs.hidden_states[-2], outputs.text_embeds)

    def t5_rows(
        self, prompts: Sequence[str], length: int, conventions: Conventions = DIFFUSERS
    ) -> Float[Tensor, "b l c"]:
        """T5's rows, or as many zeros where it was left out (§5.3.3)."""
        if self.t5 is None:
            return torch.zeros(len(prompts), length, self.context_width)
        prompts = [prompt[: conventions.t5_characters] for prompt in prompts]
        if conventions.t5_grows:
            length = max(length, *map(len, self.tokenizers[2](prompts, verbose=False).input_ids))
        ids = token_ids(self.tokenizers[2], prompts, length, "T5").to(self.t5.device)
        return self.t5(ids).last_hidden_state

    def both_clips(
        self,
        prompts: Sequence[str],
        conventions: Conventions = DIFFUSERS,
        to_clip_g: Sequence[str] | None = None,
    ) -> Conditioning:
        """Rows of both CLIPs side by side, padded to the context's width, and both pooled.

        CLIP-G reads the same prompts, or `to_clip_g`.
        """
        own = conventions.clip_g_exclamation == "padding"
        l_rows, l_pooled = self.clip_rows(self.clip_l, 0, prompts)
        g_rows, g_pooled = self.clip_rows(self.clip_g, 1, to_clip_g or prompts, own)
        rows = torch.cat([l_rows, g_rows], dim=-1)
        rows = F.pad(rows, (0, self.context_width - rows.shape[-1]))
        return Conditioning(rows, torch.cat([l_pooled, g_pooled], dim=-1))

    def encode(
        self,
        prompts: Sequence[str],
        t5_length: int | None = None,
        without_t5: str = "zeros",
        conventions: Conventions = DIFFUSERS,
    ) -> Conditioning:
        """Context [b, l, c] and pooled vector [b, p] of each prompt, officially 333 rows of 4096
        and 2048 values.

        Differs from the paper: T5 gives `t5_length` rows, 256 unless asked, as diffusers has it,
        and not as many as a CLIP, 77 (App. B.2).
        Where T5 was left out, `without_t5` says what stands for its rows: "zeros" or "omit", or
        "paper", as many zeros as CLIP has rows.
        """
        clip_rows, pooled = self.both_clips(prompts, conventions)
        length = t5_length or self.t5_length
        if self.t5 is None:
            length = {"zeros": length, "paper": clip_rows.shape[1], "omit": 0}[without_t5]
        t5_rows = self.t5_rows(prompts, length, conventions).to(clip_rows)
        return Conditioning(torch.cat([clip_rows, t5_rows], dim=1), pooled)
