"""The whole model from its files, within the memory there is."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from sd3min import checkpoint, pipeline
from sd3min.config import Refusal
from sd3min.fast.compiled import compile_, mode_options
from sd3min.fast.encoders import without_transformers
from sd3min.fast.plan import outline, plan
from sd3min.fast.stages import MEMORY, StagedPipeline
from sd3min.fast.t5 import check as check_t5
from sd3min.fast.t5 import load_t5
from sd3min.lora import LoRAs, merged
from sd3min.pipeline import Pipeline


def load(
    path: checkpoint.AnyPaths | None = None,
    text_encoders: checkpoint.AnyPaths | None = None,
    tokenizers: checkpoint.AnyPath | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    t5: bool | str = True,
    memory: str | None = None,
    mmdit: str | None = None,
    cache: str | Path | None = None,
    lora: LoRAs | None = None,
    compile: str | None = None,
) -> Pipeline:
    """A pipeline from an official file, a folder of such files or a diffusers folder, or a name on
    the hub such as stabilityai/stable-diffusion-3-medium-diffusers; from the shipped sd3-tiny
    where no path is given.

    `path` may be several, of which the last that holds a part counts. `text_encoders`: files of
    encoders, which come before those at `path`. `tokenizers`: the folder that holds `tokenizer`,
    `tokenizer_2` and `tokenizer_3`, by default the first path or the folder that it lies in.
    `dtype`: float32, bfloat16 or float16; by default float32 for small files, for others bfloat16
    on a CPU and the stored type on a GPU. `t5=False` goes without T5, with zeros in its place;
    "int8" and "bnb", bitsandbytes', keep it in eight bits, and "fp8" as a file in fp8 has it.
    `memory`: "fast" keeps all parts and speeds the network up, "resident" keeps one part at a time,
    "stream" two layers of it; without it the parts are the plain modules. (Plain text encoders are
    transformers' own, and under a plan `fast.encoders`'.) `mmdit="int8"` computes the network's
    linear layers in eight bits, and `cache` names a folder for prompts' embeddings, so that a
    prompt's second run loads no text encoder: both under a plan of memory. `lora`: files of LoRAs,
    or pairs of a file and how much it counts, such as ("cat.safetensors", 0.8); see `sd3min.lora`.
    `compile`: a mode of torch.compile for the plain networks; "max-autotune" sets
    what diffusers' guide to Stable Diffusion 3 does. Raises Refusal where a file does not fit, and
    says which tensors.
    """
    names = checkpoint.part_names(bool(t5))
    opened = checkpoint.Checkpoint.open(path, text_encoders, tokenizers, names)
    return assemble(opened, device, dtype, t5, memory, mmdit, cache, lora, compile)


def assemble(
    opened: checkpoint.Checkpoint,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    t5: bool | str = True,
    memory: str | None = None,
    mmdit: str | None = None,
    cache: str | Path | None = None,
    lora: LoRAs | None = None,
    compile: str | None = None,
) -> Pipeline:
    """A pipeline from opened files, by the arguments of `load`; refused where they do not fit."""
    check(opened, t5, memory, mmdit, cache, lora, compile)
    opened = without_transformers(opened) if memory else opened
    opened = merged(opened, lora, checkpoint.part_names(bool(t5)))
    if t5 == "fp8" and opened.parts["t5"].loras:
        raise Refusal("t5 fp8 keeps T5 as it is stored, and a LoRA changes it: pass t5 int8")
    chosen, place = opened.placement(device, dtype)
    if memory is not None:
        pipe = StagedPipeline(opened, chosen, place, t5, memory, mmdit, cache)
    else:
        pipe = pipeline.assemble(opened, place, chosen, t5 is True)
        if isinstance(t5, str):
            encoders: Any = pipe.text_encoders
            encoders.t5 = load_t5(opened.parts["t5"], chosen, place, t5)
            encoders.tokenizers = [*encoders.tokenizers, opened.load_tokenizer("t5")]
    kinds = {"t5": t5, "mmdit": mmdit}
    pipe.planned = partial(
        plan, outline(opened), dtype=chosen, device=place, t5=t5, memory=memory, mmdit=mmdit
    )
    pipe.kinds = {name: kind for name, kind in kinds.items() if isinstance(kind, str)}
    return pipe if compile is None else compile_(pipe, compile)


def check(
    opened: checkpoint.Checkpoint,
    t5: bool | str = True,
    memory: str | None = None,
    mmdit: str | None = None,
    cache: str | Path | None = None,
    lora: LoRAs | None = None,
    compile: str | None = None,
) -> None:
    """Refuse plans that there are not, and files that do not fit; with a cache of prompts only when
    a prompt is not in it are text encoders looked at, unless a LoRA may change them.
    """
    if memory not in (None, *MEMORY):
        raise Refusal(f"memory {memory} is not one of {', '.join(MEMORY)}")
    if mmdit not in (None, "int8"):
        raise Refusal(f"mmdit {mmdit} is not int8: leave it out for the working type")
    if mmdit and memory not in ("fast", "resident"):
        raise Refusal(f"mmdit {mmdit} is for a network made for runs: pass memory fast or resident")
    if cache and memory is None:
        plans = ", ".join(MEMORY)
        raise Refusal(f"cache {cache} is for encoders loaded when needed: pass memory {plans}")
    if compile is not None:
        mode_options(compile)
        if memory is not None:
            raise Refusal(f"compile {compile} is for the plain networks: leave memory {memory} out")
    names = checkpoint.part_names(bool(t5))
    opened = without_transformers(opened)  # whose import is slow
    opened.require_presence(names)
    unneeded = checkpoint.TOKENIZERS if cache and not lora else ()
    opened.require([name for name in names if name not in unneeded])
    if isinstance(t5, str):
        check_t5(opened.parts["t5"], t5)
        if memory == "stream":
            raise Refusal(
                f"t5 {t5} is for a T5 that stays in memory: leave it out under memory stream, "
                "which reads T5 layer by layer"
            )
