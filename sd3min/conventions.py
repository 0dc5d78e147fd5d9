"""The choices on which implementations of Stable Diffusion 3 differ, by name.

The same weights, prompt and seed give other pixels in every implementation, and not because one of
them errs: what none of the weights decides is decided otherwise in each. Every such choice is one
field here, with what it does and where each implementation makes it, and an implementation is one
row of fields. `sd3min explain diffusers sd3-ref` measures what each difference does to a picture.

Sources: diffusers 0.42.1; Stability-AI/sd3-ref and Stability-AI/sd3.5 at their last commits;
ComfyUI. Where an implementation has no such choice, the field is as in diffusers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args, get_type_hints

from sd3min.config import Refusal

WithoutT5 = Literal["zeros", "paper", "omit"]
Start = Literal["steps - steps*strength", "steps*(1 - strength)", "steps/strength"]

SETTINGS = (  # fields that a call may set too, by the same names
    "t5_length",
    "without_t5",
    "schedule",
    "sampler",
    "steps",
    "guidance_scale",
    "shift",
)


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What an implementation does where the weights leave it open; by default as diffusers."""

    name: str
    t5_length: Annotated[
        int,
        "Rows that T5 adds to the context. What is left over is padding, which both T5 and the "
        "MMDiT attend to, so even the words' own rows change with it. The paper trains with 77 "
        "(App. B.2); diffusers' max_sequence_length is 256; T5XXLTokenizer's min_length in "
        "sd3-ref, sd3.5 and ComfyUI is 77.",
    ] = 256
    t5_grows: Annotated[
        bool,
        "Whether a longer prompt adds rows or is cut. diffusers cuts; T5XXLTokenizer of sd3-ref, "
        "sd3.5 and ComfyUI has a least length and no greatest.",
    ] = False
    t5_characters: Annotated[
        int | None,
        "Characters of a prompt that T5 is shown. SD3Tokenizer of sd3.5 passes text[:226] on: "
        "characters, where tokens may have been meant.",
    ] = None
    without_t5: Annotated[
        WithoutT5,
        "What stands for T5 where it is left out. zeros: as many rows of zeros as it would have "
        "given (diffusers); paper: as many as CLIP gives, 77, as the networks were trained on "
        "(§5.3.3, App. B.3); omit: no rows (SD3ClipModel of ComfyUI). sd3-ref and sd3.5 "
        "cannot do without it and count as diffusers here.",
    ] = "zeros"
    clip_g_exclamation: Annotated[
        Literal["padding", "word"],
        "What CLIP-G reads for a ! in the prompt. All pad CLIP-G with id 0. diffusers has that "
        "token, spelt !, as tokenizer_2's padding, so that a ! in a prompt becomes it too; "
        "the others use CLIP-L's tokenizer, to which a ! is a word of its own, and pad by hand.",
    ] = "padding"
    schedule: Annotated[
        str,
        "Times of the steps. All begin with evenly spaced times between the trained extremes after "
        "their shift, and shift once more; in ComfyUI this is the scheduler called normal.",
    ] = "official"
    sampler: Annotated[
        str,
        "How a step is taken. FlowMatchEulerDiscreteScheduler and sd3-ref's sample_euler are "
        "Euler's method; CONFIGS of sd3.5 asks for dpmpp_2m; ComfyUI's KSampler lists euler first.",
    ] = "euler"
    steps: Annotated[
        int,
        "Steps of a call that does not say. 28 in StableDiffusion3Pipeline, 50 in sd3-ref, by "
        "CONFIGS in sd3.5, 20 in ComfyUI's KSampler.",
    ] = 28
    guidance_scale: Annotated[
        float,
        "Guidance of a call that does not say. 7 in StableDiffusion3Pipeline, 5 in sd3-ref, by "
        "CONFIGS in sd3.5, 8 in ComfyUI's KSampler. At 1 or less sd3-ref and sd3.5 still run the "
        "negative prompt; here the prompt alone counts.",
    ] = 7.0
    shift: Annotated[
        float,
        "Shift of a call that does not say (§5.3.2, Eq. 23). 3 for every released model; but "
        "CONFIGS of sd3.5 has 1 for sd3_medium, against sd3-ref's own comment.",
    ] = 3.0
    of_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    start: Annotated[
        Start,
        "Steps that image-to-image skips. diffusers skips int(steps - min(steps*strength, steps)), "
        "sd3-ref and sd3.5 int(steps*(1 - strength)): the same but for rounding, as at 40 steps "
        "and 0.8. KSampler of ComfyUI makes a schedule of int(steps/strength) steps and takes the "
        "last ones, so that all steps asked for are taken. Its rule needs a number of steps: own "
        "times are skipped as in diffusers.",
    ] = "steps - steps*strength"
    start_sample: Annotated[
        Literal["seeded", "unseeded"],
        "How the autoencoder's latents of the starting picture are drawn. diffusers samples them "
        "with the picture's generator and draws the noise after that; the others sample without a "
        "seed, and the noise is the generator's first. What no seed decides is here the mode.",
    ] = "seeded"
    latents: Annotated[
        Literal["network", "float32"],
        "Type of noise, latents and guidance between steps. FlowMatchEulerDiscreteScheduler rounds "
        "to the network's type after every step; the others keep float32. It matters in bfloat16 "
        "and float16 alone. sd3-ref in float16 also rounds its first noise and time.",
    ] = "network"
    guidance: Annotated[
        Literal["velocity", "denoised"],
        "What guidance extrapolates: the velocity (diffusers, with the negative prompt first in "
        "the batch) or the data that it points at (CFGDenoiser of sd3-ref and sd3.5, ComfyUI, with "
        "the prompt first). The same but for rounding.",
    ] = "velocity"
    rounding: Annotated[
        Literal["nearest", "floor"],
        "How a pixel becomes one of 256 levels. VaeImageProcessor rounds; vae_decode of sd3-ref "
        "and sd3.5 and SaveImage of ComfyUI cut off, which darkens half of all values by a level.",
    ] = "nearest"

    def settings(self, model: str | None = None) -> dict[str, Any]:
        """What a call of a released model (or of another) is made with where it does not say."""
        common = {name: getattr(self, name) for name in SETTINGS}
        return {**common, **self.of_model.get(model or "", {})}


DIFFUSERS = Conventions(name="diffusers")
"""diffusers 0.42.1, StableDiffusion3Pipeline and its image-to-image."""

SD3_REF = Conventions(
    name="sd3-ref",
    t5_length=77,
    t5_grows=True,
    clip_g_exclamation="word",
    steps=50,
    guidance_scale=5.0,
    start="steps*(1 - strength)",
    start_sample="unseeded",
    latents="float32",
    guidance="denoised",
    rounding="floor",
)
"""Stability-AI/sd3-ref, sd3_infer.py, but for its float16."""

SD3_5 = replace(
    SD3_REF,
    name="sd3.5",
    t5_characters=226,
    sampler="dpmpp_2m",
    of_model={
        "SD3-medium": {"shift": 1.0},
        "SD3.5-large": {"steps": 40, "guidance_scale": 4.5},
    },
)
"""Stability-AI/sd3.5, sd3_infer.py, but for its float16. Its turbo has the shapes of SD3.5-large,
whose row it gets here: pass 4 steps and guidance 1."""

COMFYUI = replace(
    SD3_REF,
    name="comfyui",
    without_t5="omit",
    steps=20,
    guidance_scale=8.0,
    start="steps/strength",
)
"""ComfyUI with the values that a new KSampler shows; a workflow usually brings its own. Prompts of
more than 77 CLIP tokens, which it encodes in pieces, are cut here."""

CONVENTIONS = {known.name: known for known in (DIFFUSERS, SD3_REF, SD3_5, COMFYUI)}
WITHOUT_T5: tuple[str, ...] = get_args(WithoutT5)


def find_conventions(name: str | Conventions) -> Conventions:
    """The conventions of that name, or those given; refused where the name is unknown."""
    if isinstance(name, Conventions):
        return name
    if not isinstance(name, str) or name not in CONVENTIONS:
        raise Refusal(f"conventions {name} is not one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def reasons() -> dict[str, str]:
    """For every choice, what it does and where each implementation makes it."""
    hints = get_type_hints(Conventions, include_extras=True)
    return {name: h.__metadata__[0] for name, h in hints.items() if hasattr(h, "__metadata__")}
