"""What made a drawing, to be copied: as Python, and as a command."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3min.config import Defaults
from sd3min.explorer.wanted import Wanted

START = "start.png"  # what the starting picture is called
OPTIONS = {  # of `sd3min generate`, by the names of a pipeline's call and of `sd3min.load`
    "path": "--weights",
    "text_encoders": "--text-encoders",
    "tokenizers": "--tokenizers",
    "lora": "--lora",
    "dtype": "--dtype",
    "device": "--device",
    "negative_prompt": "--negative",
    "seed": "--seed",
    "steps": "--steps",
    "guidance_scale": "--guidance",
    "shift": "--shift",
    "sampler": "--sampler",
    "strength": "--strength",
}


def plain(value: Any) -> Any:
    """A value of `sd3min.load` as text and numbers; a list of one path is that path."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Path):
        return str(value[0])
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return str(value) if isinstance(value, Path) else value


def as_python(wanted: Wanted, defaults: Defaults, loaded: Mapping[str, Any]) -> str:
    """A program that makes the picture. `loaded`: the arguments of `sd3min.load`."""
    call = wanted.told(defaults)
    call.pop("init_image", None)
    start = ["from PIL import Image"] if wanted.init_image else []
    probe = ["from sd3min.probes.ablation import without_encoder"] if wanted.dropped else []
    arguments = [repr(call.pop("prompt")), *(f"{name}={value!r}" for name, value in call.items())]
    if wanted.init_image:
        arguments.append(f'init_image=Image.open("{START}").convert("RGB")')
    lines = ["(image,) = pipe(", *(f"    {argument}," for argument in arguments), ")"]
    if wanted.dropped:
        names = ", ".join(f'"{name}"' for name in wanted.dropped)
        lines = [f"with without_encoder(pipe, {names}):", *(f"    {line}" for line in lines)]
    given = ", ".join(f"{name}={plain(value)!r}" for name, value in loaded.items())
    imports = [*start, *([""] if start else []), "import sd3min", *probe]
    opening = [*imports, "", f"pipe = sd3min.load({given})"]
    return "\n".join([*opening, *lines, 'sd3min.save(image, "picture.png")'])


def as_command(wanted: Wanted, defaults: Defaults, loaded: Mapping[str, Any]) -> str:
    """A command that makes the picture; nothing where a CLIP was dropped, which no option does."""
    if set(wanted.dropped) - {"t5"}:
        return ""
    call = wanted.told(defaults)
    prompt = call.pop("prompt")
    words: list[str] = ["sd3min", "generate"]
    for name, value in {**loaded, **call}.items():
        if name == "lora":
            words += [part for path, scale in value for part in ("--lora", f"{path}:{scale}")]
        elif name in OPTIONS:
            values = value if isinstance(value, list) else [value]
            joined = [f"{OPTIONS[name]}={values[0]}"] if str(values[0]).startswith("-") else None
            words += joined or [OPTIONS[name], *map(str, values)]
    if "width" in call or "height" in call:
        sides = (call.get(side, getattr(defaults, side)) for side in ("width", "height"))
        words += ["--size", "{}x{}".format(*sides)]
    words += ["--init-image", START] if wanted.init_image else []
    words += ["--no-t5"] if wanted.dropped or loaded.get("t5") is False else []
    return shlex.join([*words, "--out", "picture.png", "--", prompt])
